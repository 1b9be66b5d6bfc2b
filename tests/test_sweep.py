"""Sweeps: which runs there are, what is done for each state, a real one that is stopped, resumed and partly fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sampo_cli import sweep
from sampo_cli.api_sweep import Sweep
from sampo_cli.cache import entries
from sampo_cli.errors import ExitCode, UsageError
from sampo_cli.metrics import read
from sampo_cli.plain_yaml import parse_yaml
from sampo_cli.sweep_compare import caveats, ranked
from sampo_cli.sweep_plan import CONSENT, PlannedRun, as_text, plan_runs, read_axes, run_name, split_values, write_plan
from sampo_cli.sweep_runs import command_of, commands_to_run
from sampo_cli.tables_report import print_sweep
from tests.conftest import Sampo
from tests.test_report import write_run
from tests.warm import Warm

TREE: dict[str, Any] = {"model": {"name": "m"}, "data": {"sources": ["d"]}}


# Which runs there are -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.05,0.1", [0.05, 0.1]),
        ("1e-6, 5e-7", [1e-6, 5e-7]),
        ("cosine,linear", ["cosine", "linear"]),
        ("[q_proj,v_proj],all-linear", [["q_proj", "v_proj"], "all-linear"]),
        ("'a,b',c", ["a,b", "c"]),
        ("it's,fine", ["it's", "fine"]),
        ("null,8", [None, 8]),
    ],
)
def test_values_are_yaml_between_commas(text: str, values: list[Any]) -> None:
    assert split_values(text, "here") == values
    assert [parse_yaml(as_text(value), "as train's --set reads it") for value in values] == values


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["method.beta=0.1,"], "a value is missing in '0.1,'"),
        (["method.beta"], "expected section.key=value,value"),
        (["beta=0.1,0.2"], "expected section.key=value,value"),
        (["method.beta=0.1,0.2", "method.beta=0.3"], "is there twice"),
        (["method.beta=0.1,0.1"], "nothing varies"),
        ([], "nothing varies"),
        (["output.dir=a,b"], "each run has a folder of its own"),
        ({"method.beta": []}, "no values"),
    ],
)
def test_settings_that_are_no_sweep(settings: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_axes(settings)


def test_a_run_for_each_combination() -> None:
    """2 x 2 values and a fixed one: four runs, named by what varies, each with its command."""
    axes = read_axes(["method.beta=0.05,0.1", "train.scheduler=cosine", "train.learning_rate=1e-6,5e-7"])
    shared, runs = plan_runs(TREE, axes, Path("out"))
    assert [run.name for run in runs] == [
        f"method.beta={beta},train.learning_rate={rate}" for beta in ("0.05", "0.1") for rate in ("1e-06", "5e-07")
    ]
    assert shared.train.scheduler == "cosine"
    assert command_of(runs[1].words) == (
        "sampo train --recipe out/recipe.yaml --set method.beta=0.05 --set train.learning_rate=5e-07 "
        "--cache-reference on --output out/method.beta=0.05,train.learning_rate=5e-07"
    )
    assert (
        read_axes({"method.beta": [0.05, 0.1], "train.scheduler": "cosine", "train.learning_rate": [1e-6, 5e-7]})
        == axes
    )


def test_paths_are_whole_in_commands_and_short_in_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    _, runs = plan_runs(TREE, {"model.name": ["a", "./b"]}, Path("out"))
    assert [run.name for run in runs] == ["model.name=a", "model.name=.-b"]
    assert [run.words[4] for run in runs] == [f"model.name={tmp_path}/{name}" for name in "ab"]


def test_the_table_of_two_axes_fits_80_characters_unbroken(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {"loss": 0.69, "accuracy": 0.5, "margin": 0.1, "length_bias": -0.5, "kl_per_token": 0.02}
    settings = {"method.beta": 0.05, "train.learning_rate": 2e-05}
    run = {"settings": settings, "folder": "x", "state": "finished", "exit_code": None, "steps": 20, "seconds": 4000}
    print_sweep({"runs": [run | numbers], "metric": "loss", "notes": [], "report": None})
    words = capsys.readouterr().out.split()
    assert {"beta", "learning_", "2e-05", "accuracy", "margin", "seconds", "4,000", "finished"} <= set(words)


def test_the_reference_is_cached_where_there_is_one_and_nobody_said_no() -> None:
    _, runs = plan_runs(TREE, {"method.name": ["sampo", "simpo", "tdpo"]}, Path("out"))
    assert ["--cache-reference" in run.words for run in runs] == [True, False, False]
    _, runs = plan_runs({**TREE, "train": {"cache_reference": "off"}}, {"method.beta": [1, 2]}, Path("out"))
    assert not any("--cache-reference" in run.words for run in runs)


def test_code_of_a_model_is_allowed_on_each_command_line() -> None:
    """A recipe's file cannot allow it."""
    tree = {**TREE, "model": {"name": "m", "trust_remote_code": True}}
    _, runs = plan_runs(tree, {"method.beta": [0.1, 0.2]}, Path("out"))
    assert all(CONSENT in run.words for run in runs)


def test_every_recipe_is_checked_before_anything_runs() -> None:
    with pytest.raises(UsageError, match=r"(?s)the run with method\.beta=-1: .*greater than 0"):
        plan_runs(TREE, {"method.beta": [0.1, -1]}, Path("out"))
    with pytest.raises(UsageError, match="unknown key; did you mean 'beta'"):
        plan_runs(TREE, {"method.bta": [0.1, 0.2]}, Path("out"))


def test_names_are_those_of_folders() -> None:
    assert run_name({"model.name": "meta-llama/Llama-3", "lora.r": 8}) == "model.name=meta-llama-Llama-3,lora.r=8"
    assert len(run_name({"model.name": "x" * 400})) < 200
    assert run_name({"model.name": "x" * 400}) != run_name({"model.name": "x" * 401})
    with pytest.raises(UsageError, match="the same folder"):
        plan_runs(TREE, {"model.name": ["a/b", "a?b"]}, Path("out"))


# The folder and its plan ----------------------------------------------------------------------------------------------


def planned(folder: Path, tree: dict[str, Any], **axes: list[Any]) -> dict[str, Any]:
    named = {key.replace("_", ".", 1): values for key, values in axes.items()}
    shared, runs = plan_runs(tree, named, folder)
    folder.mkdir(exist_ok=True)
    return write_plan(folder, shared, list(named), runs)


def test_values_may_be_added_and_nothing_else_changed(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    planned(folder, TREE, method_beta=[0.1, 0.2])
    assert list(planned(folder, TREE, method_beta=[0.3, 0.2])["runs"]) == [f"method.beta=0.{n}" for n in (1, 2, 3)]
    with pytest.raises(UsageError, match=r"is a sweep with other train\.epochs"):
        planned(folder, {**TREE, "train": {"epochs": 7.0}}, method_beta=[0.1, 0.2])
    with pytest.raises(UsageError, match=r"is a sweep with other .*lora\.r"):
        planned(folder, TREE, lora_r=[8, 16])
    (folder / "sweep.json").write_text('{"format": 1, "runs": []}')
    with pytest.raises(UsageError, match="not a plan that this version wrote"):
        planned(folder, TREE, method_beta=[0.1, 0.2])


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UsageError, match="is there and is no sweep"):
        sweep(model="m", data="d", settings={"method.beta": [0.1, 0.2]}, output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    for place in (tmp_path / "mine.txt", tmp_path / "mine.txt" / "sweep"):
        with pytest.raises(UsageError, match=r"mine\.txt is no folder that can be written"):
            sweep(model="m", data="d", settings={"method.beta": [0.1, 0.2]}, output=place)


def test_what_is_done_for_each_state(tmp_path: Path) -> None:
    """Finished and running ones are left, failed ones too unless asked for; who has a checkpoint goes on from it."""
    codes = {"finished": 0, "interrupted": None, "failed": 6, "killed": -9, "early": 4, "new": None}
    for name, state in {
        "finished": "finished",
        "interrupted": "interrupted",
        "failed": "failed",
        "killed": "running",
    }.items():
        write_run(tmp_path / name, state=state)
        (tmp_path / name / "checkpoints" / "step-000001").mkdir(parents=True)
    runs = [PlannedRun(name, tmp_path / name, {}, ["train", name]) for name in codes]
    plan = {"runs": {name: {"settings": {}, "exit_code": code} for name, code in codes.items()}}
    todo = commands_to_run(runs, plan, retry_failed=False)
    assert todo == {
        "interrupted": ["train", "--resume", str(tmp_path / "interrupted")],
        "new": ["train", "new"],
    }
    again = commands_to_run(runs, plan, retry_failed=True)
    assert list(again) == ["interrupted", "failed", "killed", "early", "new"]
    assert again["early"] == ["train", "early"]
    assert again["killed"][:2] == ["train", "--resume"]
    trusting = PlannedRun("interrupted", tmp_path / "interrupted", {}, ["train", "--set", CONSENT])
    assert commands_to_run([trusting], plan, retry_failed=False)["interrupted"][3:] == ["--set", CONSENT]


def test_commands_of_which_none_is_left(sampo: Sampo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A script reads nothing from stdout, and a person hears why."""
    monkeypatch.setattr("sampo_cli.api_sweep.sweep", lambda **_: Sweep(tmp_path, "accuracy", []))
    words = ("sweep", "--model", "m", "--data", "d", "--set", "method.beta=0.1,0.2", "--print-commands")
    assert sampo(*words) == (0, "", "nothing is left to be run\n")


def test_the_best_is_first() -> None:
    runs = [
        {"name": name, "loss": loss, "accuracy": 1 - (loss or 0)}
        for name, loss in (("a", 0.5), ("b", None), ("c", 0.2))
    ]
    assert [run["name"] for run in ranked(runs, "loss")] == ["c", "a", "b"]
    assert [run["name"] for run in ranked([*runs[:1], *runs[2:]], "accuracy")] == ["c", "a"]
    assert len(caveats(["method.beta", "train.seed"], "loss")) == 2
    assert caveats(["train.learning_rate"], "loss") == []


# A real one -----------------------------------------------------------------------------------------------------------


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while not read(path) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert read(path), "the run did not come to its first step"


@pytest.mark.slow
def test_a_sweep_that_is_stopped_goes_on(
    warm: Warm, tiny_llama: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C saves the run that goes. The same command resumes it and runs the other, which finds the reference's
    log-probs and diverges. A third time nothing is left to do; a value more is one more run.
    """
    folder, cache = tmp_path / "out", tmp_path / "cache"
    first, second = folder / "train.learning_rate=0.0001", folder / "train.learning_rate=1e+30"
    words = ["sweep", "--model", tiny_llama, "--data", pairs_file, "--output", folder, "--json"]
    fixed = ("train.max_steps=16", "train.batch_pairs=4", "data.eval_fraction=0.2", "train.save_every=1")
    words += [word for setting in fixed for word in ("--set", setting)] + ["--set"]
    values = "train.learning_rate=1e-4,1e30"
    command = [sys.executable, "-m", "sampo_cli", *map(str, words), values]
    process = subprocess.Popen(command, env=os.environ | {"SAMPO_CACHE": str(cache)}, stderr=subprocess.PIPE)
    wait_for(first / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == ExitCode.INTERRUPTED, said.decode()
    assert json.loads((first / "summary.json").read_text())["state"] == "interrupted"
    assert not second.exists()
    assert b"the same command goes on with it" in said

    outcome = warm.run(*words, values, cache=cache)
    assert outcome.code == ExitCode.FAILURE, outcome.stderr
    assert f"1 of 2 runs are not finished: {second.name} (failed)" in outcome.stderr
    result = json.loads(outcome.stdout)
    best, worst = result["runs"]
    assert (best["folder"], best["state"], best["steps"]) == (str(first), "finished", 16)
    assert len(json.loads((first / "summary.json").read_text())["resumed"]) == 1
    assert (worst["folder"], worst["state"], worst["exit_code"]) == (str(second), "failed", ExitCode.NUMERICS)
    assert (folder / "report" / "report.html").is_file() == (result["report"] is not None)
    monkeypatch.setenv("SAMPO_CACHE", str(cache))
    assert [entry.state for entry in entries() if entry.kind == "reference"] == ["whole"]
    assert "reference: 24 of 24 pairs" in (first / "run.log").read_text()
    assert "reference: log-probs of 24 pairs from" in (second / "run.log").read_text()

    again = warm.run(*words, values, cache=cache)
    assert again.code == ExitCode.FAILURE
    assert "sweep: run" not in again.stderr
    more = warm.run(*words[:-1], "--print-commands", "--set", f"{values},2e-4", cache=cache)
    (left,) = json.loads(more.stdout)["commands"]
    assert left.endswith(f"--output {folder}/train.learning_rate=0.0002")
    retried = warm.run(*words[:-1], "--print-commands", "--retry-failed", "--set", values, cache=cache)
    assert json.loads(retried.stdout)["commands"] == [f"sampo train --resume {second}"]
