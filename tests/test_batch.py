"""The layout of a pair in one row, and the plan of micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sampo_cli.batch import Draw, Pair, collate, epoch_order, micro_batches, steps_per_epoch
from sampo_cli.scores import by_response


def make_pair(pair_id: int, prompt: list[int], chosen: list[int], rejected: list[int]) -> Pair:
    return Pair(pair_id, *(np.array(ids, np.int32) for ids in (prompt, chosen, rejected)))


PAIR = make_pair(0, [10, 11, 12], [20, 21], [30, 31, 32])


def test_one_row_by_hand() -> None:
    batch = collate([PAIR], Draw("sum", 0, 0))
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 30, 31, 32]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    # 20 and 30 are both predicted at the prompt's last position, 2; 21 at 20's; 31 and 32 at 30's and 31's.
    assert batch.positions.tolist() == [2, 3, 2, 5, 6]
    assert batch.targets.tolist() == [20, 21, 30, 31, 32]
    assert batch.owner.tolist() == [0, 0, 1, 1, 1]
    assert batch.lengths.tolist() == [2, 3]


def test_two_rows_by_hand() -> None:
    batch = collate([PAIR], Draw("sum", 0, 0), "separate")
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 0], [10, 11, 12, 30, 31, 32]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, -1], [0, 0, 0, 2, 2, 2]]
    assert batch.positions.tolist() == [2, 3, 6 + 2, 6 + 3, 6 + 4]


def test_second_pair_starts_in_the_second_row() -> None:
    batch = collate([PAIR, make_pair(1, [13], [22], [33])], Draw("sum", 0, 0))
    assert batch.input_ids[1].tolist() == [13, 22, 33, 0, 0, 0, 0, 0]
    assert batch.positions.tolist()[5:] == [8, 8]
    assert batch.owner.tolist()[5:] == [2, 3]


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_only_kept_tokens_are_scored_unless_the_whole_chosen_is_asked_for(layout: str) -> None:
    pair = make_pair(5, [1, 2], list(range(40, 60)), [70, 71])
    sampled = collate([pair], Draw("sample", 0, 0), layout)
    assert len(sampled.targets) == 4
    whole = collate([pair], Draw("sample", 0, 0, whole_chosen=True), layout)
    assert len(whole.targets) == 22
    assert whole.weights.sum() == 4


def test_weights_do_not_depend_on_batch_or_order() -> None:
    pairs = [make_pair(i, [1], list(range(50, 50 + 9 * (i + 1))), [7] * 5) for i in range(3)]
    together = collate(pairs[::-1], Draw("sample", 3, 1))
    for place, pair in enumerate(pairs[::-1]):
        alone = collate([pair], Draw("sample", 3, 1))
        mine = (together.owner == 2 * place) | (together.owner == 2 * place + 1)
        assert together.targets[mine].tolist() == alone.targets.tolist()


def test_independent_sampling_gives_the_reference_its_own_positions() -> None:
    pair = make_pair(1, [1], list(range(100, 160)), [7] * 5)
    batch = collate([pair], Draw("sample", 0, 0, sampling="independent"))
    assert batch.weights.sum() == batch.reference_weights.sum() == 10
    assert batch.weights.tolist() != batch.reference_weights.tolist()


def test_epoch_order_visits_everything_once_and_differs_by_epoch() -> None:
    assert sorted(epoch_order(10, 0, 0)) == list(range(10))
    assert epoch_order(10, 0, 0).tolist() != epoch_order(10, 0, 1).tolist()
    assert steps_per_epoch(10, 4) == 3


def rows_of(lengths: list[int]) -> list[Pair]:
    return [make_pair(i, [1], [2], [3] * (n - 2)) for i, n in enumerate(lengths)]


def cut(lengths: list[int], budget: int) -> list[list[int]]:
    return [[pair.pair_id for pair in group] for group in micro_batches(rows_of(lengths), budget)]


def test_micro_batches_keep_to_the_budget_longest_first() -> None:
    # Rows of 8, 6, 6, 3 positions; a budget of 12 holds one row of 8, or two of 6.
    assert cut([6, 3, 8, 6], 12) == [[2], [0, 3], [1]]
    # A pair beyond the budget is not lost.
    assert cut([6, 3, 8, 6], 2) == [[2], [0], [3], [1]]


def test_micro_batches_are_cut_where_padding_would_cost_more_than_a_forward_pass() -> None:
    # 1,000 and 100: together 900 positions of padding, apart one forward pass (128).
    assert cut([1000, 100], 4096) == [[0], [1]]
    # 200 and 100: together 100 positions of padding.
    assert cut([200, 100], 4096) == [[0, 1]]
    # 400, 390, 60, 50, 40: cut once, between 390 and 60.
    assert cut([60, 400, 50, 390, 40], 4096) == [[1, 3], [0, 2, 4]]
    # With a budget of 16,384 one more pass costs 16,384 / 32 = 512: 400 of padding is less, 600 is more.
    assert cut([1000, 600], 16384) == [[0, 1]]
    assert cut([1000, 400], 16384) == [[0], [1]]
    assert cut([1000, 600], 4096) == [[0], [1]]


def test_a_sum_over_a_long_response_is_exact_but_for_its_last_rounding() -> None:
    """-10.1 as a float32 is -10.1000003814697265625; 8,000 and 3,000 times that, rounded once."""
    rng = np.random.default_rng(0)
    pair = Pair(0, *(rng.integers(3, 9, n, dtype=np.int32) for n in (5, 8000, 3000)))
    batch = collate([pair], Draw("sum", 0, 0))
    chosen, rejected = by_response(batch, torch.full((11000,), -10.1))
    assert (chosen.item(), rejected.item()) == (np.float32(-80800.0030517578125), np.float32(-30300.0011444091796875))
    assert chosen.dtype == torch.float32
