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

CHUNK_LOGITS = 2**25
"""Logits computed at a time: 128 MiB in float32."""


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
        """float32 [N, V]."""
        logits_NV = torch.nn.functional.linear(hidden_NH.to(self.weight.dtype), self.weight, self.bias).float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV

    def pull_back(self, grad_NV: Tensor, slope: Tensor | float) -> Tensor:
        """A gradient with respect to logits as one with respect to hidden states, [N, H] in the weight's dtype."""
        return (grad_NV * slope).to(self.weight.dtype) @ self.weight

    def slope(self, logits_NV: Tensor) -> Tensor | float:
        """d logits / d (hidden @ weight.T): a number, or [N, V] under soft-capping."""
        return self.scale if self.softcap is None else self.scale * (1 - (logits_NV / self.softcap) ** 2)


# What a chunk of scored tokens gives: a value per token, and its gradient by the hidden state if that is asked for.
Score = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]


class _InChunks(torch.autograd.Function):
    """`score` over hidden states, a chunk at a time; backward multiplies the gradient that forward worked out."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, vocabulary: int, score: Score) -> Tensor:
        rows = max(1, CHUNK_LOGITS // vocabulary)
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
        targets, logits = targets_N[chunk], head.logits(hidden)
        normalizer = logits.logsumexp(-1)
        logps = logits.gather(1, targets[:, None])[:, 0] - normalizer
        if not with_gradient:
            return logps, None
        slope = head.slope(logits)
        grad = logits.sub_(normalizer[:, None]).exp_().neg_()  # onehot(target) - softmax(logits)
        grad[torch.arange(len(targets), device=targets.device), targets] += 1
        return logps, head.pull_back(grad, slope)

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
