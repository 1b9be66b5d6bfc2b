"""What a machine does to a run: signals, a closed terminal, a full disk, no memory, a second run, a dead tracker."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sampo_cli import checkpoint, metrics
from sampo_cli.console import RunView
from sampo_cli.errors import ExitCode, SampoError, UsageError
from sampo_cli.lock import held, refuse_held
from sampo_cli.metrics import append
from tests import tiny
from tests.reliability import record
from tests.test_kill import Setting, what_stays
from tests.warm import Outcome, Warm, fill

FLAGS = (
    *("--batch-pairs", 4, "--max-steps", 2, "--iterations", 2, "--save-every", 1, "--eval-fraction", 0.2),
    *("--quantization", "none", "--cache-reference", "on", "--learning-rate", 1e-3, "--set", "train.eval_every=2"),
    *("--set", "model.dtype=float32", "--set", "train.checkpointing=none"),
)
NEXT_STEP = {"event": "open", "path": "metrics.jsonl"}
"""Among others, the moment when a step's row is written."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 24)


@pytest.fixture(scope="module")
def setting(warm: Warm, tiny_llama: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Two rounds of two steps, with everything that a run writes."""
    return Setting(warm, tmp_path_factory.mktemp("a place with blanks"), tiny_llama, pairs, *FLAGS)


@pytest.fixture(scope="module")
def expected(setting: Setting) -> dict[str, object]:
    return what_stays(setting.whole())


def struck(setting: Setting, run: Path, **fault: object) -> Outcome:
    """A new run with a fault."""
    return setting.warm.run(*setting.flags, run, watch=[run.parent], cache=run.parent / "cache", **fault)


def state(run: Path) -> str:
    return str(json.loads((run / "summary.json").read_text())["state"])


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.TERMINATED), (signal.SIGHUP, ExitCode.HANGUP)],
)
def test_a_signal_finishes_the_step_and_saves(
    setting: Setting, expected: dict[str, object], number: int, code: ExitCode
) -> None:
    """In the middle of step 1: the step is finished, and the command to go on with can be pasted."""
    run = setting.fresh()
    outcome = struck(setting, run, signals=[number], event="open", path="logps.bin", at=2)
    assert outcome.code == code == 128 + number
    assert outcome.stderr.count("finishing this step, then saving") == 1
    assert "stopped after step 1 of 4; everything so far is saved" in outcome.stderr
    (command,) = [line.partition("go on with: ")[2] for line in outcome.stderr.splitlines() if "go on with: " in line]
    assert shlex.split(command) == ["sampo", "train", "--resume", str(run)]
    assert state(run) == "interrupted"
    again = setting.warm.run(*shlex.split(command)[1:], cache=run.parent / "cache")
    assert again.code == 0, again.stderr
    assert what_stays(run) == expected
    record(f"{signal.Signals(number).name}: exit code {code.value}, resumed bitwise")


def test_a_second_signal_leaves_at_once(setting: Setting, expected: dict[str, object]) -> None:
    """In the middle of writing a checkpoint: the one before it is whole, and nothing half-written stays."""
    run = setting.fresh()
    two = [signal.SIGINT, signal.SIGTERM]
    outcome = struck(setting, run, signals=two, event="open", path=".step-000003.tmp/checkpoint.json", at=1)
    assert outcome.code == ExitCode.INTERRUPTED
    assert "left at once" in outcome.stderr
    assert [folder.name for folder in checkpoint.all_checkpoints(run)] == ["step-000001", "step-000002"]
    assert not list((run / "checkpoints").glob(".*"))
    assert state(run) == "interrupted"
    assert setting.go(run) == 0
    assert what_stays(run) == expected
    record("a second one inside a checkpoint: left at once, resumed bitwise")


def test_a_signal_does_not_wait_for_an_evaluation(setting: Setting, expected: dict[str, object]) -> None:
    """It comes when step 2 has been saved: the evaluation that is due then is left to the resumed run."""
    run = setting.fresh()
    outcome = struck(setting, run, signals=[signal.SIGTERM], event="os.remove", path=".summary.json.tmp", at=3)
    assert outcome.code == ExitCode.TERMINATED
    assert [row["kind"] for row in metrics.read(run / "metrics.jsonl")] == ["train", "train"]
    assert setting.go(run) == 0
    assert what_stays(run) == expected
    record("SIGTERM before an evaluation: not waited for, made up for by the resume")


def test_what_nohup_ignores_stays_ignored(setting: Setting, expected: dict[str, object]) -> None:
    run = setting.fresh()
    outcome = struck(setting, run, ignored=[signal.SIGHUP], signals=[signal.SIGHUP], **NEXT_STEP, at=2)
    assert outcome.code == 0
    assert what_stays(run) == expected


def test_a_terminal_that_is_closed(setting: Setting, expected: dict[str, object]) -> None:
    """A real one: SIGHUP comes, and nothing can be written to it any more. The run saves itself all the same."""
    run = setting.fresh()
    outcome = struck(setting, run, terminal=True, **NEXT_STEP, at=2)
    assert outcome.code == ExitCode.HANGUP
    assert state(run) == "interrupted"
    assert "finishing this step, then saving" in (run / "run.log").read_text()
    assert setting.go(run) == 0
    assert what_stays(run) == expected
    record("a real terminal closed: saved, exit code 129, resumed bitwise")


def test_a_pipe_that_nobody_reads_any_more(setting: Setting, expected: dict[str, object]) -> None:
    """`sampo train 2>&1 | head -1`: the run goes on, and its exit code is its own."""
    run = setting.fresh()
    outcome = struck(setting, run, deaf=True)
    assert outcome.code == 0
    assert what_stays(run) == expected
    assert "step 4/4" in (run / "run.log").read_text()


# A full disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts small file systems, where the machine lets us."""
    mounted = []

    def mount(size: str, name: str = "disk") -> Path:
        place = tmp_path / name
        place.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("cannot mount a small file system here")
        mounted.append(place)
        return place

    yield mount
    for place in reversed(mounted):
        subprocess.run(["umount", "-l", str(place)], check=True)


WRITES = {
    "the recipe": ("open", ".recipe.yaml.tmp", 1, 0, "recipe.yaml"),
    "the reference": ("open", "logps.bin", 1, 0, "reference/.building-"),
    "a row": ("open", "metrics.jsonl", 1, 0, "metrics.jsonl"),
    "a checkpoint": ("os.mkdir", ".step-000002.tmp", 1, 0, "checkpoints/step-000002"),
    "half a checkpoint's weights": ("os.mkdir", ".step-000002.tmp", 1, 70_000, "checkpoints/step-000002"),
    "half a checkpoint's state": ("os.mkdir", ".step-000002.tmp", 1, 250_000, "checkpoints/step-000002"),
    "the summary": ("open", ".summary.json.tmp", 3, 0, "summary.json"),
    "the best adapter": ("os.mkdir", ".best.tmp", 1, 0, "best"),
    "the round's reference": ("os.mkdir", ".round-1.tmp", 1, 0, "rounds/round-1"),
    "the final adapter": ("os.mkdir", ".adapter.tmp", 1, 0, "adapter"),
    "the model card": ("open", ".README.md.tmp", 1, 0, "README.md"),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_disk_that_fills_up(
    setting: Setting, expected: dict[str, object], disk: Callable[[str], Path], what: str
) -> None:
    """The message names the file; what was there is untouched; with room again the run is the whole run."""
    event, path, at, left, named = WRITES[what]
    place = disk("12m")
    run, filler = place / "run", place / "filler"
    fault = {"event": event, "path": path, "at": at, "fill": str(filler), "left": left}
    outcome = struck(setting, run, **fault)
    assert outcome.code == ExitCode.FAILURE, outcome.stderr
    assert "Traceback" not in outcome.stderr
    (error,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: no space left on the disk while writing {place}")
    assert named in error
    assert "make room" in outcome.stderr
    for folder in checkpoint.all_checkpoints(run):
        assert checkpoint.damage(folder) is None
    assert [path.name for path in run.rglob(".*") if path.name != ".lock"] == []
    rows = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    assert rows.endswith("\n") or not rows
    filler.unlink()
    assert setting.go(run) == 0
    assert what_stays(run) == expected
    record(f"while writing {what}: named, resumed bitwise")


def test_a_full_disk_of_the_data_cache(setting: Setting, disk: Callable[[str], Path], tmp_path: Path) -> None:
    place = disk("1m")
    fill(place / "filler", 8192)
    outcome = setting.warm.run(*setting.flags, tmp_path / "run", cache=place / "cache")
    assert outcome.code in (ExitCode.DATA, ExitCode.FAILURE)
    assert str(place / "cache") in outcome.stderr
    assert "No space left" in outcome.stderr
    (place / "filler").unlink()
    assert not list((place / "cache").rglob(".building-*"))


def test_room_is_looked_for_before_training(setting: Setting, disk: Callable[[str], Path]) -> None:
    """Two checkpoints and a third that is written before the first is deleted, each with its best adapter."""
    place = disk("1m")
    outcome = setting.warm.run(*setting.flags, place / "run")
    assert outcome.code == ExitCode.FAILURE
    # 32,768 parameters in 28 tensors: 12 bytes each and 4 in best/, with what is beside them, three times; and three
    # adapters in best/, rounds/ and adapter/.
    needed = 3 * (16 * 32_768 + 65_536 + 28 * 1536) + 3 * 4 * 32_768
    assert f": {needed / 1e6:.1f} MB are needed, 1.0 MB are free on {place}" in outcome.stderr
    assert "no space left for the checkpoints of this run" in outcome.stderr
    assert "train.keep_checkpoints=1" in outcome.stderr
    assert [path.name for path in (place / "run").iterdir()] == [".lock"]


def test_room_for_the_reference_is_looked_for(setting: Setting, disk: Callable[[str], Path], tmp_path: Path) -> None:
    run = setting.fresh()
    place = disk("64k")
    shutil.copytree(run.parent / "cache", place / "cache") if (run.parent / "cache").exists() else None
    assert setting.warm.run(*setting.flags, tmp_path / "first", cache=place / "cache").code == 0
    shutil.rmtree(place / "cache" / "reference")
    fill(place / "filler", 4096)
    outcome = setting.warm.run(*setting.flags, run, cache=place / "cache")
    assert outcome.code == ExitCode.FAILURE
    assert "no space left for the reference's log-probs" in outcome.stderr
    assert "--cache-reference off" in outcome.stderr


def test_room_for_a_merged_model(setting: Setting, disk: Callable[[str], Path]) -> None:
    """Looked for before; and where it goes meanwhile, the merge leaves nothing and can be repeated."""
    run, place = setting.whole(), disk("4m")
    filler, output = place / "filler", place / "merged"
    fill(filler, 100_000)
    outcome = setting.warm.run("merge", run, "--output", output)
    assert outcome.code == ExitCode.FAILURE
    assert f"no space left for the merged model: 0.2 MB are needed, 0.1 MB are free on {place}" in outcome.stderr
    filler.unlink()
    begun = {"event": "os.mkdir", "path": ".merged.tmp", "at": 1}
    outcome = setting.warm.run("merge", run, "--output", output, watch=[place], fill=str(filler), left=100_000, **begun)
    assert outcome.code == ExitCode.FAILURE
    assert f"no space left on the disk while writing {output}" in outcome.stderr
    assert list(place.iterdir()) == [filler]
    filler.unlink()
    assert setting.warm.run("merge", run, "--output", output).code == 0
    record("a merge, before it and in its middle: named, nothing left, then repeated")


def test_a_row_that_does_not_fit_is_not_there_at_all(disk: Callable[[str], Path]) -> None:
    place = disk("16k")
    path = place / "metrics.jsonl"
    row = {"kind": "train", "step": 1, "text": "x" * 900}
    with pytest.raises(SampoError, match=r"no space left on the disk while writing .*metrics\.jsonl"):  # noqa: PT012
        for step in range(30):
            append(path, row | {"step": step})
    rows = metrics.read(path)
    assert path.read_text().endswith("}\n")
    assert len(rows) == path.read_text().count("\n") > 10


def test_a_log_that_cannot_be_written_stops_nothing(
    disk: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    place = disk("16k")
    view = RunView()
    view.begin(place, 10, 0)
    fill(place / "filler", 0)
    for _ in range(100):
        view.note("a line that is said all the same" * 10)
    view.close()
    said = capfd.readouterr().err
    assert said.count("cannot be written any more") == 1
    assert said.count("a line that is said all the same" * 10) == 100


# Two runs on one folder -----------------------------------------------------------------------------------------------


def test_a_second_run_on_one_folder_is_refused(setting: Setting) -> None:
    """A new one, where the first has no checkpoint yet, and a resumed one; the first one's files stay."""
    run = setting.fresh()
    assert struck(setting, run, kill=True, event="open", path="metrics.jsonl", at=2).code == -signal.SIGKILL
    before = sorted(path.name for path in run.iterdir())
    with held(run):
        outcome = setting.warm.run(*setting.flags, run)
        assert outcome.code == ExitCode.USAGE
        assert f"another process is writing into {run}" in outcome.stderr
        assert sorted(path.name for path in run.iterdir()) == before
    assert struck(setting, run, kill=True, event="open", path=".step-000002.tmp", at=1).code == -signal.SIGKILL
    with held(run):
        outcome = setting.warm.run("train", "--resume", run)
        assert outcome.code == ExitCode.USAGE
        assert f"another process is writing into {run}" in outcome.stderr
        assert (run / "checkpoints" / ".step-000002.tmp").is_dir()
    refuse_held(run)
    record("a new and a resumed one refused, free after kill -9")


OTHER = """
import os, sys
from pathlib import Path
from sampo_cli.lock import held
run = Path(sys.argv[1])
run.mkdir()
with held(run):
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


def test_two_that_start_at_the_same_time(setting: Setting) -> None:
    """Both found no folder; the one that has its model loaded later finds the other there."""
    run = setting.fresh()
    first = [sys.executable, "-c", OTHER, str(run)]
    outcome = struck(setting, run, meanwhile=first, event="os.mkdir", path=str(run), at=1)
    assert outcome.code == ExitCode.USAGE, outcome.stderr
    assert f"another process is writing into {run}" in outcome.stderr
    assert [path.name for path in run.iterdir()] == [".lock"]
    assert setting.go(run) == 0  # that process has ended, and its lock with it


def test_the_lock_is_of_one_process(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(UsageError, match="another process is writing"):
        refuse_held(tmp_path)
    refuse_held(tmp_path)


# Memory ---------------------------------------------------------------------------------------------------------------


def test_memory_that_runs_out_in_the_middle(warm: Warm, tiny_llama: Path, tmp_path: Path, pairs: Path) -> None:
    """After step 2 the process may have no more than it has: the checkpoint stays, and it says what to lower."""
    rows = [{"prompt": "the same thing " * 40, "chosen": "yes " * 60, "rejected": "no " * 60} for _ in range(64)]
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps(row | {"prompt": f"{i} {row['prompt']}"}) + "\n" for i, row in enumerate(rows)))
    flags = ("--batch-pairs", 16, "--max-steps", 4, "--save-every", 1, "--eval-fraction", 0, "--quantization", "none")
    command = ("train", "--model", tiny_llama, "--data", data, *flags, "--output")
    run = tmp_path / "run"
    fault = {"event": "os.remove", "path": ".summary.json.tmp", "at": 3, "memory": 2**20}
    outcome = warm.run(*command, run, watch=[run], **fault)
    assert outcome.code == ExitCode.MEMORY, outcome.stderr
    assert "out of memory in step 3" in outcome.stderr
    assert "--set train.tokens_per_microbatch=2048" in outcome.stderr
    assert f"sampo train --resume {run}" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert state(run) == "failed"
    assert checkpoint.find(run)[1].name == "step-000002"
    again = warm.run("train", "--resume", run, "--set", "train.tokens_per_microbatch=2048")
    assert again.code == 0, again.stderr
    assert [row["step"] for row in metrics.read(run / "metrics.jsonl")] == [1, 2, 3, 4]
    record("RLIMIT_AS at step 3: exit code 5")


# Trackers -------------------------------------------------------------------------------------------------------------


def test_a_tracker_that_fails_in_the_middle(setting: Setting, disk: Callable[..., Path], tmp_path: Path) -> None:
    """TensorBoard's own disk fills up after some rows: one warning, and the run is what it would have been."""
    run = tmp_path / "run"
    assert setting.warm.run(*setting.flags, run, "--iterations", 1).code == 0
    place = disk("256k", "run/sampo")
    more = ("--max-steps", 5, "--report-to", "tensorboard")
    fault = {**NEXT_STEP, "at": 5, "fill": str(place / "filler"), "left": 0}
    outcome = setting.warm.run("train", "--resume", run, *more, watch=[run], **fault)
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr.count("warning: tensorboard failed and gets no more rows") == 1
    assert "Traceback" not in outcome.stderr
    assert state(run) == "finished"
    assert [row["step"] for row in metrics.read(run / "metrics.jsonl") if row["kind"] == "train"] == [1, 2, 3, 4, 5]
    record("TensorBoard's disk full: one warning, all rows in metrics.jsonl")
