"""Every method through the loop, and rounds of iterative training."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from sampo_cli import checkpoint
from sampo_cli.config import IterationsConfig
from sampo_cli.errors import Interrupted, UsageError
from sampo_cli.lora import save_adapter
from sampo_cli.method_table import METHODS
from sampo_cli.policy import reference
from sampo_cli.rounds import round_parts
from sampo_cli.signals import StopRequest
from tests.test_trainer import adapter, make_recipe, make_trainer, rows

TWO_ROUNDS = {"iterations": {"count": 2}, "output": {"keep": "final"}}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    train = {"max_steps": 8, "batch_pairs": 12, "learning_rate": 3e-3}
    trainer = make_trainer(make_recipe(tiny_llama, method, train=train), tmp_path / "run", held_out=2)
    trainer.fit(StopRequest())
    losses = [row["loss"] for row in rows(trainer)]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert rows(trainer)[-1]["accuracy"] >= 0.5


def test_reference_free_methods_compute_no_reference(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(make_recipe(tiny_llama, "simpo"), tmp_path / "run")
    monkeypatch.setattr(trainer.raw_policy, "adapted", None)
    trainer.train_step([0, 1, 2], 0)
    other = make_trainer(make_recipe(tiny_llama, "dpo"), tmp_path / "dpo")
    monkeypatch.setattr(other.raw_policy, "adapted", None)
    with pytest.raises(TypeError):
        other.train_step([0, 1, 2], 0)


@pytest.mark.parametrize("reduction", ["sum", "sample", "mean"])
def test_the_likelihood_is_of_the_whole_chosen_response(tiny_llama: Path, tmp_path: Path, reduction: str) -> None:
    """On a fresh adapter DPO's loss is ln 2, so what is above it is sft_weight times the likelihood."""
    method = {"reduction": reduction, "sft_weight": 0.5}
    trainer = make_trainer(make_recipe(tiny_llama, "dpo", method=method), tmp_path / "run")
    row = trainer.train_step(list(range(12)), 0)
    plain = make_trainer(make_recipe(tiny_llama, "dpo"), tmp_path / "plain")
    expected = []
    with torch.no_grad():
        for batch in plain.feed.batches(range(12), 0):
            logps = plain.policy(batch)
            sums = torch.zeros(2 * batch.pairs).index_add(0, batch.owner, logps)[0::2]
            expected += (-sums / batch.lengths[0::2]).tolist()
    assert row["loss"] == pytest.approx(math.log(2) + 0.5 * float(np.mean(expected)), rel=1e-5)


def test_tdpo_sees_the_kl_that_the_vocabulary_gives(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(make_recipe(tiny_llama, "tdpo"), tmp_path / "run")
    torch.manual_seed(1)
    for name, parameter in trainer.raw_policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    (batch,) = list(trainer.feed.batches(range(2), 0))[:1]
    scores = trainer.objective.measure(batch).scores
    model = trainer.raw_policy.causal_lm
    with torch.no_grad():
        masks = {"attention_mask": trainer.raw_policy.masks(batch), "position_ids": batch.position_ids}
        policy = model(batch.input_ids, **masks).logits.flatten(0, 1)[batch.positions].log_softmax(-1)
        with reference(trainer.raw_policy):
            base = model(batch.input_ids, **masks).logits.flatten(0, 1)[batch.positions].log_softmax(-1)
    kl = (base.exp() * (base - policy)).sum(-1)
    sums = torch.zeros(2 * batch.pairs).index_add(0, batch.owner, kl)
    torch.testing.assert_close(scores.chosen_kl, sums[0::2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores.rejected_kl, sums[1::2], atol=1e-4, rtol=1e-4)
    assert scores.rejected_kl.requires_grad


@pytest.mark.parametrize("method", ["bco-pair", "kto-pair"])
def test_what_earlier_rewards_decide_survives_a_resume_and_ignores_evaluations(
    tiny_llama: Path, tmp_path: Path, method: str
) -> None:
    train = {"max_steps": 6, "eval_every": 1, "save_every": 3, "keep_checkpoints": 9}
    recipe = make_recipe(tiny_llama, method, train=train)
    whole = make_trainer(recipe, tmp_path / "whole", held_out=4)
    whole.fit(StopRequest())
    assert any(value != 0 for value in whole.objective.memory.options().values())
    unseen = make_trainer(
        make_recipe(tiny_llama, method, train=train | {"eval_every": 6}), tmp_path / "one", held_out=4
    )
    unseen.fit(StopRequest())
    assert unseen.objective.memory.options() == whole.objective.memory.options()
    again = make_trainer(recipe, tmp_path / "whole", held_out=4)
    again.restore(checkpoint.step_folder(tmp_path / "whole", 3))
    again.fit(StopRequest())
    assert again.objective.memory.options() == whole.objective.memory.options()
    assert all(torch.equal(adapter(again)[name], tensor) for name, tensor in adapter(whole).items())


def test_two_rounds_equal_two_runs_joined_by_the_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    train = {"max_steps": 3, "batch_pairs": 4}
    joined = make_trainer(make_recipe(tiny_llama, train=train, **TWO_ROUNDS), tmp_path / "joined")
    joined.fit(StopRequest())
    assert [row["step"] for row in rows(joined)] == [1, 2, 3, 4, 5, 6]

    first = make_trainer(make_recipe(tiny_llama, train=train), tmp_path / "first")
    first.fit(StopRequest())
    (tmp_path / "sft").mkdir()
    save_adapter(first.raw_policy, tmp_path / "sft")
    going_on = {"quantization": "none", "dtype": "float32", "adapter": str(tmp_path / "sft")}
    second = make_trainer(make_recipe(tiny_llama, train=train, model=going_on), tmp_path / "second")
    second.fit(StopRequest())

    losses = [row["loss"] for row in rows(joined)]
    assert losses == [row["loss"] for row in rows(first)] + [row["loss"] for row in rows(second)]
    assert losses[3] == pytest.approx(math.log(2), abs=1e-6)
    kept = (tmp_path / "joined" / "rounds" / "round-1" / "adapter_model.safetensors").read_bytes()
    assert kept == (tmp_path / "sft" / "adapter_model.safetensors").read_bytes()
    (batch,) = list(joined.feed.batches([0], 0))
    with reference(joined.raw_policy):
        ours = joined.raw_policy(batch)
    with torch.no_grad():
        assert torch.equal(ours, first.raw_policy(batch))


@pytest.mark.parametrize("schedule", ["restart", "continue"])
@pytest.mark.parametrize("at", [2, 3, 4, 5])
def test_resume_inside_and_between_rounds_is_exact(tiny_llama: Path, tmp_path: Path, at: int, schedule: str) -> None:
    """Two rounds of three steps: stopped within the first, at its end, and within the second."""
    iterations = {"count": 2, "schedule": schedule, "data": "split"}
    train = {"epochs": 2.0, "max_steps": None, "batch_pairs": 4, "eval_every": 1}
    recipe = make_recipe(tiny_llama, train=train, iterations=iterations)
    whole = make_trainer(recipe, tmp_path / "whole", held_out=2)
    whole.fit(StopRequest())
    cut = make_trainer(recipe, tmp_path / "cut", held_out=2)
    stop = StopRequest()

    def ask(row: dict) -> None:
        stop.signal = signal.SIGINT if row["step"] == at else stop.signal

    cut.view.train_row = ask
    with pytest.raises(Interrupted):
        cut.fit(stop)
    again = make_trainer(recipe, tmp_path / "cut", held_out=2)
    again.restore(checkpoint.find(tmp_path / "cut")[1])
    again.fit(StopRequest())
    assert rows(again) == rows(whole)
    assert rows(again, "eval") == rows(whole, "eval")
    assert all(torch.equal(adapter(again)[name], tensor) for name, tensor in adapter(whole).items())
    assert again.progress == whole.progress


def test_rates_restart_with_each_round_or_run_through(tiny_llama: Path, tmp_path: Path) -> None:
    rates = {}
    for schedule in ("restart", "continue"):
        iterations = {"count": 2, "schedule": schedule}
        recipe = make_recipe(tiny_llama, train={"max_steps": 2, "learning_rate": 0.01}, iterations=iterations)
        trainer = make_trainer(recipe, tmp_path / schedule)
        trainer.fit(StopRequest())
        rates[schedule] = [row["learning_rate"] for row in rows(trainer)]
    assert rates["restart"] == pytest.approx([0.01, 0.005, 0.01, 0.005])
    assert rates["continue"] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_split_rounds_see_every_pair_once() -> None:
    train = list(range(10, 21))
    parts = round_parts(train, IterationsConfig(count=3, data="split"), seed=0)
    assert sorted(index for part in parts for index in part) == train
    assert [len(part) for part in parts] == [4, 4, 3]
    assert round_parts(train, IterationsConfig(count=2), seed=0) == [train, train]


def test_rounds_need_a_reference(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match="simpo has no reference"):
        make_recipe(tiny_llama, "simpo", iterations={"count": 2})
