"""FSDP and ZeRO-3, as an accelerate config asks for them: each process keeps a part of the frozen base, adapters whole.

What is shared out is what has no gradient, the decoder's layers; torch's FSDP gathers each of them for the moment in
which it computes, and DeepSpeed each module of them (`zero.py`). Adapters are small and stay whole and float32 in every
process, so optimizer, clipping, checkpoints and references are what they are without it. Embeddings, head and final
norm stay whole as well.
"""

from __future__ import annotations

from typing import Any

import torch

from sampo_cli import ranks
from sampo_cli.config import Recipe
from sampo_cli.errors import ModelError, UsageError
from sampo_cli.zero import partition, zero_settings

Refusal = tuple[object, str, str]
"""Whether it applies, what is refused, and what to use."""


def sharing() -> str | None:
    """`FSDP` or `ZeRO-3` where the launcher asks for one of them."""
    kind = ranks.shares_out()
    if kind == "DEEPSPEED":
        return "ZeRO-3" if zero_settings()["stage"] == 3 else None
    return kind


def left_whole() -> bool:
    """True where the launcher asks for ZeRO-1 or 2, which share out gradients and optimizer."""
    return ranks.shares_out() == "DEEPSPEED" and not sharing()


def is_sharded() -> bool:
    """True where each process keeps a part of the base."""
    return sharing() is not None


def shard(causal_lm: Any, device: torch.device) -> None:
    """Share out the layers of a model, adapters aside, and put what stays whole on the device.

    Args:
        causal_lm: a transformers model, with adapters; on the CPU or the device.

    Raises:
        ModelError: it does not say what its layers are.
    """
    way = sharing()
    plugin = fsdp_plugin() if way == "FSDP" else None
    named = plugin.transformer_cls_names_to_wrap if plugin else None
    names = set(named or getattr(causal_lm, "_no_split_modules", None) or ())
    layers = [module for module in causal_lm.base_model.modules() if type(module).__name__ in names]
    if not layers:
        raise ModelError(
            f"{type(causal_lm).__name__} does not say which of its modules are its layers, which {way} needs",
            hint="name their class in an accelerate config for FSDP: fsdp_transformer_layer_cls_to_wrap",
        )
    if plugin:
        _fully_shard(causal_lm, layers, plugin, device)
    else:
        partition(causal_lm.base_model, layers, zero_settings())
    _put_whole(causal_lm, device)


def _fully_shard(causal_lm: Any, layers: list[Any], plugin: Any, device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole = {p for name, p in causal_lm.named_parameters() if ".lora_" in name}
    options: dict[str, Any] = {
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
        "mesh": init_device_mesh(device.type, (ranks.count(),)),
    }
    for layer in layers:
        fully_shard(layer, ignored_params=whole, **options)
    inside = {p for layer in layers for p in layer.parameters()}
    whole |= {p for p in causal_lm.parameters() if p not in inside}
    fully_shard(causal_lm.base_model, ignored_params=whole, **options)


def _put_whole(causal_lm: Any, device: torch.device) -> None:
    """Put on the device what is not shared out."""
    for parameter in causal_lm.parameters():
        if not hasattr(parameter, "_local_tensor") and not hasattr(parameter, "ds_tensor"):
            parameter.data = parameter.data.to(device)
    for module in causal_lm.modules():
        if (scales := getattr(module, "quant_state", None)) is not None:  # bitsandbytes' of 4-bit weights stay whole
            scales.to(device)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def fsdp_plugin() -> Any:
    """What the accelerate config says of FSDP, from the environment that the launcher made of it.

    Raises:
        UsageError: it is of the first version, or cannot be used.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin

    try:
        plugin = FullyShardedDataParallelPlugin()
    except (ValueError, ImportError) as error:
        raise UsageError(f"the accelerate config's FSDP settings: {error}") from error
    if plugin.fsdp_version != 2:
        raise UsageError(
            "the accelerate config asks for FSDP 1, which wants parameters of one dtype",
            hint="fsdp_version: 2, as in the shipped config fsdp-qlora",
        )
    return plugin


def check(recipe: Recipe) -> None:
    """Refuse what cannot work between processes that share a model out, before anything is loaded.

    Raises:
        UsageError: with the reason and what to do instead.
    """
    way = sharing()
    if not way:
        return
    train = recipe.train
    refused: list[Refusal] = [
        *(_refused_by_fsdp(recipe) if way == "FSDP" else _refused_by_zero3(recipe)),
        (train.generate.prompts, "train.generate: answers differ in length, and all compute together", "sampo eval"),
        (train.offload_activations, "train.offload_activations: weights come and go meanwhile", "more processes"),
    ]
    for applies, what, instead in refused:
        if applies:
            raise UsageError(f"{way} with {what}", hint=f"use {instead}")


def _refused_by_fsdp(recipe: Recipe) -> list[Refusal]:
    fsdp_plugin()
    int8 = recipe.model.quantization == "int8"
    return [(int8, "model.quantization=int8: 8-bit weights cannot be shared out", "nf4, or none")]


def _refused_by_zero3(recipe: Recipe) -> list[Refusal]:
    quantization, fsdp = recipe.model.quantization, "--accelerate-config fsdp-qlora"
    selective, nvme = recipe.train.checkpointing == "selective", zero_settings()["offload_param"]["device"] == "nvme"
    kept = "train.checkpointing=selective: what it keeps comes between ZeRO's transfers"
    return [
        (
            quantization != "none",
            f"model.quantization={quantization}: it shares out 16-bit weights",
            f"none, or {fsdp}",
        ),
        (recipe.lora.dora, "lora.dora: it reads the base's weights while they are elsewhere", fsdp),
        (selective, kept, "all or none"),
        (nvme, "parameters on NVMe, which was never tried", "offload_param_device: cpu, or none"),
    ]
