"""Weights of response tokens: which count, how much, and always the same."""

from __future__ import annotations

import numpy as np
import pytest

from sampo_cli.sampling import REFERENCE, kept_positions, pair_generator, pair_weights


def weights(chosen: int, rejected: int, reduction: str, seed: int = 0, epoch: int = 0, pair: int = 0) -> list:
    return [w.tolist() for w in pair_weights(chosen, rejected, reduction, pair_generator(seed, epoch, pair))]


def test_reductions_by_hand() -> None:
    # T_w = 2, T_l = 4, T_m = 2
    assert weights(2, 4, "sum") == [[1, 1], [1, 1, 1, 1]]
    assert weights(2, 4, "expected") == [[1, 1], [0.5, 0.5, 0.5, 0.5]]  # 2/2 and 2/4
    assert weights(2, 4, "average") == [[1.5, 1.5], [0.75, 0.75, 0.75, 0.75]]  # (2+4)/2 = 3; 3/2 and 3/4
    assert weights(2, 4, "mean") == [[0.5, 0.5], [0.25, 0.25, 0.25, 0.25]]


def test_sample_keeps_as_many_of_the_longer_as_the_shorter_has() -> None:
    chosen, rejected = weights(3, 10, "sample")
    assert chosen == [1, 1, 1]
    assert sorted(rejected) == [0] * 7 + [1] * 3


def test_equal_lengths_sample_is_sum() -> None:
    assert weights(7, 7, "sample") == weights(7, 7, "sum")
    thrice = pair_weights(7, 7, "sample", pair_generator(0, 0, 0), draws=3)
    assert [w.tolist() for w in thrice] == weights(7, 7, "sum")


def test_same_key_same_positions_another_epoch_others() -> None:
    assert weights(5, 200, "sample", 1, 2, 3) == weights(5, 200, "sample", 1, 2, 3)
    others = [weights(5, 200, "sample", *key) for key in ((1, 3, 3), (2, 2, 3), (1, 2, 4))]
    assert all(other != weights(5, 200, "sample", 1, 2, 3) for other in others)
    first, second = (kept_positions(200, 5, pair_generator(1, 2, 3, stream)).tolist() for stream in (0, REFERENCE))
    assert first != second


@pytest.mark.parametrize(("kept", "length"), [(3, 10), (9, 10), (1, 4)])
def test_every_position_is_kept_with_frequency_kept_over_length(kept: int, length: int) -> None:
    epochs = 4000
    counts = np.zeros(length)
    for epoch in range(epochs):
        counts[kept_positions(length, kept, pair_generator(0, epoch, 17))] += 1
    share = kept / length
    standard_error = np.sqrt(share * (1 - share) / epochs)
    assert np.abs(counts / epochs - share).max() < 4.5 * standard_error


def score(reduction: str, seed: int, draws: int = 1) -> float:
    """c - r of one pair whose token log-ratios are fixed: 6 chosen tokens, 20 rejected ones."""
    rng = np.random.default_rng(5)
    ratios = rng.normal(0.3, 1.0, 6), rng.normal(-0.1, 1.0, 20)
    parts = pair_weights(6, 20, reduction, pair_generator(seed, 0, 0), draws)
    chosen, rejected = (float(weight @ ratio) for weight, ratio in zip(parts, ratios, strict=True))
    return chosen - rejected


def test_expected_is_the_mean_of_sample() -> None:
    drawn = np.array([score("sample", seed) for seed in range(2000)])
    standard_error = drawn.std(ddof=1) / np.sqrt(len(drawn))
    assert abs(drawn.mean() - score("expected", 0)) < 2 * standard_error
    assert standard_error > 0.01


@pytest.mark.parametrize("draws", [2, 4, 16])
def test_the_variance_of_the_score_falls_as_one_over_draws(draws: int) -> None:
    once, often = (np.var([score("sample", seed, k) for seed in range(2000)], ddof=1) for k in (1, draws))
    # The ratio of two variances of 2,000 has a standard error of about sqrt(2 * 2 / 2000) = 4.5 %.
    assert often * draws / once == pytest.approx(1, abs=3 * 0.045)


def test_draws_are_averaged_and_the_first_is_the_one_draw() -> None:
    one, two = (pair_weights(3, 10, "sample", pair_generator(0, 0, 0), draws) for draws in (1, 2))
    assert two[0].tolist() == one[0].tolist() == [1, 1, 1]  # the shorter response is always whole
    assert set(two[1].tolist()) <= {0.0, 0.5, 1.0}
    assert two[1].sum() == 3
    assert (two[1][one[1] == 1] >= 0.5).all()
    assert all(w.dtype == np.float32 for w in two)


def test_positions_are_these() -> None:
    """Frozen numbers: a change here changes every run that is repeated with an old seed."""
    assert kept_positions(12, 4, pair_generator(42, 0, 0)).tolist() == [0, 5, 7, 10]
