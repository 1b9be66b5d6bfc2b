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


def test_positions_are_these() -> None:
    """Frozen numbers: a change here changes every run that is repeated with an old seed."""
    assert kept_positions(12, 4, pair_generator(42, 0, 0)).tolist() == [0, 5, 7, 10]
