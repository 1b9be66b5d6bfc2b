"""The loop: one update however it is cut, the same run however it is interrupted."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sampo_cli import batch, checkpoint, metrics
from sampo_cli.batch import Pair
from sampo_cli.config import Recipe
from sampo_cli.errors import Interrupted, NumericsError, UsageError
from sampo_cli.feed import Split
from sampo_cli.method_table import METHODS
from sampo_cli.model import load_policy
from sampo_cli.plan import resolve_recipe
from sampo_cli.signals import StopRequest
from sampo_cli.trainer import Trainer
from tests import tiny
from tests.reliability import record


class Silent:
    def note(self, text: str) -> None: ...
    def train_row(self, row: Any) -> None: ...
    def eval_row(self, row: Any) -> None: ...
    def generate_row(self, row: Any) -> None: ...


def make_pairs(count: int = 12) -> list[Pair]:
    """Chosen responses of token 50, rejected ones of token 60, of all lengths: learnt in a few steps."""
    rng = np.random.default_rng(0)
    return [
        Pair(
            i,
            rng.integers(3, 40, rng.integers(3, 30)).astype(np.int32),
            np.full(rng.integers(1, 20), 50, np.int32),
            np.full(rng.integers(1, 20), 60, np.int32),
        )
        for i in range(count)
    ]


def make_recipe(folder: Path, name: str = "sampo", **sections: dict[str, Any]) -> Recipe:
    train = {"batch_pairs": 4, "max_steps": 6, "learning_rate": 1e-2, "warmup_ratio": 0.0} | sections.pop("train", {})
    quantization = sections.pop("model", {"quantization": "none", "dtype": "float32"})
    return resolve_recipe(
        {
            "model": {"name": str(folder), **quantization},
            "data": {"sources": ["unused"]},
            "method": {"name": name} | sections.pop("method", {}),
            "train": train,
            **sections,
        }
    )


def make_trainer(recipe: Recipe, folder: Path, pairs: list[Pair] | None = None, held_out: int = 0) -> Trainer:
    policy, _ = load_policy(recipe.model, recipe.lora, seed=recipe.train.seed)
    pairs = pairs or make_pairs()
    folder.mkdir(exist_ok=True)
    split = Split(tiny.PairList(pairs), list(range(held_out, len(pairs))), list(range(held_out)), "row {}".format)
    identity = {"the data": str(len(pairs)), "the base": recipe.model.name}
    return Trainer(policy, split, recipe, METHODS[recipe.method.name], folder, Silent(), identity)


def adapter(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.raw_policy.named_parameters() if p.requires_grad}


def rows(trainer: Trainer, kind: str = "train") -> list[dict[str, Any]]:
    timing = ("seconds", "tokens_per_second", "memory_bytes")
    everything = metrics.read(trainer.folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in timing} for row in everything if row["kind"] == kind]


@pytest.mark.parametrize("method", ["dpo", "sampo"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_first_loss_is_ln_2_at_any_pair_of_lengths(
    tiny_llama: Path, tmp_path: Path, method: str, quantization: str
) -> None:
    trainer = make_trainer(make_recipe(tiny_llama, method, model={"quantization": quantization}), tmp_path / "run")
    row = trainer.train_step(list(range(12)), epoch=0)
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert row["margin"] == row["chosen_reward"] == row["rejected_reward"] == 0


def test_independent_sampling_has_margins_before_training(tiny_llama: Path, tmp_path: Path) -> None:
    """The released code's two draws: the sums run over different tokens of the longer response."""
    varied = [Pair(p.pair_id, p.prompt, p.chosen, np.arange(3, 3 + 30, dtype=np.int32)) for p in make_pairs()]
    recipe = make_recipe(tiny_llama, method={"sampling": "independent"})
    row = make_trainer(recipe, tmp_path / "run", varied).train_step(list(range(12)), epoch=0)
    assert abs(row["margin"]) > 0.01


@pytest.mark.parametrize("method", ["dpo", "sampo"])
def test_one_update_however_the_step_is_cut(
    tiny_llama: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 pairs in one forward pass, in several, and one by one."""
    monkeypatch.setattr(batch, "FORWARD_COST", 10**6)  # as few passes as the budget allows
    outcomes = []
    for budget in (10_000, 160, 1):
        recipe = make_recipe(tiny_llama, method, train={"tokens_per_microbatch": budget, "learning_rate": 1e-3})
        trainer = make_trainer(recipe, tmp_path / f"run{budget}")
        batches = list(trainer.feed.batches(range(12), 0))
        trainer.train_step(list(range(12)), epoch=0)
        row = trainer.train_step(list(range(12)), epoch=0)
        outcomes.append((len(batches), row["loss"], row["grad_norm"], adapter(trainer)))
    assert outcomes[0][0] == 1
    assert 1 < outcomes[1][0] < 12
    assert outcomes[2][0] == 12
    for _, loss, norm, weights in outcomes[1:]:
        assert loss == pytest.approx(outcomes[0][1], rel=1e-5)
        assert norm == pytest.approx(outcomes[0][2], rel=1e-4)
        for name, tensor in weights.items():
            # Adam divides by the gradient's own size, so compare what moved by 1e-3 a step at 1e-5.
            torch.testing.assert_close(tensor, outcomes[0][3][name], atol=2e-5, rtol=0)


def test_it_learns_and_the_reference_stays(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(make_recipe(tiny_llama, train={"max_steps": 12}), tmp_path / "run")
    trainer.fit(StopRequest())
    first, *_, last = rows(trainer)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["loss"] < 0.5 * first["loss"]
    assert last["accuracy"] == 1.0
    assert [row["step"] for row in rows(trainer)] == list(range(1, 13))


def test_interrupted_and_resumed_is_bitwise_the_uninterrupted_run(tiny_llama: Path, tmp_path: Path) -> None:
    """Also with LoRA dropout, whose random numbers must continue, and with NF4."""
    recipe = make_recipe(
        tiny_llama,
        model={"quantization": "nf4"},
        lora={"dropout": 0.1},
        train={"eval_every": 2, "save_every": 100, "scheduler": "cosine", "warmup_ratio": 0.2},
    )
    whole = make_trainer(recipe, tmp_path / "whole", held_out=3)
    whole.fit(StopRequest())

    first = make_trainer(recipe, tmp_path / "cut", held_out=3)
    stop = StopRequest()
    seen = []

    def stop_in_the_third_step(row: dict[str, Any]) -> None:
        seen.append(row["step"])
        if row["step"] == 3:
            stop.signal = signal.SIGTERM

    first.view.train_row = stop_in_the_third_step
    with pytest.raises(Interrupted, match="after step 3 of 6") as caught:
        first.fit(stop)
    assert caught.value.exit_code == 143
    assert f"--resume {tmp_path / 'cut'}" in caught.value.hint
    assert seen == [1, 2, 3]

    torch.manual_seed(12345)  # another process starts with other generators
    second = make_trainer(recipe, tmp_path / "cut", held_out=3)
    run, found = checkpoint.find(tmp_path / "cut")
    assert (run, found.name) == (tmp_path / "cut", "step-000003")
    second.restore(found)
    second.fit(StopRequest())

    for name, tensor in adapter(whole).items():
        assert torch.equal(adapter(second)[name], tensor), name
    for kind in ("train", "eval"):
        assert rows(second, kind) == rows(whole, kind)
    assert second.progress == whole.progress


def test_rows_after_the_checkpoint_are_forgotten_on_resume(tiny_llama: Path, tmp_path: Path) -> None:
    """A crash after step 4 with the last checkpoint at step 2."""
    recipe = make_recipe(tiny_llama, train={"save_every": 2, "max_steps": 6})
    trainer = make_trainer(recipe, tmp_path / "run")
    trainer.fit(StopRequest())
    log = tmp_path / "run" / "metrics.jsonl"
    with log.open("a") as file:
        file.write('{"kind": "train", "step": 7, "lo')  # cut off by the crash
    again = make_trainer(recipe, tmp_path / "run")
    again.restore(checkpoint.step_folder(tmp_path / "run", 4))
    assert [row["step"] for row in metrics.read(log)] == [1, 2, 3, 4]


def test_an_older_checkpoint_brings_its_own_past_and_no_future(tiny_llama: Path, tmp_path: Path) -> None:
    """Resuming from step 2 of 6: the better adapter of step 6 and the checkpoints after 2 belong to another run."""
    train = {"save_every": 2, "eval_every": 2, "max_steps": 6, "keep_checkpoints": 9}
    recipe = make_recipe(tiny_llama, train=train)
    run = tmp_path / "run"
    make_trainer(recipe, run, held_out=4).fit(StopRequest())
    best_of_2 = (run / "checkpoints" / "step-000002" / "best" / "adapter_model.safetensors").read_bytes()
    assert (run / "best" / "adapter_model.safetensors").read_bytes() != best_of_2
    again = make_trainer(recipe, run, held_out=4)
    again.restore(checkpoint.step_folder(run, 2))
    assert [folder.name for folder in checkpoint.all_checkpoints(run)] == ["step-000002"]
    assert (run / "best" / "adapter_model.safetensors").read_bytes() == best_of_2
    assert again.progress.best_row["step"] == 2


def test_a_resume_on_other_data_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_llama, train={"max_steps": 1})
    first = make_trainer(recipe, tmp_path / "run")
    first.identity = {"the data": "abc", "the base": "def"}
    first.fit(StopRequest())
    second = make_trainer(recipe, tmp_path / "run")
    second.identity = {"the data": "xyz", "the base": "def"}
    with pytest.raises(UsageError, match="cannot resume: the data changed since step-000001"):
        second.restore(checkpoint.step_folder(tmp_path / "run", 1))


def test_checkpoints_are_pruned_and_half_written_ones_never_found(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_llama, train={"save_every": 1, "keep_checkpoints": 2, "max_steps": 4})
    trainer = make_trainer(recipe, tmp_path / "run")
    trainer.fit(StopRequest())
    assert [folder.name for folder in checkpoint.all_checkpoints(tmp_path / "run")] == ["step-000003", "step-000004"]
    with pytest.raises(RuntimeError, match="power cut"), checkpoint.whole_folder(tmp_path / "run/checkpoints/step-9"):
        raise RuntimeError("power cut")
    assert checkpoint.find(tmp_path / "run")[1].name == "step-000004"
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


def test_the_best_adapter_is_the_one_with_the_lowest_held_out_loss(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_llama, train={"eval_every": 1, "max_steps": 5, "learning_rate": 0.3})
    trainer = make_trainer(recipe, tmp_path / "run", held_out=4)
    trainer.fit(StopRequest())
    losses = {row["step"]: row["loss"] for row in rows(trainer, "eval")}
    assert trainer.progress.best_row["step"] == min(losses, key=losses.get)
    assert (tmp_path / "run" / "best" / "adapter_model.safetensors").is_file()


def test_evaluation_repeats_exactly(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_llama, lora={"dropout": 0.5})
    trainer = make_trainer(recipe, tmp_path / "run", held_out=4)
    trainer.train_step([5, 6, 7], 0)
    assert trainer.evaluate().row() == trainer.evaluate().row()
    assert trainer.policy.training


def poisoned(base: Path, folder: Path, *broken: int, held_out: int = 0, **train: Any) -> Trainer:
    """Of 12 pairs those at `broken` have a token whose embedding is NaN in their chosen response."""
    pairs = make_pairs()
    for index in broken:
        pairs[index] = replace(pairs[index], chosen=np.full(5, 70, np.int32))
    trainer = make_trainer(make_recipe(base, train=train), folder, pairs, held_out=held_out)
    trainer.raw_policy.causal_lm.get_input_embeddings().weight.data[70] = float("nan")
    trainer.identity = {"the data": f"broken {broken}", "the base": "broken"}  # no reference for another test
    return trainer


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = poisoned(tiny_llama, tmp_path / "run", 3, 5)
    with pytest.raises(
        NumericsError, match=r"step 1: the loss is not finite for 2 of 4 pairs: row [35], row [35]\n"
    ) as e:
        trainer.train_step([2, 3, 4, 5], 0)
    assert "train.on_nonfinite=skip" in e.value.hint


def test_a_step_that_is_not_finite_is_skipped_and_counted(tiny_llama: Path, tmp_path: Path) -> None:
    """Pair 3 of 12 spoils one of the three steps of each of two epochs; the others are steps as ever."""
    trainer = poisoned(tiny_llama, tmp_path / "run", 3, on_nonfinite="skip", max_steps=6, scheduler="constant")
    notes: list[str] = []
    trainer.view.note = notes.append
    before, moved = adapter(trainer), []

    def watch(row: dict[str, Any]) -> None:
        now = adapter(trainer)
        moved.append(any(not torch.equal(before[name], now[name]) for name in now))
        before.update(now)

    trainer.view.train_row = watch
    trainer.prepare_reference()
    for step in range(6):
        trainer._advance(StopRequest())
        assert trainer.progress.step == step + 1
    skipped = [row["step"] for row in rows(trainer) if row["nonfinite"]]
    assert len(skipped) == 2
    assert moved == [row["step"] not in skipped for row in rows(trainer)]
    for row in rows(trainer):
        assert row["nonfinite"] == (row["step"] in skipped)
        assert (row["grad_norm"] is None) == (row["step"] in skipped)
        assert math.isfinite(row["loss"])  # of the pairs that have one
    assert trainer.progress.skipped == 2
    assert trainer.progress.skipped_in_a_row == 0 or skipped[-1] == 6
    warnings = [note for note in notes if note.startswith("warning: skipped step")]
    assert [int(note.split()[3].rstrip(":")) for note in warnings] == skipped
    assert all(note.endswith("the loss is not finite for 1 of 4 pairs: row 3") for note in warnings)
    record(f"{len(skipped)} of 6 steps skipped, counted and without effect")


def test_too_many_skipped_steps_in_a_row_stop_the_run(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = poisoned(tiny_llama, tmp_path / "run", *range(12), on_nonfinite="skip", nonfinite_limit=2)
    for _ in range(2):
        row = trainer.train_step([2, 3, 4, 5], 0)
        assert row["nonfinite"] == 4
        assert row["loss"] is None
    with pytest.raises(NumericsError, match="2 steps in a row were skipped; step 1: the loss is not finite for 4 of 4"):
        trainer.train_step([2, 3, 4, 5], 0)


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_gradient_that_is_not_finite(tiny_llama: Path, tmp_path: Path, action: str) -> None:
    recipe = make_recipe(tiny_llama, train={"on_nonfinite": action})
    trainer = make_trainer(recipe, tmp_path / "run")
    trainer.train_step([0, 1], 0)
    before = adapter(trainer)
    handle = trainer.parameters[0].register_hook(lambda gradient: gradient * math.inf)
    if action == "stop":
        with pytest.raises(NumericsError, match="step 1: the gradient is not finite; the pairs: row"):
            trainer.train_step([2, 3, 4, 5], 0)
        return
    row = trainer.train_step([2, 3, 4, 5], 0)
    assert row["nonfinite"] == row["pairs"] == 4
    assert row["grad_norm"] is None
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter(trainer).items())
    handle.remove()
    assert trainer.train_step([2, 3, 4, 5], 0)["nonfinite"] == 0
    assert (trainer.progress.skipped, trainer.progress.skipped_in_a_row) == (1, 0)


def test_an_evaluation_that_is_not_finite(tiny_llama: Path, tmp_path: Path) -> None:
    """It fails, or leaves those pairs out; the step before it is saved in both cases."""
    strict = poisoned(tiny_llama, tmp_path / "strict", 1, held_out=3, max_steps=2, eval_every=1)
    with pytest.raises(NumericsError, match="evaluation after step 1: the loss is not finite for 1 of 3 pairs: row 1"):
        strict.fit(StopRequest())
    assert checkpoint.find(tmp_path / "strict")[1].name == "step-000001"
    again = poisoned(tiny_llama, tmp_path / "strict", 1, held_out=3, max_steps=2, eval_every=1, on_nonfinite="skip")
    again.restore(checkpoint.find(tmp_path / "strict")[1])
    again.fit(StopRequest())
    assert [row["step"] for row in rows(again)] == [1, 2]
    assert [(row["step"], row["nonfinite"], row["pairs"]) for row in rows(again, "eval")] == [(1, 1, 3), (2, 1, 3)]
    assert all(math.isfinite(row["loss"]) for row in rows(again, "eval"))
    nothing = poisoned(
        tiny_llama, tmp_path / "nothing", 0, 1, 2, held_out=3, max_steps=2, eval_every=1, on_nonfinite="skip"
    )
    with pytest.raises(NumericsError, match="not finite for 3 of 3"):
        nothing.fit(StopRequest())


def test_another_budget_after_a_resume_changes_no_pair_and_no_position(tiny_llama: Path, tmp_path: Path) -> None:
    """12 pairs a step, in one forward pass and after the resume in several: the same pairs, order, kept tokens."""
    train = {"batch_pairs": 6, "max_steps": 4, "save_every": 2, "learning_rate": 1e-4}
    seen: dict[str, dict[Any, Any]] = {"one": {}, "other": {}}

    def watch(trainer: Trainer, name: str) -> Trainer:
        def look(step: tuple[int, tuple[int, ...]]) -> Any:
            made = list(make(step))
            ids = sorted(pair for batch in made for pair in batch.pair_ids.tolist())
            kept = {
                int(batch.pair_ids[owner // 2]) * 2 + owner % 2: torch.nonzero(batch.weights[batch.owner == owner])
                for batch in made
                for owner in range(2 * batch.pairs)
            }
            seen[name][step] = ids, {key: value.tolist() for key, value in kept.items()}, len(made)
            return iter(made)

        make, trainer.feed._make = trainer.feed._make, look
        return trainer

    one = watch(
        make_trainer(make_recipe(tiny_llama, train=train | {"tokens_per_microbatch": 4096}), tmp_path / "a"), "one"
    )
    one.fit(StopRequest())
    first = make_trainer(make_recipe(tiny_llama, train=train | {"tokens_per_microbatch": 4096}), tmp_path / "b")
    first.fit(StopRequest())
    other = make_trainer(make_recipe(tiny_llama, train=train | {"tokens_per_microbatch": 60}), tmp_path / "b")
    watch(other, "other").restore(checkpoint.step_folder(tmp_path / "b", 2))
    other.fit(StopRequest())
    assert len(seen["one"]) == 4
    assert len(seen["other"]) == 2
    for step, (ids, kept, batches) in seen["other"].items():
        assert (ids, kept, 1) == seen["one"][step]
        assert batches > 1
    for ours, theirs in zip(rows(other), rows(one), strict=True):
        for key in ("pairs", "kept_tokens", "response_tokens", "learning_rate"):
            assert ours[key] == theirs[key]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    record("from 1 forward pass a step to several")


def test_a_gradient_that_stays_zero_stops_the_run(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(make_recipe(tiny_llama), tmp_path / "run")
    for parameter in trainer.parameters:
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(NumericsError, match="exactly 0 for 3 steps"):
        trainer.fit(StopRequest())
    assert len(rows(trainer)) == 2


def test_a_reference_that_is_another_model_is_found_before_the_first_step(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(make_recipe(tiny_llama), tmp_path / "run")
    for name, parameter in trainer.raw_policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    with pytest.raises(NumericsError, match="policy and reference differ"):
        trainer.fit(StopRequest())


def test_sampo_equals_dpo_when_the_lengths_are_equal(tiny_llama: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    pairs = [Pair(i, *(rng.integers(3, 300, n).astype(np.int32) for n in (5, 4 + i, 4 + i))) for i in range(8)]
    for method in ("dpo", "sampo"):
        make_trainer(make_recipe(tiny_llama, method), tmp_path / method, pairs).fit(StopRequest())
    dpo, sampo = (metrics.read(tmp_path / method / "metrics.jsonl") for method in ("dpo", "sampo"))
    assert [row["loss"] for row in dpo] == [row["loss"] for row in sampo]


def test_the_metrics_row_holds_what_is_documented(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(make_recipe(tiny_llama, train={"max_steps": 1, "batch_pairs": 12}), tmp_path / "run")
    trainer.fit(StopRequest())
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    pairs = make_pairs()
    assert row["kept_tokens"] == sum(2 * min(len(p.chosen), len(p.rejected)) for p in pairs)
    assert row["response_tokens"] == sum(len(p.chosen) + len(p.rejected) for p in pairs)
    assert row["pairs"] == 12
    assert row["epoch"] == 1.0
    assert {"grad_norm", "learning_rate", "tokens_per_second", "memory_bytes", "seconds", "accuracy"} <= set(row)
