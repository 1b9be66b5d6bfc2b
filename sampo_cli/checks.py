"""What must hold while training, or the run stops with the reason: the reference is one, the gradient is alive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sampo_cli import ranks
from sampo_cli.batch import PairBatch
from sampo_cli.config import TrainConfig
from sampo_cli.errors import NumericsError
from sampo_cli.policy import reference
from sampo_cli.state import Progress

STEP_0_TOLERANCE = 1e-3
"""Nats per token by which policy and reference may differ before training; LoRA with B = 0 gives exactly 0."""

ROUNDED_TOLERANCE = 5e-2
"""The same where the two were not computed alike: DoRA, which multiplies by a norm over itself, and a reference from
disk, whose batches had other shapes; 16-bit products are rounded differently then."""

ZERO_GRADIENT_STEPS = 3

ADVICE = "look at those rows; lower train.learning_rate; try --set model.dtype=float32"


@torch.no_grad()
def check_reference(policy: torch.nn.Module, batch: PairBatch, *, dropout: bool, rounded: bool) -> None:
    """Before the first step the policy must be its reference, in every process: mean over a micro-batch's tokens.

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
        differences = ranks.gather((policy(batch) - before).abs().mean().item())
    finally:
        policy.train()
    raw: Any = getattr(policy, "module", policy)
    from_disk = batch.reference_logps is not None and raw.dtype != torch.float32
    tolerance = ROUNDED_TOLERANCE if rounded or from_disk else STEP_0_TOLERANCE
    if different := [difference for difference in differences if not difference < tolerance]:
        raise NumericsError(
            f"before the first step, policy and reference differ by {different[0]:.3g} nats per token",
            hint="the adapter or its initialisation changes the base; use lora.init=default",
        )


def check_gradient(norm: float, loss: float, zeros: int) -> int:
    """The number of steps in a row whose gradient was exactly 0, this one included; `zeros` is what it was before.

    Raises:
        NumericsError: the gradient has been 0 for `ZERO_GRADIENT_STEPS`.
    """
    vanished = norm == 0 and loss > 0  # a hinge whose margins are all reached has no gradient, and no loss
    zeros = zeros + 1 if vanished else 0
    if zeros >= ZERO_GRADIENT_STEPS:
        raise NumericsError(
            f"the gradient was exactly 0 for {ZERO_GRADIENT_STEPS} steps: nothing is being trained",
            hint="check lora.targets; a beta far too large saturates the loss",
        )
    return zeros


def refuse_or_skip(progress: Progress, settings: TrainConfig, loss: bool, rows: Sequence[str], pairs: int) -> str:
    """Count a step that is not taken because its loss or its gradient is not finite, and say so.

    Args:
        loss: it is the loss.
        rows: where the pairs that are to blame came from; all of the step's if it is the gradient.
        pairs: of the step.

    Raises:
        NumericsError: such a step is not to be skipped, or too many were in a row.
    """
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    problem = _not_finite(rows, pairs) if loss else f"the gradient is not finite; the pairs: {_some(rows)}"
    step = f"step {progress.step + 1}: {problem}"
    if settings.on_nonfinite == "stop":
        raise NumericsError(step, hint=f"{ADVICE}; or skip such steps with --set train.on_nonfinite=skip")
    if progress.skipped_in_a_row > settings.nonfinite_limit:
        raise NumericsError(f"{settings.nonfinite_limit} steps in a row were skipped; {step}", hint=ADVICE)
    return f"warning: skipped {step}"


def check_evaluation(step: int, pairs: int, settings: TrainConfig, rows: Sequence[str]) -> None:
    """An evaluation after `step` with losses that are not finite leaves those pairs out, if that is what was asked for.

    Args:
        pairs: of the evaluation.
        rows: where those that are not finite came from.

    Raises:
        NumericsError: it was not, or there are no others.
    """
    if settings.on_nonfinite == "stop" or len(rows) == pairs:
        raise NumericsError(f"evaluation after step {step}: {_not_finite(rows, pairs)}", hint=ADVICE)


def _not_finite(rows: Sequence[str], pairs: int) -> str:
    return f"the loss is not finite for {len(rows)} of {pairs} pairs: {_some(rows)}"


def _some(rows: Sequence[str]) -> str:
    return ", ".join(rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
