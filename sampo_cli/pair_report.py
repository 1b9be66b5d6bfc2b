"""What a model prefers among pairs, by how much, and how far that goes with length: estimates with their intervals.

Numbers of pairs in, plain values out; no model and no file is touched.

Legend: P pairs; gap: chosen minus rejected response tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sampo_cli.estimate import Estimate, estimate, mean_of
from sampo_cli.eval_pairs import Column, Measured, Own
from sampo_cli.length_bias import BUCKETS, bucket_index, spearman


@dataclass(frozen=True)
class BucketAccuracy:
    """Of the pairs whose chosen response is `name` than the rejected one."""

    name: str
    pairs: int
    accuracy: Estimate


@dataclass(frozen=True)
class Reward:
    """What a reward says of the pairs.

    Attributes:
        accuracy: share of pairs whose margin is above 0.
        margin: mean.
        spearman: rank correlation of margin and gap.
        buckets: in the order of `length_bias.BUCKETS`.
    """

    accuracy: Estimate
    margin: Estimate
    spearman: Estimate
    buckets: list[BucketAccuracy]


@dataclass(frozen=True)
class LogProbs:
    """Mean log-prob of a response, nats, under the model and under the base; `difference`: their difference."""

    model: Estimate
    base: Estimate | None
    difference: Estimate | None


@dataclass(frozen=True)
class PairReport:
    """A model on P pairs, with 95 % bootstrap intervals over them.

    Attributes:
        beta: factor of the margins; None where they are differences of log-probs.
        method, loss: of the run, where its loss can be computed.
        rewards: by reduction, and "own" where the run's method has another margin.
        logps: of "chosen" and "rejected" responses.
        kl: KL(base || adapter) over the vocabulary, nats, mean over the response tokens.
    """

    pairs: int
    beta: float | None
    method: str | None
    loss: Estimate | None
    rewards: dict[str, Reward] = field(repr=False)
    logps: dict[str, LogProbs] = field(repr=False)
    kl: Estimate | None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return asdict(self)


def summarise(measured: Measured, *, beta: float, own: Own | None) -> PairReport:
    """The report of what was measured."""
    tokens = measured.chosen_tokens + measured.rejected_tokens
    margins = dict(measured.margins)
    if own and own.told_apart and measured.own_margins is not None:
        margins["own"] = measured.own_margins
    sides = {
        "chosen": (measured.chosen_logps, measured.base_chosen_logps),
        "rejected": (measured.rejected_logps, measured.base_rejected_logps),
    }
    kl = measured.kl
    return PairReport(
        pairs=len(measured.pair_ids),
        beta=None if kl is None else beta,
        method=own.name if own else None,
        loss=mean_of(measured.own_losses) if measured.own_losses is not None else None,
        rewards={name: _reward(margin, measured) for name, margin in margins.items()},
        logps={side: _logps(*columns) for side, columns in sides.items()},
        kl=None if kl is None else estimate(lambda drawn: float(kl[drawn].sum() / tokens[drawn].sum()), len(tokens)),
    )


def _logps(model: Column, base: Column | None) -> LogProbs:
    if base is None:
        return LogProbs(mean_of(model), None, None)
    return LogProbs(mean_of(model), mean_of(base), mean_of(model - base))


def _reward(margins: Column, measured: Measured) -> Reward:
    right, gaps = (margins > 0).astype(float), measured.chosen_tokens - measured.rejected_tokens
    index = bucket_index(measured.chosen_tokens, measured.rejected_tokens)

    def share_right(place: int, drawn: NDArray[np.int64]) -> float | None:
        inside = right[drawn][index[drawn] == place]
        return float(inside.mean()) if len(inside) else None

    buckets = [
        BucketAccuracy(name, int((index == place).sum()), estimate(partial(share_right, place), len(margins)))
        for place, name in enumerate(BUCKETS)
    ]
    correlation = estimate(lambda drawn: spearman(margins[drawn], gaps[drawn]), len(margins))
    return Reward(mean_of(right), mean_of(margins), correlation, buckets)
