"""What length alone says about the labels of preference pairs, and what follows for the method. Numpy only, no model.

How far a model's margins follow length is `length_bias.py`'s.

Legend: P pairs, U different gaps; gap: chosen minus rejected response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

SIDE_BINS = 6
STEPS = 10

STRONG = 0.1
"""Labels prefer a length if the share of pairs in which the longer response is chosen is this far from a half."""

NEARLY_EQUAL = 0.95
"""From this share of tokens that down-sampling keeps, SamPO is nearly DPO."""

_Z = 1.96


@dataclass(frozen=True)
class LengthModel:
    """Logistic regression on the gap alone: P(a is preferred to b) = sigmoid(slope * (tokens of a - tokens of b)).

    Attributes:
        accuracy: share of the pairs that it gets right, which are those it was fitted to; a tie is half right.
        slope: log-odds per token. Negative where the shorter response tends to be chosen.
    """

    accuracy: float
    slope: float


@dataclass(frozen=True)
class LabelBias:
    """How labels go with length.

    Attributes:
        pairs: how many.
        chosen_longer, equal_length: shares of pairs.
        mean_gap, median_gap: in tokens.
        longer_wins: accuracy of the rule "the longer response is the better one"; a tie is half right.
        interval: of `longer_wins`, 95 %, Wilson's.
        model: length as the one feature of a logistic regression.
    """

    pairs: int
    chosen_longer: float
    equal_length: float
    mean_gap: float
    median_gap: float
    longer_wins: float
    interval: tuple[float, float]
    model: LengthModel


@dataclass(frozen=True)
class GapHistogram:
    """Pairs by gap: `pairs[i]` of them have edges[i] <= gap < edges[i + 1].

    Each bin mirrors the one as far from the middle; the middle one is gap 0. The outermost reach to what is furthest.
    """

    edges: list[int]
    pairs: list[int]


@dataclass(frozen=True)
class GapStep:
    """Pairs whose responses differ by low to high tokens, whichever is the longer; its share of chosen responses."""

    low: int
    high: int
    median: float
    pairs: int
    longer_wins: float
    interval: tuple[float, float]


def label_bias(gaps: ArrayLike) -> LabelBias:
    """Of whole gaps, [P], P > 0."""
    gap_P = np.asarray(gaps, np.int64)
    longer, equal = float((gap_P > 0).mean()), float((gap_P == 0).mean())
    wins = longer + equal / 2
    return LabelBias(
        pairs=len(gap_P),
        chosen_longer=longer,
        equal_length=equal,
        mean_gap=float(gap_P.mean()),
        median_gap=float(np.median(gap_P)),
        longer_wins=wins,
        interval=wilson(wins, len(gap_P)),
        model=length_model(gap_P),
    )


def wilson(share: float, size: int) -> tuple[float, float]:
    """The 95 % score interval of a share of `size` (Wilson 1927)."""
    z2 = _Z * _Z / size
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z * np.sqrt(share * (1 - share) / size + z2 / (4 * size)) / (1 + z2)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def length_model(gaps: ArrayLike) -> LengthModel:
    """The regression on whole gaps, [P], P > 0.

    It has no intercept, as which of the two is called the first means nothing. So it says "longer" of every pair, or
    "shorter". All that its accuracy takes from the pairs it was fitted to is this one bit, and where there is nothing
    to learn, that flatters it by 0.4 / sqrt(P) on average. Cross-validation errs more, and downwards: on balanced pairs
    each fold leaves a majority of the other kind to learn from.
    """
    gap_P = np.asarray(gaps, np.int64)
    gap_U, count_U = np.unique(gap_P, return_counts=True)
    slope = _fit(gap_U, count_U)
    return LengthModel(float(((np.sign(slope * gap_U) + 1) / 2) @ count_U / len(gap_P)), slope)


def _fit(gap_U: NDArray[Any], count_U: NDArray[Any]) -> float:
    """The slope per token: maximum likelihood with a standard normal prior on the slope per typical gap.

    Newton's method from 0. The log-posterior's derivative falls ever more slowly on the way from 0 to its root, so no
    step goes too far.
    """
    typical = float(np.sqrt(count_U @ gap_U.astype(float) ** 2 / count_U.sum())) or 1.0
    x_U = gap_U / typical
    slope = 0.0
    for _ in range(100):
        wrong_U = 1 / (1 + np.exp(np.clip(slope * x_U, -500, 500)))
        step = float((count_U @ (x_U * wrong_U) - slope) / (count_U @ (x_U**2 * wrong_U * (1 - wrong_U)) + 1))
        slope += step
        if abs(step) < 1e-10:
            break
    return slope / typical


def gap_histogram(gaps: ArrayLike) -> GapHistogram:
    """Of whole gaps, [P], P > 0: 0, and `SIDE_BINS` bins of a round width on either side.

    `SIDE_BINS` widths reach as far as 95 % of the gaps; the outermost bins go on to the largest gap of either sign.
    """
    gap_P = np.asarray(gaps, np.int64)
    width = _round_width(float(np.percentile(np.abs(gap_P), 95)) / SIDE_BINS)
    inner = width * np.arange(1, SIDE_BINS)
    most = max(int(np.abs(gap_P).max()), SIDE_BINS * width)
    edges = np.array([-most, *-inner[::-1], 0, 1, *inner + 1, most + 1])
    return GapHistogram(edges.tolist(), np.histogram(gap_P, bins=edges)[0].tolist())


def _round_width(least: float) -> int:
    """The smallest number with one digit before its zeros that is not below `least`, 1 at least."""
    scale = 10 ** max(0, int(np.floor(np.log10(max(least, 1)))))
    return scale * int(np.ceil(max(least, 1) / scale))


def longer_wins_by_gap(gaps: ArrayLike) -> list[GapStep]:
    """How often the longer response is chosen, by how much longer it is: about equally many pairs a step, ties aside.

    At most `STEPS` steps, fewer where they would have less than 20 pairs.
    """
    gap_P = np.asarray(gaps, np.int64)
    size_P = np.abs(gap_P)
    unequal = size_P > 0
    if not unequal.any():
        return []
    cuts = np.linspace(0, 1, min(STEPS, max(1, int(unequal.sum()) // 20)) + 1)
    edges = np.unique(np.quantile(size_P[unequal], cuts, method="higher"))
    edges[-1] += 1
    steps = []
    for low, high in pairwise(edges if len(edges) > 1 else [edges[0] - 1, edges[0]]):
        inside = unequal & (size_P >= low) & (size_P < high)
        wins, pairs = float((gap_P[inside] > 0).mean()), int(inside.sum())
        median = float(np.median(size_P[inside]))
        steps.append(GapStep(int(low), int(high) - 1, median, pairs, wins, wilson(wins, pairs)))
    return steps


def advice(bias: LabelBias, kept_share: float) -> str:
    """What the numbers mean for the choice of method, in a sentence: a rule of thumb, whose thresholds were chosen.

    Args:
        bias: of the labels.
        kept_share: of response tokens that down-sampling to the shorter response keeps.
    """
    if kept_share >= NEARLY_EQUAL:
        return (
            f"Both responses of a pair are nearly as long (sampo would count {kept_share:.0%} of their tokens), so "
            "sampo and dpo do nearly the same here."
        )
    low, high = bias.interval
    shown = f"the longer one is chosen in {bias.longer_wins:.1%}, 95 % interval {low:.1%} to {high:.1%}"
    if low <= 0.5 <= high:
        return f"Labels prefer neither length ({shown}): dpo and sampo should differ little in how long answers get."
    way = "longer" if bias.longer_wins > 0.5 else "shorter"
    if abs(bias.longer_wins - 0.5) < STRONG:
        return f"Labels lean a little to the {way} response ({shown}): dpo's sum may add to that, sampo does not."
    return (
        f"Labels prefer the {way} response ({shown}): dpo's sum adds to that, so use sampo; what the labels themselves "
        f"teach about length stays with any method, and --balance writes pairs without it."
    )
