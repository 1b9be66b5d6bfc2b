"""Log-probabilities of single tokens from hidden states, without ever holding [tokens, vocabulary] at once.

The head is frozen, so the gradient of a token's log-prob with respect to its hidden state does not depend on what
comes after it but for one number: it is worked out chunk by chunk in the forward pass, [N, H] is kept instead of
[N, V], and backward is one multiplication.
"""

from __future__ import annotations

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

    def gradient(self, logits_NV: Tensor, log_normalizer_N: Tensor, targets_N: Tensor) -> Tensor:
        """d log p(target) / d hidden, [N, H] in the weight's dtype. Overwrites `logits_NV`."""
        slope_NV = None if self.softcap is None else 1 - (logits_NV / self.softcap) ** 2
        grad_NV = logits_NV.sub_(log_normalizer_N[:, None]).exp_().neg_()
        grad_NV[torch.arange(len(targets_N), device=targets_N.device), targets_N] += 1
        if slope_NV is not None:
            grad_NV *= slope_NV
        if self.scale != 1.0:
            grad_NV *= self.scale
        return grad_NV.to(self.weight.dtype) @ self.weight


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, targets_N: Tensor, head: Head) -> Tensor:
        rows = max(1, CHUNK_LOGITS // head.weight.shape[0])
        logps, gradients = [], []
        for hidden, targets in zip(hidden_NH.split(rows), targets_N.split(rows), strict=True):
            logits = head.logits(hidden)
            normalizer = logits.logsumexp(-1)
            logps.append(logits.gather(1, targets[:, None])[:, 0] - normalizer)
            if ctx.needs_input_grad[0]:
                gradients.append(head.gradient(logits, normalizer, targets))
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient_NH,) = ctx.saved_tensors
        return gradient_NH * grads[0][:, None].to(gradient_NH.dtype), None, None


def token_logps(hidden_NH: Tensor, targets_N: Tensor, head: Head) -> Tensor:
    """log p(target | hidden) of each scored token: float32 [N] from hidden states [N, H] and token ids [N]."""
    return _TokenLogProbs.apply(hidden_NH, targets_N, head)
