"""What must hold while training, or the run stops with the reason: the reference is one, the gradient is alive."""

from __future__ import annotations

import math
from typing import Any

import torch

from sampo_cli.batch import PairBatch
from sampo_cli.errors import NumericsError
from sampo_cli.policy import reference

STEP_0_TOLERANCE = 1e-3
"""Nats per token by which policy and reference may differ before training; LoRA with B = 0 gives exactly 0."""

ROUNDED_TOLERANCE = 5e-2
"""The same where the two were not computed alike: DoRA, which multiplies by a norm over itself, and a reference from
disk, whose batches had other shapes; 16-bit products are rounded differently then."""

ZERO_GRADIENT_STEPS = 3


@torch.no_grad()
def check_reference(policy: torch.nn.Module, batch: PairBatch, *, dropout: bool, rounded: bool) -> None:
    """Before the first step the policy must be its reference: mean difference over a micro-batch's tokens.

    Args:
        dropout: switch it off for this; otherwise the policy stays as it is in training.
        rounded: the two are equal but for rounding, not exactly.

    Raises:
        NumericsError: it is not, so rewards would compare two different models.
    """
    policy.train(not dropout)
    try:
        before = batch.reference_logps
        if before is None:
            with reference(policy):
                before = policy(batch)
        difference = (policy(batch) - before).abs().mean().item()
    finally:
        policy.train()
    raw: Any = getattr(policy, "module", policy)
    from_disk = batch.reference_logps is not None and raw.dtype != torch.float32
    tolerance = ROUNDED_TOLERANCE if rounded or from_disk else STEP_0_TOLERANCE
    if not difference < tolerance:
        raise NumericsError(
            f"before the first step, policy and reference differ by {difference:.3g} nats per token",
            hint="the adapter or its initialisation changes the base; use lora.init=default",
        )


def check_gradient(norm: float, loss: float, zeros: int, *, scaled: bool) -> int:
    """The number of steps in a row whose gradient was exactly 0, this one included; `zeros` is what it was before.

    Args:
        scaled: float16's loss scaler is on, which skips a step that is not finite.

    Raises:
        NumericsError: the gradient is not finite, or has been 0 for `ZERO_GRADIENT_STEPS`.
    """
    if not math.isfinite(norm) and not scaled:
        raise NumericsError(f"the gradient's norm is {norm}", hint="lower train.learning_rate")
    vanished = norm == 0 and loss > 0  # a hinge whose margins are all reached has no gradient, and no loss
    zeros = zeros + 1 if vanished else 0
    if zeros >= ZERO_GRADIENT_STEPS:
        raise NumericsError(
            f"the gradient was exactly 0 for {ZERO_GRADIENT_STEPS} steps: nothing is being trained",
            hint="check lora.targets; a beta far too large saturates the loss",
        )
    return zeros
