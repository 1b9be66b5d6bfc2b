"""What backward finds: which activations are computed again, and where the others wait.

Nothing here knows a pair or a loss; a transformers model goes in.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Checkpointing = Literal["all", "selective", "none"]

ATTENTION_OPS = frozenset(
    {
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.higher_order.flex_attention,
    }
)
"""Kernels whose output is as small as a layer's input and whose cost grows with the square of the length."""

SMALLEST_BYTES = 2**18
"""What is smaller stays on the device: copying it takes longer to start than to do."""


def set_checkpointing(model: Any, checkpointing: Checkpointing) -> None:
    """Choose what a transformers model keeps of its layers between forward and backward.

    `all` keeps each layer's input and computes the rest again; `selective` also keeps what the attention kernels gave;
    `none` computes nothing again. The numbers are the same. A model that cannot checkpoint is left as it is.
    """
    if checkpointing == "none" or not model.supports_gradient_checkpointing:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if checkpointing == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
    model.activation_checkpointing_enable(options)


def _keep_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE


class Offload(saved_tensors_hooks):
    """Inside, what autograd saves for backward moves to the CPU's memory, and back when backward asks for it.

    Weights and buffers stay where they are, and so do tensors under `SMALLEST_BYTES` and expanded views, whose copy
    would be larger than they are. On CUDA the copies go through pinned memory and wait for nothing.

    Args:
        model: whose weights they are.
    """

    def __init__(self, model: nn.Module) -> None:
        weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

        def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
            expanded = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
            if tensor.nbytes < SMALLEST_BYTES or expanded or tensor.untyped_storage().data_ptr() in weights:
                return tensor
            away = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            return tensor.device, away.copy_(tensor, non_blocking=True)

        def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            device, away = packed
            return away.to(device, non_blocking=True)

        super().__init__(pack, unpack)


def offloaded(enabled: bool, model: nn.Module | None = None) -> AbstractContextManager[object]:
    """`Offload`, or nothing where it is off, where there is no backward, and without CUDA."""
    if not (enabled and torch.is_grad_enabled() and torch.cuda.is_available()):
        return nullcontext()
    return Offload(model or nn.Module())
