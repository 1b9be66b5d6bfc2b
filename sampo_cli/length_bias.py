"""How far a number per pair goes with which answer is longer: of rewards, and of labels. Numpy only, no model.

Legend: P pairs; gap: chosen minus rejected response tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

BUCKETS = ("much shorter", "shorter", "similar", "longer", "much longer")
"""What the chosen response is, compared with the rejected one."""

EDGES = (-0.5, -0.1, 0.1, 0.5)
"""Between the buckets, of the gap as a share of the longer response: -0.5 where the chosen one is half as long."""


@dataclass(frozen=True)
class Bucket:
    """Pairs whose chosen response is `name` than the rejected one. `accuracy`: share of positive margins, or None."""

    name: str
    pairs: int
    accuracy: float | None


@dataclass(frozen=True)
class LengthBias:
    """How far margins follow length.

    Attributes:
        spearman: rank correlation of margin and gap, or None where one of them is constant.
        buckets: in the order of `BUCKETS`.
    """

    spearman: float | None
    buckets: list[Bucket]


def length_bias(margins: ArrayLike, chosen_tokens: ArrayLike, rejected_tokens: ArrayLike) -> LengthBias:
    """Of margins, lengths in tokens; [P] each, P > 0."""
    margin_P = np.asarray(margins, float)
    chosen_P, rejected_P = np.asarray(chosen_tokens, float), np.asarray(rejected_tokens, float)
    index_P = bucket_index(chosen_P, rejected_P)
    buckets = []
    for place, name in enumerate(BUCKETS):
        inside = margin_P[index_P == place]
        buckets.append(Bucket(name, len(inside), float((inside > 0).mean()) if len(inside) else None))
    return LengthBias(spearman(margin_P, chosen_P - rejected_P), buckets)


def bucket_index(chosen_tokens: ArrayLike, rejected_tokens: ArrayLike) -> NDArray[np.int64]:
    """Number of each pair's bucket in `BUCKETS`, [P]; lengths at least 1."""
    chosen_P, rejected_P = np.asarray(chosen_tokens, float), np.asarray(rejected_tokens, float)
    return np.searchsorted(EDGES, (chosen_P - rejected_P) / np.maximum(chosen_P, rejected_P), side="right")


def spearman(x: ArrayLike, y: ArrayLike) -> float | None:
    """Pearson's correlation of the ranks of x and y, [P] each; equal values share a mean rank. None if undefined."""
    ranks = [_ranks(np.asarray(values, float)) for values in (x, y)]
    if len(ranks[0]) < 2 or any(rank.std() == 0 for rank in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank: NDArray[np.float64] = np.cumsum(counts) - (counts - 1) / 2
    return mean_rank[inverse]


def interval(
    statistic: Callable[[NDArray[np.int64]], float | None], size: int, *, draws: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """The 95 % percentile bootstrap interval of a statistic (Efron and Tibshirani 1993, chapter 13).

    Args:
        statistic: of the pairs with these indices, [size], drawn with replacement.
        size: pairs in all.

    Returns:
        Low and high, or None where the statistic was undefined in more than half of the draws.
    """
    generator = np.random.default_rng(seed)
    found = [statistic(generator.integers(0, size, size)) for _ in range(draws)]
    values = [value for value in found if value is not None]
    if len(values) <= draws // 2:
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
