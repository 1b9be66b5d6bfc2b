"""Length bias by hand and against other ways to compute it."""

from __future__ import annotations

import numpy as np
import pytest

from sampo_cli.length_bias import Bucket, bucket_index, interval, length_bias, spearman


def test_ranks_that_are_shared() -> None:
    # ranks of x: 1.5, 1.5, 3, 4; of y: 2, 1, 3, 4; means 2.5; covariance 4.5 / sqrt(4.5 * 5)
    assert spearman([0, 0, 5, 9], [2, 1, 30, 400]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert spearman([1, 2, 3], [-1, -10, -11]) == pytest.approx(-1)


@pytest.mark.parametrize(("x", "y"), [([], []), ([1], [1]), ([1, 1], [1, 2]), ([1, 2], [3, 3])])
def test_no_correlation_where_there_is_none(x: list[int], y: list[int]) -> None:
    assert spearman(x, y) is None


def test_buckets_are_of_the_share_of_the_longer_response() -> None:
    chosen, rejected = [49, 50, 51, 90, 91, 100, 100, 100, 100, 7], [100, 100, 100, 100, 100, 91, 90, 51, 50, 7]
    assert bucket_index(chosen, rejected).tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 4, 2]


def test_accuracy_by_bucket() -> None:
    bias = length_bias([1, -1, 2, 0], [10, 10, 100, 100], [100, 100, 10, 10])
    assert bias.buckets == [
        Bucket("much shorter", 2, 0.5),
        Bucket("shorter", 0, None),
        Bucket("similar", 0, None),
        Bucket("longer", 0, None),
        Bucket("much longer", 2, 0.5),
    ]
    assert bias.spearman == pytest.approx(spearman([1, -1, 2, 0], [-90, -90, 90, 90]))


def test_an_interval_holds_the_mean_as_often_as_it_says() -> None:
    """Of 200 samples of 60 coins, 95 % of the intervals should hold one half: between 178 and 199 with p > 0.999."""
    held = 0
    for seed in range(200):
        coins = np.random.default_rng(1000 + seed).integers(0, 2, 60)
        found = interval(lambda drawn, coins=coins: float(coins[drawn].mean()), 60, draws=200, seed=seed)
        assert found is not None
        held += found[0] <= 0.5 <= found[1]
    assert 178 <= held <= 199


def test_no_interval_of_what_is_mostly_undefined() -> None:
    assert interval(lambda drawn: None, 5, draws=10) is None
