"""Log-probabilities of single tokens from hidden states, without ever holding [tokens, vocabulary] at once.

The head is frozen, so the gradient of a token's log-prob with respect to its hidden state does not depend on what
comes after it but for one number: it is worked out chunk by chunk in the forward pass, [N, H] is kept instead of
[N, V], and backward is one multiplication.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CPU_CHUNK = 2**22
"""Logits computed at a time on a CPU: 16 MiB in float32, so that they stay in its cache."""

CUDA_CHUNK_SHARE = 2**10
"""On a GPU one logit is computed at a time for so many bytes of its memory; what is done with it takes 10 or so."""

LEAST_ROWS = 128
"""Tokens computed at a time at least: with fewer, reading the head's weights takes longer than multiplying by them."""


@dataclass(frozen=True)
class Head:
    """The output layer: logits = softcap(scale * (hidden @ weight.T + bias)).

    Attributes:
        weight: [V, H], frozen.
        bias: [V] or None.
        scale: a factor on the logits (Cohere's logit_scale, the inverse of Granite's logits_scaling).
        softcap: Gemma's final soft-capping c * tanh(logits / c), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """float32 [N, V]; without a gradient."""
        logits_NV = torch.nn.functional.linear(hidden_NH.to(self.weight.dtype), self.weight, self.bias).float()
        if self.scale != 1.0:
            logits_NV.mul_(self.scale)
        if self.softcap is not None:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV

    def slope(self, logits_NV: Tensor) -> Tensor | None:
        """What soft-capping multiplies a gradient by, [N, V]; None without it."""
        return None if self.softcap is None else 1 - (logits_NV / self.softcap) ** 2

    def pull_back(self, grad_NV: Tensor, slope_NV: Tensor | None) -> Tensor:
        """A gradient with respect to logits as one with respect to hidden states, [N, H] in the weight's dtype."""
        if slope_NV is not None:
            grad_NV = grad_NV * slope_NV
        return grad_NV.to(self.weight.dtype) @ self.weight * self.scale


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """How many tokens' logits are computed at a time.

    Of a GPU's whole memory and not of what is free, as the last bits of a log-prob depend on it.
    """
    logits = CPU_CHUNK
    if device.type == "cuda":
        logits = torch.cuda.get_device_properties(device).total_memory // CUDA_CHUNK_SHARE
    return max(LEAST_ROWS, logits // vocabulary)


# What a chunk of scored tokens gives: a value per token, and its gradient by the hidden state if that is asked for.
Score = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]


class _InChunks(torch.autograd.Function):
    """`score` over hidden states, a chunk at a time; backward multiplies the gradient that forward worked out."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, vocabulary: int, score: Score) -> Tensor:
        rows = chunk_rows(vocabulary, hidden_NH.device)
        chunks = [slice(start, start + rows) for start in range(0, len(hidden_NH), rows)]
        parts = [score(hidden_NH[chunk], chunk, ctx.needs_input_grad[0]) for chunk in chunks]
        gradients = [gradient for _, gradient in parts if gradient is not None]
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat([values for values, _ in parts])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient_NH,) = ctx.saved_tensors
        return gradient_NH * grads[0][:, None].to(gradient_NH.dtype), None, None


def token_logps(hidden_NH: Tensor, targets_N: Tensor, head: Head) -> Tensor:
    """log p(target | hidden) of each scored token: float32 [N] from hidden states [N, H] and token ids [N]."""

    def score(hidden: Tensor, chunk: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        targets, logits = targets_N[chunk, None], head.logits(hidden)
        slope = head.slope(logits) if with_gradient else None
        peak = logits.amax(-1, keepdim=True)
        target_logits = logits.gather(1, targets) - peak
        # In place from here on: a further [rows, V] would cost more than what is done with it.
        exps = logits.sub_(peak).exp_()
        total = exps.sum(-1, keepdim=True)
        logps = (target_logits - total.log())[:, 0]
        if not with_gradient:
            return logps, None
        grad = exps.div_(total).scatter_add_(1, targets, torch.full_like(total, -1.0))  # softmax - onehot(target)
        return logps, head.pull_back(grad, slope).neg_()

    return _InChunks.apply(hidden_NH, head.weight.shape[0], score)


def token_kl(hidden_NH: Tensor, reference_NH: Tensor, head: Head) -> Tensor:
    """KL(reference || policy) over the vocabulary at each position, float32 [N]; no gradient to the reference."""

    def score(hidden: Tensor, chunk: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        logits = head.logits(hidden)
        policy_logp, reference_logp = logits.log_softmax(-1), head.logits(reference_NH[chunk]).log_softmax(-1)
        reference_p = reference_logp.exp()
        divergence = (reference_p * (reference_logp - policy_logp)).sum(-1)
        if not with_gradient:
            return divergence, None
        return divergence, head.pull_back(policy_logp.exp_() - reference_p, head.slope(logits))

    return _InChunks.apply(hidden_NH, head.weight.shape[0], score)
