"""What length says about labels, by hand, and the sentence that is made of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampo_cli.label_bias import (
    GapHistogram,
    LabelBias,
    LengthModel,
    advice,
    gap_histogram,
    label_bias,
    length_model,
    longer_wins_by_gap,
    wilson,
)

GAPS = st.lists(st.integers(-5000, 5000), min_size=1, max_size=60)


def test_shares_and_gaps() -> None:
    """Gaps -1, 0, 3, 12: two of four longer, one tie that is half right."""
    bias = label_bias([-1, 0, 3, 12])
    assert (bias.pairs, bias.chosen_longer, bias.equal_length, bias.longer_wins) == (4, 0.5, 0.25, 0.625)
    assert (bias.mean_gap, bias.median_gap) == (3.5, 1.5)
    assert bias.interval == wilson(0.625, 4)


def test_wilson_interval() -> None:
    """z^2 = 3.8416. Half of 4: middle 0.5, half width 1.96 sqrt(0.25 / 4 + 3.8416 / 64) / (1 + 3.8416 / 4)."""
    assert wilson(0.5, 4) == pytest.approx((0.5 - 0.35, 0.5 + 0.35), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0, 3.8416 / 10 / (1 + 0.38416)), abs=1e-9)
    assert wilson(1.0, 10)[1] == 1


def test_the_regression_is_the_penalised_maximum() -> None:
    """Against the smallest of the negative log-posterior on a fine grid: log(1 + exp(-w x)) summed, plus w^2 / 2."""
    gaps = np.array([-30, -2, 1, 5, 8, 40, 41, 60, -25, 100])
    typical = np.sqrt((gaps**2).mean())
    grid = np.linspace(-3, 3, 60_001)
    cost = np.log1p(np.exp(-np.outer(grid, gaps / typical))).sum(1) + grid**2 / 2
    model = length_model(gaps)
    assert model.slope * typical == pytest.approx(grid[cost.argmin()], abs=1e-4)
    assert model.slope > 0
    assert model.accuracy == 0.7


def test_the_regression_finds_the_slope_that_labels_were_drawn_with() -> None:
    generator = np.random.default_rng(0)
    size = generator.integers(1, 400, 20_000)
    wins = generator.random(20_000) < 1 / (1 + np.exp(0.01 * size))  # the longer one seldom wins: -0.01 a token
    model = length_model(np.where(wins, size, -size))
    assert model.slope == pytest.approx(-0.01, rel=0.05)
    assert model.accuracy == pytest.approx(1 - wins.mean())


def test_the_regression_where_there_is_nothing_to_learn_and_where_all_is_clear() -> None:
    assert length_model([7, -7, 3, -3]) == LengthModel(accuracy=0.5, slope=0.0)
    assert length_model([0, 0]) == LengthModel(accuracy=0.5, slope=0.0)
    clear = length_model([10] * 1000)
    assert clear.accuracy == 1
    assert 0 < clear.slope < 1  # the prior keeps it finite


def test_gap_histogram() -> None:
    """95 % of the sizes 0 to 20 are below 20 or so: ceil(19.95 / 6) = 4 a bin, and the last goes on to 60."""
    gaps = [*range(-20, 21), 60]
    histogram = gap_histogram(gaps)
    assert histogram.edges == [-60, -20, -16, -12, -8, -4, 0, 1, 5, 9, 13, 17, 21, 61]
    assert histogram.pairs == [0, 4, 4, 4, 4, 4, 1, 4, 4, 4, 4, 4, 1]


@given(GAPS)
def test_gap_histogram_mirrors(gaps: list[int]) -> None:
    histogram = gap_histogram(gaps)
    assert sum(histogram.pairs) == len(gaps)
    assert [1 - edge for edge in reversed(histogram.edges)] == histogram.edges  # -b to -a is a to b, of whole numbers
    assert all(low < high for low, high in zip(histogram.edges, histogram.edges[1:], strict=False))
    assert gap_histogram([-gap for gap in gaps]) == GapHistogram(histogram.edges, histogram.pairs[::-1])


def test_longer_wins_by_gap() -> None:
    """80 pairs without the ties: 4 steps of 20. The longer one wins in a quarter of those with a small gap only."""
    small = [size if size % 4 == 0 else -size for size in range(1, 41)]
    large = list(range(41, 81))
    steps = longer_wins_by_gap([*small, *large, 0, 0])
    assert [(step.low, step.high, step.pairs) for step in steps] == [
        (1, 20, 20),
        (21, 40, 20),
        (41, 60, 20),
        (61, 80, 20),
    ]
    assert [step.longer_wins for step in steps] == [0.25, 0.25, 1, 1]
    assert steps[0].median == 10.5
    assert steps[0].interval == wilson(0.25, 20)


@given(GAPS)
def test_longer_wins_by_gap_has_every_pair_once(gaps: list[int]) -> None:
    steps = longer_wins_by_gap(gaps)
    unequal = [abs(gap) for gap in gaps if gap]
    assert sum(step.pairs for step in steps) == len(unequal)
    assert all(step.pairs for step in steps)
    assert sum(step.longer_wins * step.pairs for step in steps) == pytest.approx(sum(gap > 0 for gap in gaps))


def _bias(longer_wins: float, pairs: int) -> LabelBias:
    return LabelBias(
        pairs, longer_wins, 0.0, 0.0, 0.0, longer_wins, wilson(longer_wins, pairs), LengthModel(longer_wins, 0.0)
    )


@pytest.mark.parametrize(
    ("longer_wins", "pairs", "kept", "expected"),
    [
        (0.83, 1000, 0.7, "prefer the longer response"),
        (0.17, 1000, 0.7, "prefer the shorter response"),
        (0.55, 1000, 0.7, "lean a little to the longer response"),
        (0.45, 1000, 0.7, "lean a little to the shorter response"),
        (0.55, 100, 0.7, "prefer neither length"),  # 45 % to 64 %: too few to say
        (0.83, 1000, 0.95, "nearly the same"),
    ],
)
def test_advice(longer_wins: float, pairs: int, kept: float, expected: str) -> None:
    text = advice(_bias(longer_wins, pairs), kept)
    assert expected in text
    assert text.endswith(".")
    assert ("--balance" in text) == ("Labels prefer the" in text)
