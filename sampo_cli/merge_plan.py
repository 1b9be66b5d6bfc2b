"""Which stored tensor of a base gets which update: everything that can be checked before a byte is written.

A skeleton of the model, on the meta device and so without weights, tells module names and kinds; the names in the
files are turned into them with transformers' own rules. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sampo_cli.adapter import Adapter, LoraLayer
from sampo_cli.errors import ModelError
from sampo_cli.fingerprint import StoredTensor

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_OTHER_PARENT = "the adapter's parent is another model; give the right one with --base"


@dataclass(frozen=True)
class Update:
    """One layer of one adapter, and how it lies against the stored weight."""

    layer: LoraLayer
    transposed: bool
    adapter: Path

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """The updated weight in float32.

        Raises:
            ModelError: the adapter carries the weight that it was trained on (PEFT saves it beside an adapted
                embedding), and it is not this one.
        """
        copy = self.layer.copy
        if copy is not None and (copy.shape != weight.shape or not torch.equal(weight.to(copy.dtype), copy)):
            raise ModelError(
                f"adapter {self.adapter}: it was trained on another '{name}' than the base's (a resized vocabulary?)",
                hint=_OTHER_PARENT,
            )
        return self.layer.merged(weight, transposed=self.transposed)


@dataclass(frozen=True)
class Plan:
    """What happens to the tensors of a base.

    Attributes:
        updates: name in the files -> updates in the order in which they are applied.
        float32: names in the files that the architecture keeps in float32 whatever the dtype of the model.
    """

    updates: dict[str, list[Update]] = field(default_factory=dict)
    float32: frozenset[str] = frozenset()


class Skeleton:
    """The base's modules without their weights."""

    def __init__(self, model: Any, stored: Iterable[StoredTensor]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)
        self._model = model
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._parameters = model.state_dict()
        self._tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
        self.converted: set[str] = set()
        self.stored: dict[str, list[StoredTensor]] = {}
        for tensor in stored:
            name, converted = self.parameter(tensor.name)
            self.stored.setdefault(name, []).append(tensor)
            self.converted |= {name} if converted else set()

    def parameter(self, name: str) -> tuple[str, bool]:
        """The model's own name for a stored tensor, and whether the model stores it in another form.

        The same two steps as transformers' `convert_and_load_state_dict_in_model`.
        """
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        renamed, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._parameters)
        if renamed not in self._parameters and name in self._parameters:
            renamed, pattern = rename_source_key(name, [], [], prefix, self._parameters)
        return renamed, pattern is not None

    def module(self, adapter: Adapter, name: str) -> tuple[str, Any]:
        """An adapted module: the name of its weight in the model, and the module."""
        weight = f"{name}.weight"
        if weight not in self._parameters:
            weight, _ = self.parameter(weight)
        if weight not in self._parameters:
            raise ModelError(
                f"adapter {adapter.folder}: the base has no module '{name}' ({type(self._model).__name__})",
                hint=_OTHER_PARENT,
            )
        if weight in self._tied:
            raise ModelError(
                f"adapter {adapter.folder}: '{name}' shares its weight with the model's other embedding; merging would "
                "change both, and the adapter was trained on one",
                hint="train without it (lora.targets=all-linear leaves it out)",
            )
        return weight, self._model.get_submodule(weight.removesuffix(".weight"))

    def float32(self, dtype: str) -> frozenset[str]:
        """Names in the files of tensors that transformers loads in float32 though the model is in `dtype`."""
        patterns = set(self._model._keep_in_fp32_modules_strict or ())
        if dtype == "float16":
            patterns |= set(self._model._keep_in_fp32_modules or ())
        names = [name for name in self.stored if any(fnmatch(name, f"*{pattern}*") for pattern in patterns)]
        return frozenset(tensor.name for name in names for tensor in self.stored[name])


def load_skeleton(base: Path, stored: Iterable[StoredTensor], *, trust_remote_code: bool) -> Skeleton:
    """The skeleton of the model in `base`.

    Raises:
        ModelError: transformers does not know the architecture, or it needs code that is not trusted.
    """
    from transformers import AutoModelForCausalLM

    from sampo_cli.config import ModelConfig
    from sampo_cli.model import load_config

    architecture = load_config(ModelConfig(name=str(base), trust_remote_code=trust_remote_code), base)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(architecture, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError) as error:
        raise ModelError(f"base {base}: {error}", hint="the base must be a causal language model") from error
    return Skeleton(model, stored)


def make_plan(adapters: Iterable[Adapter], skeleton: Skeleton, dtype: str) -> Plan:
    """Find the stored weight of every adapted module, each exactly once.

    Raises:
        ModelError: a module that the base does not have, whose shape is another, that is tied, stored in a form that
            a merge cannot reach, or quantized.
    """
    plan = Plan(float32=skeleton.float32(dtype))
    for adapter in adapters:
        for name, layer in adapter.layers.items():
            parameter, module = skeleton.module(adapter, name)
            tensor = _stored(skeleton, adapter, name, parameter)
            transposed = _transposed(adapter, name, layer, module)
            expected = layer.shape[::-1] if transposed else layer.shape
            if tensor.dtype not in FLOATS:
                raise ModelError(
                    f"the base stores '{tensor.name}' as {tensor.dtype}: it is quantized",
                    hint="give the 16-bit base with --base",
                )
            if tensor.shape != expected:
                raise ModelError(
                    f"adapter {adapter.folder}: '{name}' is for a weight of shape {expected}; the base's is "
                    f"{tensor.shape}",
                    hint=_OTHER_PARENT,
                )
            plan.updates.setdefault(tensor.name, []).append(Update(layer, transposed, adapter.folder))
    return plan


def _stored(skeleton: Skeleton, adapter: Adapter, name: str, parameter: str) -> StoredTensor:
    tensors = skeleton.stored.get(parameter, [])
    if len(tensors) != 1 or parameter in skeleton.converted:
        found = f"{len(tensors)} tensors of the base's files" if tensors else "no tensor of the base's files"
        raise ModelError(
            f"adapter {adapter.folder}: '{name}' belongs to {found}: they are fused or split on loading",
            hint="merge with PEFT's merge_and_unload, or train without this module",
        )
    return tensors[0]


def _transposed(adapter: Adapter, name: str, layer: LoraLayer, module: Any) -> bool:
    """True where the stored weight is [inputs, outputs]: GPT-2's Conv1D and embeddings."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Embedding) != layer.embedding or not isinstance(module, nn.Embedding | nn.Linear | Conv1D):
        raise ModelError(
            f"adapter {adapter.folder}: '{name}' is a {type(module).__name__}, which cannot be merged here",
            hint="merge with PEFT's merge_and_unload, or train without this module",
        )
    return isinstance(module, nn.Embedding | Conv1D)
