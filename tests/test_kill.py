"""kill -9 whenever it likes: the run goes on, and in the end it is, bit for bit, the one that nobody disturbed."""

from __future__ import annotations

import json
import random
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from sampo_cli import checkpoint, metrics
from tests import tiny
from tests.reliability import record
from tests.warm import Warm

KILLED = -9
TIMING = ("seconds", "tokens_per_second", "memory_bytes")
ROUNDS = (
    *("--batch-pairs", 4, "--max-steps", 3, "--iterations", 2, "--eval-fraction", 0.2, "--save-every", 1),
    *("--quantization", "none", "--cache-reference", "on", "--set", "train.eval_every=2", "--learning-rate", 1e-3),
    *("--set", "model.dtype=float32"),
)


class Setting:
    """One training: its flags, and a folder of its own for each time that it is run."""

    def __init__(self, warm: Warm, home: Path, model: Path, data: Path, *flags: object) -> None:
        self.warm, self.home = warm, home
        self.flags = ("train", "--model", model, "--data", data, *flags, "--output")
        self.numbers = count()

    def fresh(self) -> Path:
        """A run's folder that is not there yet, always of the same name; its caches are beside it."""
        place = self.home / str(next(self.numbers))
        place.mkdir(parents=True)
        return place / "run"

    def go(self, run: Path, **fault: Any) -> int:
        """Start, or go on where there is a checkpoint; the exit code."""
        resumable = any(checkpoint.all_checkpoints(run))
        command = ("train", "--resume", run) if resumable else (*self.flags, run)
        outcome = self.warm.run(*command, watch=[run.parent], cache=run.parent / "cache", **fault)
        assert outcome.code in (0, KILLED), outcome.stderr
        self.moments, self.seconds, self.stderr = outcome.moments, outcome.seconds, outcome.stderr
        return outcome.code

    def whole(self) -> Path:
        """A run that nobody disturbed."""
        run = self.fresh()
        assert self.go(run) == 0
        return run


@pytest.fixture(scope="module")
def setting(warm: Warm, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Two rounds of three steps with everything in them: cached references, evaluations, a checkpoint each step."""
    home = tmp_path_factory.mktemp("rounds")
    return Setting(warm, home, tiny_llama, tiny.write_pairs(home / "pairs.jsonl", 24), *ROUNDS)


@pytest.fixture(scope="module")
def whole(setting: Setting) -> tuple[Path, float, int]:
    """The undisturbed run, how many seconds it took, and how many moments it has."""
    run = setting.whole()
    return run, setting.seconds, setting.moments


def what_stays(run: Path) -> dict[str, Any]:
    """All that a run leaves, times and checkpoints aside; nothing half-written may be among it."""
    kept = {
        str(path.relative_to(run)): path.read_bytes()
        for name in ("adapter", "best", "rounds")
        for path in (run / name).rglob("*")
        if path.is_file()
    }
    for path in run.rglob(".*"):
        assert path.name == ".lock"
    rows = metrics.read(run / "metrics.jsonl")
    summary = json.loads((run / "summary.json").read_text())
    assert summary.pop("state") == "finished"
    for key in ("seconds", "resumed"):
        summary.pop(key)
    return {
        **kept,
        "metrics": [{key: value for key, value in row.items() if key not in TIMING} for row in rows],
        "summary": summary,
    }


def assert_nothing_half(run: Path) -> None:
    """What has a checkpoint's name is one."""
    for folder in checkpoint.all_checkpoints(run):
        assert checkpoint.damage(folder) is None


def finish(setting: Setting, run: Path) -> None:
    """Go on to the end; the pieces are then the whole."""
    assert_nothing_half(run)
    assert setting.go(run) == 0


def killed_at_random(setting: Setting, whole: tuple[Path, float, int], kills: int, seed: int) -> tuple[int, int]:
    """Runs that are killed again and again until they are through; kills survived and runs."""
    expected, chance, survived = what_stays(whole[0]), random.Random(seed), 0
    for runs in count(1):
        run = setting.fresh()
        while survived < kills and setting.go(run, kill_after=chance.uniform(0.2, 1.0) * whole[1]) == KILLED:
            survived += 1
            assert_nothing_half(run)
        finish(setting, run)
        assert what_stays(run) == expected
        shutil.rmtree(run.parent)
        if survived >= kills:
            return survived, runs
    raise AssertionError


def test_killed_at_random_times(setting: Setting, whole: tuple[Path, float, int]) -> None:
    assert killed_at_random(setting, whole, kills=4, seed=1)[0] == 4


@pytest.mark.long
def test_killed_at_fifty_random_times(setting: Setting, whole: tuple[Path, float, int]) -> None:
    kills, runs = killed_at_random(setting, whole, kills=50, seed=2)
    assert kills == 50
    record(f"{kills} random moments in {runs} runs, all bitwise the undisturbed run")


def killed_at_moments(setting: Setting, whole: tuple[Path, float, int], step: int) -> int:
    expected, tried = what_stays(whole[0]), 0
    for moment in range(1, whole[2], step):
        run = setting.fresh()
        if setting.go(run, kill=True, at=moment) == KILLED:
            tried += 1
        finish(setting, run)
        assert what_stays(run) == expected, moment
        shutil.rmtree(run.parent)
    return tried


def test_killed_in_the_middle_of_a_file_operation(setting: Setting, whole: tuple[Path, float, int]) -> None:
    """Five moments, evenly over a run's file operations: before a rename, after a write, while something is deleted."""
    assert killed_at_moments(setting, whole, whole[2] // 5) >= 5


@pytest.mark.long
def test_killed_at_every_third_file_operation(setting: Setting, whole: tuple[Path, float, int]) -> None:
    tried = killed_at_moments(setting, whole, 3)
    assert tried > 100
    record(f"before {tried} of the {whole[2]} file operations of a run, one at a time: bitwise the undisturbed run")


PHASES = {
    "when the folder is new": ("os.rename", ".recipe.yaml.tmp", 1),
    "in a checkpoint": ("open", ".step-000004.tmp", 4),
    "where a checkpoint is replaced": ("os.rename", ".step-000002.tmp", 2),
    "while an old checkpoint is deleted": ("os.rmdir", ".step-000001.tmp", 1),
    "in the best adapter": ("os.rename", ".best.tmp", 2),
    "between two rounds": ("os.rename", ".round-1.tmp", 1),
    "after the round's end": ("shutil.rmtree", ".round-1.tmp", 2),
    "in the final save": ("open", ".adapter.tmp", 3),
    "after the final save": ("os.rename", ".README.md.tmp", 1),
}


@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_each_phase(setting: Setting, whole: tuple[Path, float, int], phase: str) -> None:
    run = setting.fresh()
    event, path, at = PHASES[phase]
    assert setting.go(run, kill=True, event=event, path=path, at=at) == KILLED
    finish(setting, run)
    assert what_stays(run) == what_stays(whole[0])
    record(f"{phase}: bitwise the undisturbed run")


def test_killed_while_a_resume_goes_back(setting: Setting, whole: tuple[Path, float, int]) -> None:
    """A run that was killed, whose resume is killed at each thing that it does to the folder, and so on."""
    run = setting.fresh()
    assert setting.go(run, kill=True, event="os.rename", path=".step-000005.tmp", at=1) == KILLED
    for event, path in (("os.rename", ".metrics.jsonl.tmp"), ("os.rename", ".best.tmp"), ("open", ".recipe.yaml.tmp")):
        assert setting.go(run, kill=True, event=event, path=path, at=1) == KILLED
    finish(setting, run)
    assert what_stays(run) == what_stays(whole[0])
    resumed = json.loads((run / "summary.json").read_text())["resumed"]
    assert resumed == [{"step": 4, "changed": {}}]
    record("three resumes in a row, each while it goes back: bitwise")


MANY = (
    *("--batch-pairs", 4, "--max-steps", 1, "--eval-fraction", 0.5, "--quantization", "none"),
    *("--cache-reference", "on", "--set", "train.tokens_per_microbatch=128", "--set", "model.dtype=float32"),
)


@pytest.fixture(scope="module")
def slow(warm: Warm, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """260 pairs, half of them held out, in small forward passes: evaluations and reference take a while."""
    home = tmp_path_factory.mktemp("many")
    return Setting(warm, home, tiny_llama, tiny.write_pairs(home / "pairs.jsonl", 260), *MANY)


@pytest.fixture(scope="module")
def slow_whole(slow: Setting) -> Path:
    return slow.whole()


def test_killed_during_an_evaluation(slow: Setting, slow_whole: Path) -> None:
    """The step before it is saved, and the evaluation is made up for."""
    run = slow.fresh()
    after_the_save = {"event": "os.remove", "path": ".summary.json.tmp", "at": 2, "delay": 0.05}
    assert slow.go(run, kill=True, **after_the_save) == KILLED
    assert [(row["kind"], row["step"]) for row in metrics.read(run / "metrics.jsonl")] == [("train", 1)]
    state = torch.load(checkpoint.find(run)[1] / "state.pt", weights_only=True)
    assert state["progress"]["step"] == 1
    assert state["progress"]["evaluation_due"]
    finish(slow, run)
    assert what_stays(run) == what_stays(slow_whole)
    record("during an evaluation: no step lost, bitwise")


def test_killed_during_the_reference_pass(slow: Setting, slow_whole: Path) -> None:
    """Twice: in the first block of 256 pairs, and when it is written. The same command goes on from there."""
    run = slow.fresh()
    begun = {"event": "open", "path": "logps.bin", "at": 1}
    assert slow.go(run, kill=True, **begun, delay=0.05) == KILLED
    assert slow.go(run, kill=True, event="open", path="index.npy", at=1) == KILLED
    finish(slow, run)
    assert "reference: 260 of 260 pairs were done before" in slow.stderr
    assert what_stays(run) == what_stays(slow_whole)
    record("during the reference pass, twice: it goes on from there, bitwise")


def test_killed_during_a_merge(setting: Setting, whole: tuple[Path, float, int], tmp_path: Path) -> None:
    """Whenever it is killed there is no merged/ or a whole one, and merging again gives every byte."""
    expected = tmp_path / "expected"
    first = setting.warm.run("merge", whole[0], "--output", expected, "--json", watch=[tmp_path])
    assert first.code == 0, first.stderr
    survived = 0
    for moment in range(1, first.moments + 1, max(first.moments // 5, 1)):
        output = tmp_path / f"merged-{moment}"
        code = setting.warm.run("merge", whole[0], "--output", output, watch=[tmp_path], kill=True, at=moment).code
        survived += code == KILLED
        if not output.exists():
            again = setting.warm.run("merge", whole[0], "--output", output)
            assert again.code == 0, again.stderr
        assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in expected.iterdir())
        for path in expected.iterdir():
            assert (output / path.name).read_bytes() == path.read_bytes(), path.name
    assert survived >= 5
    assert not list(tmp_path.glob(".*"))
    record(f"during a merge, {survived} times: no half model, then every byte the same")
