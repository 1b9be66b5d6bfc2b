"""A linear layer with its LoRA adapter as one operation of autograd's, instead of PEFT's dozen.

The numbers are PEFT's but for rounding. What is saved are passes over the activations (a clone, a product by the
scaling and a sum for each layer) and the starting of small kernels, which is what a GPU waits for in all but the
largest models. Without its adapter a layer gives exactly what its base gives, and so does one whose B is zero.

Legend: T positions of all rows, I inputs, O outputs, r the adapter's rank.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sampo_cli.activations import Checkpointing
from sampo_cli.sharding import is_sharded


class _WithAdapter(torch.autograd.Function):
    """base(x) + scaling * x @ A.T @ B.T for a frozen base; in 16 bits, products with A and with B are rounded to them.

    Args:
        x: [..., I] in the compute dtype.
        lora_A, lora_B: [r, I] and [O, r]; gradients have their dtype.
        base: an `nn.Linear` or bitsandbytes' 4-bit one.
        in_place: the base's output may be written to.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, base: nn.Module, scaling: float, in_place: bool
    ) -> Tensor:
        x_TI, rounded_A, rounded_B = x.flatten(0, -2), lora_A.to(x.dtype), lora_B.to(x.dtype)
        low_Tr = torch.mm(x_TI, rounded_A.t())
        out = base(x)
        out_TO = out.flatten(0, -2)
        if in_place:
            out_TO.addmm_(low_Tr, rounded_B.t(), alpha=scaling)
        else:
            out = torch.addmm(out_TO, low_Tr, rounded_B.t(), alpha=scaling).view_as(out)
        ctx.save_for_backward(x_TI, rounded_A, rounded_B, low_Tr)
        ctx.base, ctx.scaling, ctx.shape, ctx.dtypes = base, scaling, x.shape, (lora_A.dtype, lora_B.dtype)
        return torch.ops.aten._unsafe_view(out, out.shape)  # of a view, autograd would let nobody change the values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, rounded_A, rounded_B, low_Tr = ctx.saved_tensors
        grad_TO = grads[0].flatten(0, -2)
        grad_Tr = torch.mm(grad_TO, rounded_B).mul_(ctx.scaling)
        grad_A = grad_B = grad_x = None
        if ctx.needs_input_grad[1]:
            grad_A = torch.mm(grad_Tr.t(), x_TI).to(ctx.dtypes[0])
        if ctx.needs_input_grad[2]:
            grad_B = torch.mm(grad_TO.t(), low_Tr).to(ctx.dtypes[1]).mul_(ctx.scaling)
        if ctx.needs_input_grad[0]:
            grad_TI = torch.mm(grad_TO, frozen_weight(ctx.base, x_TI.dtype))
            grad_x = grad_TI.addmm_(grad_Tr, rounded_A).view(ctx.shape)
        return grad_x, grad_A, grad_B, None, None, None


def frozen_weight(base: Any, dtype: torch.dtype) -> Tensor:
    """The base's weight, [O, I] in `dtype`."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return base.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight, state).to(dtype)


def join_adapters(model: nn.Module, checkpointing: Checkpointing = "none") -> int:
    """Make the LoRA layers of a PEFT model use this operation; returns how many linear layers do.

    The others stay PEFT's: embeddings, GPT-2's Conv1D, int8. PEFT's forward also serves, decided at each call, a layer
    that is more than one plain adapter: with dropout, a bias or DoRA, merged, or with several adapters at once. None is
    joined of a sharded base, whose weights are gathered when PEFT calls a layer.

    Args:
        checkpointing: `selective` keeps outputs of base layers, which are not to be written to then.
    """
    from peft.tuners.lora import LoraLayer

    if is_sharded():
        return 0
    in_place = checkpointing != "selective"
    joined = [module for module in model.modules() if isinstance(module, LoraLayer) and _is_plain(module.base_layer)]
    for module in joined:
        module.forward = MethodType(_joined_forward(type(module).forward, in_place), module)
    return len(joined)


def _is_plain(base: Any) -> bool:
    if type(base) is nn.Linear:
        return True
    return f"{type(base).__module__}.{type(base).__qualname__}" == "bitsandbytes.nn.modules.Linear4bit"


def _joined_forward(separate: Any, in_place: bool) -> Any:
    """A method for a LoRA layer. `separate`: PEFT's own, for what is not plain."""

    def forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = _plain_adapter(layer)
        if args or kwargs or name is None:
            return separate(layer, x, *args, **kwargs)
        given, base = x.dtype, layer.base_layer
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weights = layer.lora_A[name].weight, layer.lora_B[name].weight
        out = _WithAdapter.apply(x, *weights, base, layer.scaling[name], in_place)
        return out if type(base) is nn.Linear else out.to(given)  # as the base alone would give it

    return forward


def _plain_adapter(layer: Any) -> str | None:
    """The one adapter that is active in a LoRA layer, if all that it does is A and B."""
    names = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] not in layer.lora_A:
        return None
    (name,) = names
    dropout = layer.lora_dropout[name]
    drops = layer.training and getattr(dropout, "p", 0.0) > 0
    return None if drops or name in layer.lora_variant or layer.lora_B[name].bias is not None else name
