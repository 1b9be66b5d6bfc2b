"""A LoRA adapter as it lies in its folder, and what it does to one base weight.

Reads PEFT's files and refuses what is more than plain LoRA: a merge could not honour it, and some of PEFT's settings
import modules or read files by name. Knows no base model: which weight is whose is for `merging.py`.

Legend: r rank, I inputs of a layer, O its outputs.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from sampo_cli.errors import ModelError
from sampo_cli.fingerprint import read_json
from sampo_cli.remote import first_line
from sampo_cli.trust import CONTROL

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
RECORD_FILE = "sampo.json"

PREFIX = "base_model.model."
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".base_layer.weight": "copy",
}
KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
_WITHOUT_EFFECT = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "lora_alpha", "lora_dropout", "peft_type", "peft_version", "r", "rank_pattern"),
    *("revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora"),
}

Rank = Annotated[int, Field(gt=0, le=2**16)]
Names = str | list[str] | None


def _without_control(name: str) -> str:
    if CONTROL.search(name):
        raise ValueError("a line end or control character in a name")
    return name


Name = Annotated[str, AfterValidator(_without_control)]


class _Typed(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _Record(_Typed):
    """Types of what is used of sampo.json."""

    base_model: Name | None = None
    base_revision: Name | None = None
    base_fingerprint: Name | None = None
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"


class _Settings(_Typed):
    """Types of the settings that are used, here or by PEFT; `_refuse` sees to the others."""

    base_model_name_or_path: Name | None = None
    revision: Name | None = None
    r: Rank = 8
    lora_alpha: float = 8
    lora_dropout: float = Field(0, ge=0, le=1)
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: Names = None
    exclude_modules: Names = None
    layers_pattern: Names = None
    layers_to_transform: int | list[int] | None = None
    init_lora_weights: bool | str | None = True
    use_dora: bool | None = False
    use_rslora: bool | None = False
    fan_in_fan_out: bool | None = False


@dataclass(frozen=True)
class LoraLayer:
    """The trained tensors of one module.

    Attributes:
        a: [r, I].
        b: [O, r].
        scaling: alpha / r, or alpha / sqrt(r) with rsLoRA.
        magnitude: DoRA's vector, [O], or None.
        embedding: the module is an embedding: I its vocabulary, O its width.
        copy: the base weight as PEFT saved it beside an adapted embedding, or None.
    """

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None
    embedding: bool = False
    copy: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.b.shape[0], self.a.shape[1]

    def merged(self, weight: Tensor, *, transposed: bool) -> Tensor:
        """The weight with this layer's update, float32 and of the weight's shape.

        W + scaling * B A (LoRA, arXiv 2106.09685, Eq. 3); with DoRA each output's row is then scaled to its
        magnitude: m * (W + scaling * B A) / ||W + scaling * B A|| (arXiv 2402.09353, Eq. 5).

        Args:
            weight: [O, I], or [I, O] where `transposed`. Not changed.
        """
        result = weight.to(torch.float32, copy=True)
        rows = result.T if transposed else result
        rows.addmm_(self.b.float(), self.a.float(), alpha=self.scaling)
        if self.magnitude is not None:
            rows *= (self.magnitude.float() / torch.linalg.vector_norm(rows, dim=1))[:, None]
        return result


@dataclass(frozen=True)
class Adapter:
    """One adapter's folder: its settings, the run's record of it (empty where sampo did not train it), its layers."""

    folder: Path
    settings: dict[str, Any]
    record: dict[str, Any]
    layers: dict[str, LoraLayer]

    @property
    def dora(self) -> bool:
        return bool(self.settings.get("use_dora"))


def read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder, of whatever kind of adapter.

    Raises:
        ModelError: there is none, or a setting of LoRA's is of another type.
    """
    return _typed(folder / CONFIG_FILE, _Settings)


def read_record(folder: Path) -> dict[str, Any]:
    """sampo.json of an adapter's folder: what a run says of it. Empty where sampo did not train it.

    Raises:
        ModelError: it cannot be read, or says what no run says.
    """
    return _typed(folder / RECORD_FILE, _Record) if (folder / RECORD_FILE).is_file() else {}


def _typed(path: Path, kind: type[BaseModel]) -> dict[str, Any]:
    content = read_json(path)
    try:
        kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(
            f"{path}: {first['loc'][0]}: {first['msg'].lower()} (got {repr(first['input'])[:100]})",
            hint="it was not written by PEFT or sampo like this; get the adapter again from a source that you trust",
        ) from error
    return content


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter, its tensors in the dtype of the file.

    Raises:
        ModelError: no safetensors, another kind of adapter, settings or tensors that a merge could not honour.
    """
    settings = plain_settings(folder)
    return Adapter(folder, settings, read_record(folder), _layers(folder, settings))


def plain_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA adapter: what PEFT may be given to read.

    Raises:
        ModelError: another kind of adapter, or settings that are more than plain LoRA.
    """
    settings = read_settings(folder)
    _refuse(folder, settings)
    return settings


def _refuse(folder: Path, settings: dict[str, Any]) -> None:
    """Stop at every setting that makes it more than W + scaling * B A, or that PEFT imports or reads by name."""
    from peft import LoraConfig

    if settings.get("peft_type") != "LORA":
        raise ModelError(
            f"adapter {folder}: its kind is {str(settings.get('peft_type'))[:100]!r}",
            hint="only LoRA adapters can be merged or gone on from",
        )
    init = settings.get("init_lora_weights", True)
    if init not in KEEPS_BASE:
        raise ModelError(
            f"adapter {folder}: init_lora_weights={repr(init)[:100]} changed the base's weights",
            hint="convert it to a plain LoRA adapter with PEFT (path_initial_model_for_weight_conversion) first",
        )
    defaults = LoraConfig()
    for key, value in settings.items():
        if key not in _WITHOUT_EFFECT and value and value != getattr(defaults, key, None):
            raise ModelError(
                f"adapter {folder}: {key}={repr(value)[:100]} is more than plain LoRA, and would be lost in a merge",
                hint="train without it, or merge with PEFT's merge_and_unload",
            )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's folder, on the CPU, by PEFT's names.

    Raises:
        ModelError: no adapter_model.safetensors, or one that is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = f"; {PICKLE_FILE} is pickled, which can run code" if (folder / PICKLE_FILE).is_file() else ""
        raise ModelError(f"adapter {folder}: no {WEIGHTS_FILE}{pickled}", hint="save the adapter as safetensors")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: {first_line(error)}", hint="copy or download the adapter again") from error


def _layers(folder: Path, settings: dict[str, Any]) -> dict[str, LoraLayer]:
    found: dict[str, dict[str, Any]] = {}
    foreign = []
    for key, tensor in read_tensors(folder).items():
        suffix = next((suffix for suffix in _PARTS if key.endswith(suffix)), None)
        if suffix is None or not key.startswith(PREFIX):
            foreign.append(key)
            continue
        parts = found.setdefault(key.removeprefix(PREFIX).removesuffix(suffix), {})
        parts[_PARTS[suffix]] = tensor
        parts["embedding"] = parts.get("embedding", False) or suffix.startswith(".lora_embedding")
    incomplete = [module for module, parts in found.items() if not _complete(parts, settings)]
    if foreign or incomplete or not found:
        named = f": {', '.join((foreign + incomplete)[:3])}" if foreign or incomplete else ""
        raise ModelError(
            f"adapter {folder}: {len(foreign)} tensors that are not LoRA's, {len(incomplete)} of {len(found)} layers "
            f"incomplete{named}",
            hint="whole weights (modules_to_save, a resized vocabulary) cannot be merged, nor gone on from",
        )
    return {module: _layer(folder, settings, module, parts) for module, parts in found.items()}


def _complete(parts: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Both matrices are there, and DoRA's vector exactly where the settings say so."""
    matrices = [parts.get(name) for name in ("a", "b")]
    fit = all(matrix is not None and matrix.ndim == 2 for matrix in matrices)
    return fit and ("magnitude" in parts) == bool(settings.get("use_dora"))


def _layer(folder: Path, settings: dict[str, Any], module: str, parts: dict[str, Any]) -> LoraLayer:
    from peft.utils.other import get_pattern_key

    def of_module(pattern: str, default: str) -> Any:
        values = settings.get(pattern) or {}
        return values.get(get_pattern_key(list(values), module), settings[default])

    try:
        rank, alpha = of_module("rank_pattern", "r"), of_module("alpha_pattern", "lora_alpha")
    except (KeyError, re.error) as error:
        raise ModelError(
            f"{folder / CONFIG_FILE}: no rank or scale for '{module}': {first_line(error)}",
            hint="get the adapter again from a source that you trust",
        ) from error
    if parts["a"].shape[0] != rank or parts["b"].shape[1] != rank:
        raise ModelError(
            f"adapter {folder}: {module} has rank {parts['a'].shape[0]} in {WEIGHTS_FILE}, {rank} in {CONFIG_FILE}",
            hint="the two files are not of one training",
        )
    return LoraLayer(scaling=alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank), **parts)
