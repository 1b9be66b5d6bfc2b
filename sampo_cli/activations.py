"""What backward finds: which activations are computed again, and where the others wait.

Nothing here knows a pair or a loss; a transformers model goes in.
"""

from __future__ import annotations

from collections.abc import Callable
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
    }
)
"""Kernels that give one hidden state a position, at a cost that grows with the square of the length.

Compiled flex attention is not among them: it shows torch no operator whose output could be kept.
"""

SMALLEST_BYTES = 2**18
"""Tensors below this stay on the device: a copy of so little takes longer to start than to do."""


def set_checkpointing(model: Any, checkpointing: Checkpointing) -> None:
    """Choose what a transformers model keeps of its layers between forward and backward; the numbers do not change.

    `all` keeps each layer's input and computes the rest again. `selective` also keeps what costs most to compute for
    each byte that it takes: the outputs of attention kernels and of an MLP's last projection. `none` computes nothing
    again. A model that cannot checkpoint is left as it is.
    """
    if checkpointing == "none" or not model.supports_gradient_checkpointing:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if checkpointing == "selective":
        policy = partial(_keep_the_dear, model.config.get_text_config().hidden_size)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    model.activation_checkpointing_enable(options)


def _keep_the_dear(hidden_size: int, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    dear = op in ATTENTION_OPS or _narrows(op, args, hidden_size)
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def _narrows(op: Any, args: tuple[Any, ...], hidden_size: int) -> bool:
    """True for a matrix product that gives hidden states from something wider.

    Not for keys and values, although they are narrow: kernels that rotate keys in place would spoil what is kept.
    """
    if op is torch.ops.aten.mm.default:
        inputs, outputs = args[1].shape
    elif op is torch.ops.aten.addmm.default:
        inputs, outputs = args[2].shape
    elif str(op) == "bitsandbytes.gemm_4bit.default":
        outputs, inputs = args[2]
    else:
        return False
    return bool(inputs > outputs == hidden_size)


def movable(model: nn.Module) -> Callable[[Tensor], bool]:
    """Which of the tensors that autograd saves for backward `Offload` moves.

    Not a model's weights and buffers, nor views of them; not tensors under `SMALLEST_BYTES`; not expanded views, whose
    copies would be larger than they are.
    """
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def moves(tensor: Tensor) -> bool:
        expanded = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
        return tensor.nbytes >= SMALLEST_BYTES and not expanded and tensor.untyped_storage()._cdata not in weights

    return moves


class Offload(saved_tensors_hooks):
    """Inside, what autograd saves for backward moves to the CPU's memory, and back when backward asks for it.

    On CUDA the copies go through pinned memory and nothing waits for them. Under checkpointing these are the layers'
    inputs; what `selective` keeps beside them is not saved by autograd and stays.

    Args:
        model: whose weights stay where they are.
    """

    def __init__(self, model: nn.Module) -> None:
        moves = movable(model)

        def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
            if not moves(tensor):
                return tensor
            away = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)  # keeps the strides
            return tensor.device, away.copy_(tensor, non_blocking=True)

        def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            device, away = packed
            return away.to(device, non_blocking=True)

        super().__init__(pack, unpack)


def offloaded(enabled: bool, model: nn.Module) -> AbstractContextManager[object]:
    """`Offload`, or nothing where it is off, where there is no backward, and without CUDA."""
    if not (enabled and torch.is_grad_enabled() and torch.cuda.is_available()):
        return nullcontext()
    return Offload(model)


def offload_note(enabled: bool, device: torch.device) -> str | None:
    """What to tell a user who asked for offload where there is nothing to offload from."""
    if enabled and device.type == "cpu":
        return "train.offload_activations does nothing on the CPU: its memory is where activations are anyway"
    return None
