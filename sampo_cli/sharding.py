"""FSDP, as an accelerate config asks for it: each process keeps a part of the frozen base, and adapters whole.

What is shared out is what has no gradient, the decoder's layers; torch's FSDP gathers each of them for the moment in
which it computes. Adapters are small and stay whole and float32 in every process, so optimizer, clipping, checkpoints
and references are what they are without it. Embeddings, head and final norm stay whole as well.
"""

from __future__ import annotations

from typing import Any

import torch

from sampo_cli import ranks
from sampo_cli.config import Recipe
from sampo_cli.errors import ModelError, UsageError


def is_sharded() -> bool:
    """True where the launcher asks for FSDP."""
    return ranks.shares_out() == "FSDP"


def shard(causal_lm: Any, device: torch.device) -> None:
    """Share out the layers of a model, adapters aside, and put what stays whole on the device.

    Args:
        causal_lm: a transformers model, with adapters; on the CPU or the device.

    Raises:
        ModelError: it does not say what its layers are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plugin = fsdp_plugin()
    names = set(plugin.transformer_cls_names_to_wrap or getattr(causal_lm, "_no_split_modules", None) or ())
    body = causal_lm.base_model
    layers = [module for module in body.modules() if type(module).__name__ in names]
    if not layers:
        raise ModelError(
            f"{type(causal_lm).__name__} does not say which of its modules are its layers, which FSDP needs",
            hint="name their class in the accelerate config: fsdp_transformer_layer_cls_to_wrap",
        )
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
    fully_shard(body, ignored_params=whole, **options)
    for parameter in whole:
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
    if not is_sharded():
        return
    model, train = recipe.model, recipe.train
    fsdp_plugin()
    refused = [
        (model.quantization == "int8", "model.quantization=int8: 8-bit weights cannot be shared out", "nf4, or none"),
        (train.generate.prompts, "train.generate: answers differ in length, and all compute together", "sampo eval"),
        (train.offload_activations, "train.offload_activations: weights come and go meanwhile", "more processes"),
    ]
    for applies, what, instead in refused:
        if applies:
            raise UsageError(f"FSDP with {what}", hint=f"use {instead}")
