"""`sampo merge --adapter-only`: an adapter's folder that vLLM's loader and PEFT's take.

An adapter as a run leaves it is PEFT's. vLLM's loader knows less: one rank and one scale for all layers, no DoRA, no
embeddings, no adapter upon an adapter. What it would read wrongly is rewritten here where that changes nothing, and
refused where it cannot be.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sampo_cli.adapter import CONFIG_FILE, PREFIX, RECORD_FILE, WEIGHTS_FILE, Adapter, LoraLayer, read_adapter
from sampo_cli.checkpoint import whole_folder
from sampo_cli.disk import check_room
from sampo_cli.errors import ModelError, NumericsError
from sampo_cli.merge_write import TOKENIZER_FILES
from sampo_cli.merging import ADAPTER_CONFIG, check_dtype, new_folder, resolve_adapter
from sampo_cli.serving import VLLM_RANKS, adapter_commands
from sampo_cli.trust import check_inside, files_like


@dataclass(frozen=True)
class AdapterExport:
    """What was written: the folder, the base that it is loaded upon, its rank and dtype, commands that take it."""

    output: Path
    base: str
    rank: int
    dtype: str
    commands: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        facts = {"output": str(self.output), "base": self.base, "rank": self.rank, "dtype": self.dtype}
        return {**facts, "commands": self.commands}

    def facts(self) -> dict[str, str]:
        """What to show, in words."""
        return {"adapter": str(self.output), "weights": f"{self.dtype}, rank {self.rank}", **self.commands}


def export_adapter(source: Path, *, output: Path | None = None, dtype: str = "bfloat16") -> AdapterExport:
    """Write the adapter of a run, or an adapter's folder, for other programs to load.

    Args:
        source: a run's folder or an adapter's.
        output: the new folder; `adapter-only` in the run's folder, or `<adapter>-only` beside it, if None.
        dtype: of the weights. vLLM computes in the base's, which is bfloat16 for most.

    Raises:
        UsageError: an unknown dtype, or an output folder that is not empty.
        ModelError: no adapter, or one that vLLM cannot load: DoRA, an embedding, an adapter upon another one, a rank
            above 512.
        NumericsError: a weight that is not finite in that dtype.
        SampoError: no room on the disk.
    """
    from safetensors.torch import save_file

    check_dtype(dtype)
    folder = resolve_adapter(source)
    output = new_folder(output or _default_output(folder))
    adapter = read_adapter(folder)
    base = _check(adapter)
    settings, layers = uniform(adapter)
    tensors = _tensors(layers, dtype)
    others = [path for pattern in (*TOKENIZER_FILES, RECORD_FILE) for path in files_like(pattern, folder)]
    for path in others:
        check_inside(path, folder)
    size = sum(tensor.nbytes for tensor in tensors.values()) + sum(path.stat().st_size for path in others)
    check_room(output, size, "the adapter", "make room, or give an --output on another disk")
    with whole_folder(output, size) as aside:
        (aside / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, aside / WEIGHTS_FILE, metadata={"format": "pt"})
        for path in others:
            (aside / path.relative_to(folder)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, aside / path.relative_to(folder))
    name = output.absolute().parent.name if output.name == "adapter-only" else output.name
    return AdapterExport(output, base, settings["r"], dtype, adapter_commands(output, base, name, settings["r"]))


def _default_output(adapter: Path) -> Path:
    if (adapter.parent / "recipe.yaml").is_file():
        return adapter.parent / "adapter-only"
    return adapter.with_name(f"{adapter.resolve().name}-only")


def _check(adapter: Adapter) -> str:
    """The name of the base, if vLLM can load the adapter upon it."""
    base = adapter.settings.get("base_model_name_or_path")
    rank = max(layer.a.shape[0] for layer in adapter.layers.values())
    problem = None
    if not base:
        problem = "does not say what it was trained on"
    elif (Path(base) / ADAPTER_CONFIG).is_file():
        problem = f"stands on another adapter, {base}"
    elif adapter.dora:
        problem = "is a DoRA adapter, which vLLM does not load"
    elif any(layer.embedding for layer in adapter.layers.values()):
        problem = "adapts an embedding, which vLLM does not load"
    elif rank > VLLM_RANKS[-1]:
        problem = f"has rank {rank}, and vLLM loads up to {VLLM_RANKS[-1]}"
    if problem:
        raise ModelError(f"adapter {adapter.folder} {problem}", hint="merge it: sampo merge without --adapter-only")
    return str(base)


def uniform(adapter: Adapter) -> tuple[dict[str, Any], dict[str, LoraLayer]]:
    """Settings and layers of an adapter with one rank and one scale, which does the same.

    vLLM does not read PEFT's patterns of ranks and scales by layer. Where there are any, smaller ranks are filled up
    with zeros, and the scale goes into B.
    """
    settings = adapter.settings
    if not settings.get("rank_pattern") and not settings.get("alpha_pattern"):
        return settings, adapter.layers
    rank = max(layer.a.shape[0] for layer in adapter.layers.values())
    layers = {}
    for name, layer in adapter.layers.items():
        missing = rank - layer.a.shape[0]
        a = torch.nn.functional.pad(layer.a.float(), (0, 0, 0, missing))
        b = torch.nn.functional.pad(layer.b.float() * layer.scaling, (0, missing))
        layers[name] = LoraLayer(a, b, scaling=1.0)
    plain = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return {**settings, **plain}, layers


def _tensors(layers: dict[str, LoraLayer], dtype: str) -> dict[str, Tensor]:
    found = {}
    for name, layer in layers.items():
        for part, tensor in (("A", layer.a), ("B", layer.b)):
            key = f"{PREFIX}{name}.lora_{part}.weight"
            found[key] = tensor.to(getattr(torch, dtype)).contiguous()
            if not torch.isfinite(found[key]).all():
                raise NumericsError(f"'{key}' is not finite in {dtype}", hint="try --dtype float32, or train again")
    return found
