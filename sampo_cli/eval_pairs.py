"""A model on preference pairs: every response token is scored once, under the adapter and under the base.

All rewards are weighted sums of that. What they say of the pairs is worked out in `pair_report.py`.

Legend: B pairs of a micro-batch, P pairs in all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sampo_cli import losses
from sampo_cli.batch import Draw, Pair, PairBatch, collate, micro_batches
from sampo_cli.budget import START_TOKENS, largest_that_fits
from sampo_cli.config import Recipe
from sampo_cli.errors import NumericsError
from sampo_cli.losses import LossOutput, PairScores, add_likelihood
from sampo_cli.method_table import METHODS
from sampo_cli.policy import Policy, score_against_reference
from sampo_cli.sampling import POLICY, REFERENCE, Reduction
from sampo_cli.scores import pair_scores

Column = NDArray[np.float64]

REWARDS: tuple[Reduction, ...] = ("sample", "sum", "mean")
"""Reductions that are reported of every adapter, whatever it was trained with: SamPO's, DPO's, per token."""

RANKINGS: tuple[Reduction, ...] = ("sum", "mean")
"""The same of a base alone; nothing is down-sampled where there is no log-ratio."""

BLOCK = 32
"""Pairs between two notes of how far it is."""


@dataclass(frozen=True)
class Own:
    """The loss that a run was trained with, and how it counts tokens.

    Attributes:
        loss: of the scores that `draw` gives.
        told_apart: its margin is none of `REWARDS`.
    """

    name: str
    draw: Draw
    loss: Callable[[PairScores], LossOutput]
    told_apart: bool


def own_method(recipe: Recipe) -> Own | None:
    """The method of a run's resolved recipe; None for one whose loss also depends on rewards of its training steps."""
    settings, method = recipe.method, METHODS[recipe.method.name]
    if method.memory != "none":
        return None
    assert settings.reduction is not None, "resolve() fills the reduction"
    options = {name: getattr(settings, name) for name in method.option_names}
    sft_weight = settings.sft_weight or 0.0

    def loss(scores: PairScores) -> LossOutput:
        return add_likelihood(method.loss(scores, **options), scores, sft_weight)

    draw = Draw(settings.reduction, recipe.train.seed, 0, settings.sampling, bool(sft_weight), settings.draws)
    plain = method.loss is losses.dpo and settings.reduction in REWARDS
    return Own(settings.name, draw, loss, not plain or settings.sampling != "paired" or settings.draws != 1)


@dataclass(frozen=True)
class Measured:
    """Numbers of P pairs in the order of their ids, [P] each.

    Attributes:
        chosen_logps, rejected_logps: log-probs of the whole responses, nats.
        base_chosen_logps, base_rejected_logps: the same without the adapter; None without one.
        kl: sum over both responses' tokens of KL(base || adapter) over the vocabulary, nats; None without an adapter.
        margins: by reduction, beta times the difference of the log-ratios; without an adapter of the log-probs.
        own_losses, own_margins: of the run's method.
    """

    pair_ids: NDArray[np.int64]
    chosen_tokens: Column
    rejected_tokens: Column
    chosen_logps: Column
    rejected_logps: Column
    margins: dict[str, Column]
    base_chosen_logps: Column | None = None
    base_rejected_logps: Column | None = None
    kl: Column | None = None
    own_losses: Column | None = None
    own_margins: Column | None = None

    def to_dict(self) -> dict[str, Any]:
        """Lists, as JSON can hold them."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(inner) for key, inner in value.items()}
            return None if value is None else value.tolist()

        return {key: plain(value) for key, value in vars(self).items()}


@torch.no_grad()
def measure(
    policy: Policy,
    pairs: Sequence[Pair],
    *,
    beta: float,
    seed: int,
    own: Own | None,
    against_base: bool,
    where: Callable[[int], str] = str,
    note: Callable[[str], object] = lambda text: None,
) -> Measured:
    """Score pairs.

    Args:
        seed: of the positions that down-sampling keeps: those of epoch 0, as in a run's evaluations.
        own: the run's method, if its loss is to be computed.
        against_base: the policy has an adapter, and is compared with itself without it.
        where: names the row of a pair id, for messages.

    Raises:
        NumericsError: log-probs that are not finite.
        OutOfMemory: not even one pair fits.
    """
    draws = {name: Draw(name, seed, 0) for name in (REWARDS if against_base else RANKINGS)}
    tokens, parts = START_TOKENS[policy.causal_lm.device.type], []
    for first in range(0, len(pairs), BLOCK):
        block = pairs[first : first + BLOCK]
        longest = max(max(pair.row_lengths(policy.layout)) for pair in block)
        found: list[dict[str, torch.Tensor]] = []

        def attempt(tokens: int, block: Sequence[Pair] = block, found: list[dict[str, torch.Tensor]] = found) -> None:
            found.clear()
            for group in micro_batches(block, tokens, policy.layout):
                found.append(_columns(policy, group, draws, beta, own, against_base))

        tokens = largest_that_fits(tokens, longest, attempt, halve=True)
        parts += found
        note(f"pairs: {min(first + BLOCK, len(pairs)):,} of {len(pairs):,}")
    table = {name: torch.cat([part[name] for part in parts]).cpu().double().numpy() for name in parts[0]}
    ids = table.pop("pair_ids").astype(np.int64)
    broken = ids[~np.isfinite(np.stack(list(table.values()))).all(0)]
    if len(broken):
        rows = ", ".join(where(int(pair)) for pair in broken[:5])
        raise NumericsError(f"log-probs are not finite for {len(broken)} of {len(ids)} pairs: {rows}")
    order = np.argsort(ids)
    sorted_table = {name: values[order] for name, values in table.items()}
    margins: dict[str, Column] = {name: sorted_table.pop(f"margin {name}") for name in draws}
    return Measured(pair_ids=ids[order], margins=margins, **sorted_table)


def _columns(
    policy: Policy,
    group: Sequence[Pair],
    draws: Mapping[Reduction, Draw],
    beta: float,
    own: Own | None,
    against_base: bool,
) -> dict[str, torch.Tensor]:
    """What `Measured` holds of one micro-batch, [B] each."""
    batch = collate(group, Draw("sum", 0, 0), policy.layout).to(policy.causal_lm.device)
    logps: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
    logps = score_against_reference(policy, batch) if against_base else (policy(batch), None, None)
    whole = pair_scores(batch, *logps)
    columns = {"pair_ids": batch.pair_ids, "chosen_tokens": whole.chosen_tokens}
    columns |= {"rejected_tokens": whole.rejected_tokens}
    columns |= {"chosen_logps": whole.policy_chosen, "rejected_logps": whole.policy_rejected}
    if whole.reference_chosen is not None and whole.reference_rejected is not None:
        columns |= {"base_chosen_logps": whole.reference_chosen, "base_rejected_logps": whole.reference_rejected}
    if whole.chosen_kl is not None and whole.rejected_kl is not None:
        columns["kl"] = whole.chosen_kl + whole.rejected_kl
    for name, draw in draws.items():
        scores = pair_scores(_weighted(batch, group, draw), *logps)
        chosen, rejected = scores.log_ratios() if against_base else (scores.policy_chosen, scores.policy_rejected)
        columns[f"margin {name}"] = (beta if against_base else 1.0) * (chosen - rejected)
    if own:
        out = own.loss(pair_scores(_weighted(batch, group, own.draw), *logps, likelihood=own.draw.whole_chosen))
        columns |= {"own_losses": out.losses, "own_margins": out.chosen_rewards - out.rejected_rewards}
    return columns


def _weighted(batch: PairBatch, group: Sequence[Pair], draw: Draw) -> PairBatch:
    """A batch in which every response token is scored, with the weights of another draw."""

    def weights(stream: int) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([draw.weights(pair, stream) for pair in group])).to(batch.weights)

    own = weights(POLICY)
    return replace(batch, weights=own, reference_weights=weights(REFERENCE) if draw.sampling == "independent" else own)
