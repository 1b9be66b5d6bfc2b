"""When a run ends early: metrics and their directions, drifting answers, names checked beforehand, resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sampo_cli import checkpoint
from sampo_cli import run as runs
from sampo_cli.config import StoppingConfig
from sampo_cli.console import RunView
from sampo_cli.early_stopping import AIMS, Waiting, reason, take_in
from sampo_cli.errors import UsageError
from sampo_cli.metrics import numbers, read
from sampo_cli.plan import make_plan, resolve_recipe
from sampo_cli.signals import StopRequest
from sampo_cli.trainer import Trainer
from tests.test_generation import answering
from tests.test_trainer import make_recipe, make_trainer, rows


def waited(metric: str, values: list[float | None], kind: str = "eval", **settings: Any) -> Waiting:
    """What is remembered after rows with these values of one metric."""
    waiting = Waiting()
    for value in values:
        outer, _, inner = metric.partition(".")
        row = {outer: {inner: value}} if inner else {outer: value}
        take_in(StoppingConfig(metric=metric, **settings), waiting, {"kind": kind, "length_ratio": 1.0, **row})
    return waiting


@pytest.mark.parametrize(
    ("metric", "values", "best", "rows"),
    [
        ("loss", [0.7, 0.6, 0.6, 0.65], 0.6, 2),  # lower is better, and equal is not
        ("accuracy", [0.5, 0.7, 0.6, 0.8], 0.8, 0),  # higher
        ("length_bias.spearman", [0.5, -0.2, 0.3, -0.4], -0.2, 2),  # nearer to 0
        ("loss", [0.7, None, 0.8], 0.7, 1),  # an evaluation that does not know it does not count
    ],
)
def test_directions(metric: str, values: list[float | None], best: float, rows: int) -> None:
    waiting = waited(metric, values)
    assert (waiting.best, waiting.rows) == (best, rows)


def test_the_length_ratio_is_best_at_1() -> None:
    """0.9, 1.3, 0.95, 1.2: distances 0.1, 0.3, 0.05, 0.2."""
    waiting, settings = Waiting(), StoppingConfig(metric="length_ratio")
    for ratio in (0.9, 1.3, 0.95, 1.2):
        take_in(settings, waiting, {"kind": "generate", "length_ratio": ratio})
    assert (waiting.best, waiting.rows, waiting.length_ratio) == (0.95, 1, 1.2)


def test_rows_of_another_kind_do_not_count() -> None:
    waiting, settings = Waiting(), StoppingConfig(metric="repetition", patience=1)
    for repetition in (0.1, 0.2):
        take_in(settings, waiting, {"kind": "eval", "loss": 0.5})
        take_in(settings, waiting, {"kind": "generate", "length_ratio": 1.0, "repetition": repetition})
    assert waiting.rows == 1


def test_reasons() -> None:
    settings = StoppingConfig(metric="loss", patience=2, max_length_drift=0.25)
    assert reason(settings, waited("loss", [0.5, 0.6])) is None
    assert reason(settings, waited("loss", [0.5, 0.6, 0.7])) == "loss was not better than 0.5 for 2 rows"
    assert reason(settings, Waiting(length_ratio=1.25)) is None
    assert reason(settings, Waiting(length_ratio=1.4)) == (
        "answers are 40% longer than the base's, and 25% is the most allowed"
    )
    assert "30% shorter" in str(reason(settings, Waiting(length_ratio=0.7)))
    assert reason(StoppingConfig(), Waiting(rows=99, length_ratio=9.0)) is None


def test_another_metric_begins_anew() -> None:
    waiting = waited("loss", [0.5, 0.6, 0.7])
    assert reason(StoppingConfig(metric="accuracy", patience=1), waiting) is None
    take_in(StoppingConfig(metric="accuracy", patience=1), waiting, {"kind": "eval", "accuracy": 0.5})
    assert (waiting.metric, waiting.best, waiting.rows) == ("accuracy", 0.5, 0)


def test_every_metric_is_in_its_rows_and_every_number_of_a_row_is_one(tiny_llama: Path, tmp_path: Path) -> None:
    """But for counts, and what says nothing of the adapter."""
    train = {"max_steps": 1, "generate": {"prompts": 2, "max_new_tokens": 4}}
    trainer = answering(make_recipe(tiny_llama, train=train), tmp_path / "run", held_out=10)
    trainer.fit(StopRequest())
    counts = {"step", "pairs", "prompts", "nonfinite", "kept_tokens", "response_tokens", "computed_tokens"}
    for kind, aims in AIMS.items():
        found = set(numbers(rows(trainer, kind)[-1]))
        expected = {name for name in found - counts if not name.endswith(".pairs") and not name.startswith("base_")}
        absent = {name for name in aims if ".buckets." in name}  # of an empty bucket nothing is known
        assert expected <= set(aims)
        assert set(aims) - expected <= absent


# Checked before anything is loaded -----------------------------------------------------------------------------------


def stopping(metric: str | None = None, method: str = "sampo", **train: Any) -> Any:
    drift = train.pop("max_length_drift", None)
    return resolve_recipe(
        {
            "model": {"name": "no such model"},
            "data": {"sources": ["none"]},
            "method": {"name": method},
            "train": {"early_stopping": {"metric": metric, "max_length_drift": drift}, **train},
        }
    )


ANSWERS = {"generate": {"prompts": 4}}


@pytest.mark.parametrize(
    ("metric", "options", "said"),
    [
        ("acuracy", {}, "there is no 'acuracy'; did you mean 'accuracy'?"),
        ("length_bias.spearmann", {}, "did you mean 'length_bias.spearman'?"),
        ("pairs", {}, "there is no 'pairs'"),
        ("repetition", {}, "train.early_stopping.metric: nothing is generated while training"),
        (None, {"max_length_drift": 0.2}, "train.early_stopping.max_length_drift: nothing is generated"),
        ("kl_per_token", {"method": "simpo"}, "no kl_per_token, as the method has no reference"),
    ],
)
def test_what_can_never_come_true_is_refused(metric: str | None, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        stopping(metric, **options)
    assert said in caught.value.message


def test_what_can_come_true_is_not() -> None:
    for metric in [name for aims in AIMS.values() for name in aims]:
        assert stopping(metric, max_length_drift=0.2, **ANSWERS).train.early_stopping.metric == metric


def test_a_metric_of_held_out_pairs_needs_some(tiny_llama: Path, pairs_file: Path) -> None:
    tree: dict[str, Any] = {
        "model": {"name": str(tiny_llama)},
        "data": {"sources": [str(pairs_file)], "eval_fraction": 0.0},
        "train": {"early_stopping": {"metric": "loss"}},
    }
    with pytest.raises(UsageError, match="loss needs pairs held out"):
        make_plan(resolve_recipe(tree), RunView(quiet=True))


# In a run -----------------------------------------------------------------------------------------------------------


def never_better(folder: Path, tiny_llama: Path, **stopping: Any) -> Trainer:
    """So high a rate that the held-out loss rises after the first steps."""
    train = {"max_steps": 12, "eval_every": 1, "learning_rate": 0.5, "early_stopping": {"metric": "loss", **stopping}}
    return make_trainer(make_recipe(tiny_llama, train=train), folder, held_out=4)


def test_a_run_stops_and_says_why(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = never_better(tmp_path / "run", tiny_llama, patience=2)
    trainer.fit(StopRequest())
    losses = [row["loss"] for row in rows(trainer, "eval")]
    assert trainer.progress.step == len(losses) < 12
    assert all(loss >= min(losses[:-2]) for loss in losses[-2:])
    assert losses.index(min(losses)) == len(losses) - 3
    assert trainer.stopped_early() == f"loss was not better than {min(losses):.4g} for 2 rows"


def test_patience_survives_a_resume_and_a_stopped_run_may_be_given_more(tiny_llama: Path, tmp_path: Path) -> None:
    whole = never_better(tmp_path / "whole", tiny_llama, patience=2)
    whole.fit(StopRequest())
    end = whole.progress.step
    again = never_better(tmp_path / "whole", tiny_llama, patience=2)
    again.restore(checkpoint.step_folder(tmp_path / "whole", end - 1))
    assert again.progress.stopping.rows == 1
    again.fit(StopRequest())
    assert again.progress == whole.progress
    more = never_better(tmp_path / "whole", tiny_llama, patience=3)
    more.restore(checkpoint.step_folder(tmp_path / "whole", end))
    assert more.stopped_early() is None
    more.fit(StopRequest())
    assert more.progress.step > end


def test_a_run_that_reached_its_end_did_not_stop_early(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = never_better(tmp_path / "run", tiny_llama, patience=2)
    trainer.steps = 1
    trainer.progress.step, trainer.progress.stopping = 1, Waiting("loss", 0.1, 9)
    assert trainer.stopped_early() is None


def test_answers_that_drift_in_length_end_a_run(tiny_llama: Path, tmp_path: Path) -> None:
    """Chosen responses are made of token 50, which ends an answer here; the base fills the cap of 8 tokens."""
    train: dict[str, Any] = {"max_steps": 12, "eval_every": 1, "generate": {"prompts": 3, "max_new_tokens": 8}}
    train |= {"early_stopping": {"max_length_drift": 0.5}, "learning_rate": 3e-2}
    trainer = answering(make_recipe(tiny_llama, method={"sft_weight": 2.0}, train=train), tmp_path / "run")
    trainer.answers.ends = (50,)
    trainer.fit(StopRequest())
    ratios = [row["length_ratio"] for row in rows(trainer, "generate")]
    assert ratios[0] == 1.0
    assert all(abs(ratio - 1) <= 0.5 for ratio in ratios[:-1])
    assert ratios[-1] < 0.5
    assert trainer.progress.step == len(ratios) - 1 < 12
    assert trainer.stopped_early() == (
        f"answers are {1 - ratios[-1]:.0%} shorter than the base's, and 50% is the most allowed"
    )
    assert [row["step"] for row in rows(trainer, "eval")] == list(range(1, len(ratios)))


def test_a_whole_run_says_it_in_its_summary_and_goes_on_with_more_patience(
    tiny_llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    tree = {
        "model": {"name": str(tiny_llama)},
        "data": {"sources": [str(pairs_file)], "eval_fraction": 0.2},
        "train": {
            **{"max_steps": 9, "batch_pairs": 4, "eval_every": 1, "learning_rate": 0.5, "warmup_ratio": 0.0},
            "early_stopping": {"metric": "accuracy", "patience": 1},
            "generate": {"prompts": 2, "max_new_tokens": 4},
        },
    }
    view = RunView(quiet=True)
    summary = runs.train(resolve_recipe(tree), view, tmp_path / "run")
    view.close()
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["state"] == "finished"
    assert summary["steps"]["done"] < 9
    assert summary["stopped_early"].startswith("accuracy was not better than")
    assert f"stopped early, after step {summary['steps']['done']}: accuracy" in (tmp_path / "run/run.log").read_text()
    generated = [row for row in read(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "generate"]
    kept = next(row for row in generated if row["step"] == summary["adapter_step"])
    assert summary["generated"] == {
        "prompts": 2, "base_tokens": kept["base_tokens"], "adapter_tokens": kept["tokens"],
    }  # fmt: skip
    asked = {json.loads(line)["prompt"] for line in pairs_file.read_text().splitlines()}
    assert {row["prompt"] for row in read(tmp_path / "run" / "generations.jsonl")} < asked
    changes = {"train": {"early_stopping": {"patience": 50}}}
    recipe, found = runs.resume(tmp_path / "run", changes)
    assert recipe.train.early_stopping == StoppingConfig(metric="accuracy", patience=50)
    view = RunView(quiet=True)
    longer = runs.train(recipe, view, tmp_path / "run", found)
    view.close()
    assert (longer["steps"]["done"], longer["stopped_early"]) == (9, None)
    with pytest.raises(UsageError, match=r"train\.generate"):
        runs.resume(tmp_path / "run", {"train": {"generate": {"seed": 3}}})
