"""Micro-batches put together ahead, and the budget that is tried before training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sampo_cli.batch import Draw, micro_batches, row_positions
from sampo_cli.budget import largest_that_fits, worst_groups
from sampo_cli.errors import OutOfMemory
from sampo_cli.feed import Feed
from sampo_cli.signals import StopRequest
from tests import tiny
from tests.test_trainer import adapter, make_pairs, make_recipe, make_trainer

CPU = torch.device("cpu")


def make_feed(tokens: int = 100, most_pairs: int | None = None) -> Feed:
    return Feed(tiny.PairList(make_pairs()), "shared", lambda e: Draw("sample", 0, e), CPU, tokens, most_pairs)


def test_what_was_put_together_ahead_is_what_would_have_been() -> None:
    feed = make_feed()
    feed.look_ahead([1, 2, 3, 4], 1)
    feed.look_ahead([5, 6], 1)
    ahead = list(feed.batches([1, 2, 3, 4], 1))
    fresh = list(make_feed().batches([1, 2, 3, 4], 1))
    assert len(ahead) == len(fresh) > 1
    for one, other in zip(ahead, fresh, strict=True):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("input_ids", "weights", "owner"))


def test_another_epoch_is_not_taken_from_what_lies_ready() -> None:
    feed = make_feed()
    feed.look_ahead(range(12), 1)
    kept = {e: torch.cat([b.positions for b in feed.batches(range(12), e)]).tolist() for e in (2, 1)}
    assert kept[1] != kept[2]


def test_an_error_in_the_worker_reaches_the_loop() -> None:
    feed = make_feed()
    feed.look_ahead([99], 0)
    with pytest.raises(IndexError):
        next(feed.batches([99], 0))


def test_most_pairs_limits_every_micro_batch() -> None:
    sizes = [batch.pairs for batch in make_feed(10_000, 3).batches(range(12), 0)]
    assert max(sizes) == 3
    assert sum(sizes) == 12


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_row_positions_are_those_of_the_batch(layout: str) -> None:
    pairs = tiny.PairList(make_pairs())
    feed = Feed(pairs, layout, lambda e: Draw("sum", 0, e), CPU, 1, None)
    assert row_positions(pairs, layout).tolist() == [feed.group([i]).input_ids.numel() for i in range(12)]


@pytest.mark.parametrize("tokens", [1, 60, 150, 400, 10_000])
@pytest.mark.parametrize("most", [1, 3, 12])
def test_no_micro_batch_of_any_step_is_worse_than_those_that_are_tried(tokens: int, most: int) -> None:
    pairs = make_pairs(40)
    widths = row_positions(tiny.PairList(pairs), "shared")
    tried = [widths[group].max() * len(group) for group in worst_groups(widths, tokens, most)]
    assert widths[worst_groups(widths, tokens, most)[0]].max() == widths.max()
    rng = np.random.default_rng(0)
    for _ in range(50):
        step = [pairs[index] for index in rng.permutation(40)[:12]]
        for group in micro_batches(step, tokens, "shared", most):
            assert len(group) * max(pair.row_lengths("shared")[0] for pair in group) <= max(tried)


def test_the_budget_is_halved_until_it_fits() -> None:
    asked = []

    def attempt(tokens: int) -> None:
        asked.append(tokens)
        if tokens > 1000:
            raise torch.OutOfMemoryError("no")

    assert largest_that_fits(4096, 300, attempt, halve=True) == 512
    assert asked == [4096, 2048, 1024, 512]
    with pytest.raises(OutOfMemory, match="a micro-batch of 4096 positions does not fit"):
        largest_that_fits(4096, 300, attempt, halve=False)
    with pytest.raises(OutOfMemory, match="not even one pair fits; the longest has 3000 positions") as caught:
        largest_that_fits(4096, 3000, attempt, halve=True)
    assert "--max-length" in caught.value.hint


def test_other_errors_are_not_taken_for_memory() -> None:
    def attempt(tokens: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        largest_that_fits(4096, 1, attempt, halve=True)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_trial_leaves_no_trace(tiny_llama: Path, tmp_path: Path, dropout: float) -> None:
    """Budget given and equal to the one that is found: trained bit by bit alike, with random numbers in use."""
    recipe = make_recipe(tiny_llama, lora={"dropout": dropout})
    trainer = make_trainer(recipe, tmp_path / "tried")
    before, state = adapter(trainer), torch.get_rng_state()
    trainer.find_budget()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter(trainer).items())
    assert all(parameter.grad is None for parameter in trainer.parameters)
    assert trainer.optimizer.state_dict()["state"] == {}
    assert trainer.progress.tokens_per_microbatch == 4096


def test_out_of_memory_in_the_trial_lowers_the_budget_of_the_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward pass above 210 positions fails as torch does without memory."""
    trainer = make_trainer(make_recipe(tiny_llama, train={"batch_pairs": 12, "max_steps": 2}), tmp_path / "run")
    trainer.feed.tokens = 800
    forward = trainer.policy.forward

    def small(batch, *rest):
        if batch.input_ids.numel() > 210:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return forward(batch, *rest)

    monkeypatch.setattr(trainer.policy, "forward", small)
    trainer.fit(StopRequest())
    assert trainer.progress.tokens_per_microbatch == 200
    assert trainer.progress.step == 2
