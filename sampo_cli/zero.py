"""DeepSpeed, as an accelerate config asks for it: ZeRO-3 keeps a part of the frozen base in each process.

Only DeepSpeed's partitioning is used, not its engine: adapters stay whole and float32 in every process, unknown to it,
so optimizer, clipping, checkpoints and references are what they are without it. Embeddings, head and final norm stay
whole as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sampo_cli.errors import UsageError

COUNTS = (
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "overlap_comm",
)
"""Of a DeepSpeed config's `zero_optimization`, beside `stage` and `offload_param`, what matters to a frozen base."""


INSTALL = "pip install 'sampo-cli[deepspeed]'"


def zero_settings() -> dict[str, Any]:
    """What the launcher asks of ZeRO, as DeepSpeed's `zero_optimization` names it: `stage`, and of stage 3 the rest.

    Raises:
        UsageError: the DeepSpeed config that it names cannot be read.
    """
    variable = "ACCELERATE_DEEPSPEED_{}".format
    stage = int(os.environ.get(variable("ZERO_STAGE"), "2"))
    offload = os.environ.get(variable("OFFLOAD_PARAM_DEVICE"), "none")
    settings: dict[str, Any] = {"stage": stage, "offload_param": {"device": offload}}
    file = os.environ.get(variable("CONFIG_FILE"), "none")
    if file == "none":
        return settings
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))["zero_optimization"]
        settings |= {key: found[key] for key in (*settings, *COUNTS) if found.get(key, "auto") != "auto"}
        settings["offload_param"].setdefault("device", "none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"DeepSpeed config {file}: {type(error).__name__}: {error}",
            hint="it is JSON with a section zero_optimization",
        ) from error
    return settings


def partition(body: nn.Module, layers: list[nn.Module], settings: Mapping[str, Any]) -> None:
    """Share out the frozen parameters of a model's layers between the processes, by ZeRO-3.

    Each module gathers its own parameters for the moment in which it computes, forward and backward.

    Args:
        body: the model without its head, adapters in its layers.
        settings: see `zero_settings`.
    """
    deepspeed = _import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # on a CPU it would compile what it does not need
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)
    plain = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": dict(settings)}
    zero = DeepSpeedConfig(plain).zero_config
    with hidden(body, layers):
        DeepSpeedZeRoOffload(
            body,
            timers=None,
            ds_config=plain,
            overlap_comm=zero.overlap_comm,
            prefetch_bucket_size=zero.prefetch_bucket_size,
            max_reuse_distance=zero.max_reuse_distance,
            max_live_parameters=zero.max_live_parameters,
            param_persistence_threshold=zero.param_persistence_threshold,
            model_persistence_threshold=zero.model_persistence_threshold,
            offload_param_config=zero.offload_param,
        )


def _import_deepspeed() -> Any:
    """
    Raises:
        UsageError: it is not installed, or cannot be imported.
    """
    try:
        import deepspeed
    except Exception as error:  # whatever a package that looks for compilers raises
        raise UsageError(
            f"the accelerate config asks for DeepSpeed, which cannot be imported: {error}",
            hint=f"{INSTALL}, or --accelerate-config fsdp-qlora --quantization none",
        ) from error
    return deepspeed


@contextmanager
def hidden(body: nn.Module, layers: list[nn.Module]) -> Iterator[None]:
    """Inside, a model's body has no modules but its layers, those around them, and in them no adapters."""
    around = {module for module in body.modules() if any(layer in set(module.modules()) for layer in layers)}
    seen = around | {module for layer in layers for module in layer.modules()}
    whole = {parent: dict(parent._modules) for parent in seen}
    for parent, children in whole.items():
        for name, child in children.items():
            if name.startswith("lora_") or child not in seen:
                del parent._modules[name]
    try:
        yield
    finally:
        for parent, children in whole.items():
            parent._modules.clear()
            parent._modules.update(children)
