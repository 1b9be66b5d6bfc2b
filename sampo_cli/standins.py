"""What a GPU does and a fake tensor in main memory would not: attention kernels, offload, chunks of logits, casts.

Each keeps for backward, and allocates, what the real one does on CUDA. Numbers do not matter here, sizes do. Liger's
fused kernels have no stand-in: without them a layer keeps a little more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from sampo_cli import logprobs
from sampo_cli.activations import movable
from sampo_cli.flex import FLEX

BIAS_ALIGNMENT = 16
"""The memory-efficient kernel wants rows of its bias to be multiples of this; others are copied into longer ones."""


def _sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """Scaled dot-product attention as flash attention, or by the memory-efficient kernel.

    Flash attention takes no mask and 16 bits only, and fewer heads of keys than of queries as they are. To the other a
    mask is a bias: a boolean [R, 1, S, S] becomes numbers in the query's dtype, for each layer anew, and is kept.
    """
    if attn_mask is None and query.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    groups = query.shape[1] // key.shape[1]
    key, value = (heads.repeat_interleave(groups, 1) if groups > 1 else heads for heads in (key, value))
    return _memory_efficient(query, key, value, attn_mask)


def _memory_efficient(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
    bias = None
    if attn_mask is not None:
        length, width = attn_mask.shape[-2:]
        bias = torch.zeros(attn_mask.shape, dtype=query.dtype).masked_fill_(~attn_mask.bool(), -torch.inf)
        if width % BIAS_ALIGNMENT:
            bias = functional.pad(bias, (0, -width % BIAS_ALIGNMENT))[..., :width]
        bias = bias.expand(*query.shape[:2], length, width)
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[0]


class _Flex(torch.autograd.Function):
    """Compiled flex attention: keeps its inputs, its output and a float32 for each query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, normalizer = ctx.saved_tensors
        torch.empty_like(normalizer)  # the sum of output times gradient, by query and head
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _flex_on_cuda(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
    """In the place of `flex.attend`."""
    attended: Tensor = _Flex.apply(query.to(value.dtype), key.to(value.dtype), value)
    return attended.transpose(1, 2).contiguous(), None


class AwayOnCuda(saved_tensors_hooks):
    """`activations.Offload`: what it would copy to main memory becomes a tensor on no device."""

    def __init__(self, model: nn.Module) -> None:
        moves = movable(model)

        def pack(tensor: Tensor) -> Tensor:
            if not moves(tensor):
                return tensor
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

        def unpack(packed: Tensor) -> Tensor:
            if packed.device.type != "meta":
                return packed
            return torch.empty_strided(packed.shape, packed.stride(), dtype=packed.dtype, device="cpu")

        super().__init__(pack, unpack)


def without_casts(model: nn.Module) -> None:
    """PEFT's quantized layers cast their input to float32 unless CUDA's autocast is on, which on a GPU it is."""
    for module in model.modules():
        if type(module).__module__ == "peft.tuners.lora.bnb":
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]


@contextmanager
def on_cuda(memory: int) -> Iterator[None]:
    """Inside, attention and the chunks of logits are those of a GPU with so many bytes."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    chunk, sdpa = logprobs.CPU_CHUNK, functional.scaled_dot_product_attention
    logprobs.CPU_CHUNK = memory // logprobs.CUDA_CHUNK_SHARE
    ALL_ATTENTION_FUNCTIONS[FLEX] = _flex_on_cuda
    functional.scaled_dot_product_attention = _sdpa  # type: ignore[assignment]
    try:
        yield
    finally:
        logprobs.CPU_CHUNK, functional.scaled_dot_product_attention = chunk, sdpa
        del ALL_ATTENTION_FUNCTIONS[FLEX]
