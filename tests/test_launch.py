"""Processes that are started for real: by `--num-processes`, by torchrun, by `accelerate launch`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from accelerate.commands.config.config_args import load_config_from_file

from sampo_cli import launch, metrics
from sampo_cli.errors import DataError, ExitCode, Interrupted, UsageError
from sampo_cli.joining import UNSUPPORTED
from tests import tiny

LIMIT = 240
"""Seconds after which a command is taken to hang."""


def test_shipped_configs_are_accelerates() -> None:
    configs = launch.shipped_configs()
    assert set(configs) == {"ddp", "fsdp-qlora", "deepspeed-zero2", "deepspeed-zero3", "multi-node"}
    kinds = {name: load_config_from_file(str(path)).distributed_type.value for name, path in configs.items()}
    several, zero = ("ddp", "multi-node"), ("deepspeed-zero2", "deepspeed-zero3")
    assert kinds == dict.fromkeys(several, "MULTI_GPU") | {"fsdp-qlora": "FSDP"} | dict.fromkeys(zero, "DEEPSPEED")


def test_deepspeed_must_be_there_and_leave_the_launching_to_accelerate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = launch.find_config("deepspeed-zero3")
    monkeypatch.setattr(launch, "find_spec", {"deepspeed": None}.__getitem__)
    with pytest.raises(UsageError, match="needs DeepSpeed") as caught:
        launch._launcher_arguments(config, 2, ["train"])
    assert "sampo-cli[deepspeed]" in (caught.value.hint or "")
    monkeypatch.setattr(launch, "find_spec", {"deepspeed": "here"}.__getitem__)
    assert launch._launcher_arguments(config, 2, ["train"]).num_processes == 2
    own = tmp_path / "own.yaml"
    own.write_text(config.read_text().replace("num_machines: 1", "num_machines: 2"))
    with pytest.raises(UsageError, match="launchers"):
        launch._launcher_arguments(own, 2, ["train"])
    own.write_text(own.read_text() + "  deepspeed_multinode_launcher: standard\n")
    assert launch._launcher_arguments(own, 4, ["train"]).num_processes == 4


def test_what_the_launcher_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    found = launch._launcher_arguments(launch.find_config("ddp"), 2, ["train", "--model", "m"])
    assert (found.num_processes, found.module, found.training_script) == (2, True, "sampo_cli")
    assert found.training_script_args == ["train", "--model", "m"]
    assert found.num_cpu_threads_per_process == max(1, (os.cpu_count() or 1) // 2)
    several = launch._launcher_arguments(launch.find_config("multi-node"), None, ["train"])
    assert several.num_processes == 16
    with pytest.raises(UsageError, match="how many processes"):
        launch._launcher_arguments(launch.find_config("ddp"), None, ["train"])
    own = tmp_path / "own.yaml"
    for kind in UNSUPPORTED:
        own.write_text(f"compute_environment: LOCAL_MACHINE\ndistributed_type: {kind}\nnum_processes: 2\n")
        with pytest.raises(UsageError, match=f"{kind} is not supported") as caught:
            launch._launcher_arguments(own, None, ["train"])
        assert "fsdp-qlora" in (caught.value.hint or "")
    own.write_text("distributed_type: MULTI_GPU\nprocesses: 2\n")
    with pytest.raises(UsageError, match="unknown keys"):
        launch._launcher_arguments(own, None, ["train"])


def test_configs_by_name_and_by_path(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'fsdp-qlora'"):
        launch.find_config("fsdp-qlor")
    own = tmp_path / "own.yaml"
    own.touch()
    assert launch.find_config(str(own)) == own


def test_one_launcher_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launch.is_wanted(None, None)
    assert not launch.is_wanted(1, None)
    assert launch.is_wanted(2, None)
    assert launch.is_wanted(None, "ddp")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one has started this process already"):
        launch.is_wanted(2, None)
    monkeypatch.setenv(launch.LAUNCHED, "1")
    assert not launch.is_wanted(2, None)


def test_what_a_process_told_is_raised_again() -> None:
    """Of its kind and with its exit code; the launcher ended the other, which is not what went wrong."""
    told = {"code": 3, "message": "process 2 of 2: row 7", "hint": "look at it"}
    found = launch._failure(failed({1: 3, 0: -15}), told)
    assert (type(found), found.message, found.hint) == (DataError, "process 2 of 2: row 7", "look at it")
    stopped = launch._failure(failed({0: 143, 1: 143}), {"code": 143, "message": "stopped after step 4", "hint": None})
    assert (type(stopped), stopped.exit_code) == (Interrupted, ExitCode.TERMINATED)


@pytest.mark.parametrize(
    ("codes", "code", "message"),
    [
        ({1: -9, 0: 1}, 1, "process 2 was killed by SIGKILL"),
        ({0: -2}, 130, "stopped before the first step"),
        ({0: 4}, 4, "a process ended with exit code 4"),
        ({0: 77}, 1, "a process ended with exit code 77"),
    ],
)
def test_what_a_process_could_not_tell(codes: dict[int, int], code: int, message: str) -> None:
    found = launch._failure(failed(codes), {})
    assert (found.exit_code, found.message) == (code, message)


def test_a_launcher_that_fails_itself() -> None:
    assert launch._failure(OSError("no port"), {}).message == "accelerate's launcher failed: no port"


def test_words_ask_for_what_arguments_ask_for() -> None:
    asked = {"model": Path("m"), "data": ["a", "b"], "epochs": 2.0, "seed": None, "quiet": True, "dry_run": False}
    asked |= {"settings": {"train.scheduler": "cosine", "train.max_steps": None}, "num_processes": 2}
    assert launch.words_of("train", asked) == [
        *("train", "--model", "m", "--data", "a", "--data", "b", "--epochs", "2.0", "--quiet"),
        *("--set", 'train.scheduler="cosine"', "--set", "train.max_steps=null"),
    ]
    assert launch.words_of("train", {"settings": ["a.b=c"]}) == ["train", "--set", "a.b=c"]


def failed(codes: dict[int, int]) -> BaseException:
    """What torch raises of processes that failed in this order: exit codes by rank."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    failures = {
        rank: SimpleNamespace(
            exitcode=code, timestamp=when, local_rank=rank, pid=1, error_file="", message="", signal_name=lambda: ""
        )
        for when, (rank, code) in enumerate(codes.items())
    }
    error = ChildFailedError.__new__(ChildFailedError)
    error.failures = failures
    return error


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tiny_llama: Path, tmp_path: Path) -> Start:
    """Starts `... sampo train` into tmp_path/run, with a launcher's words before it; stderr goes to tmp_path/err."""
    data = tiny.write_pairs(tmp_path / "pairs.jsonl", 24)
    flags = f"--model {tiny_llama} --data {data} --output {tmp_path}/run --batch-pairs 5 --eval-fraction 0.2".split()
    flags += ["--save-every", "2", "--quantization", "none", "--learning-rate", "1e-5", "--set", "model.dtype=float32"]
    flags += ["--set", "train.tokens_per_microbatch=150"]

    def begin(*launcher: str, more: tuple[str, ...] = (), resume: bool = False) -> subprocess.Popen[str]:
        command = [sys.executable, *launcher, "-m", "sampo_cli", "train"]
        command += ["--resume", f"{tmp_path}/run"] if resume else flags
        with (tmp_path / "err").open("w") as stderr:
            return subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=stderr, text=True)

    return begin


def wait_for(tmp_path: Path, text: str) -> None:
    deadline = time.monotonic() + LIMIT
    while text not in (tmp_path / "err").read_text():
        assert time.monotonic() < deadline, (tmp_path / "err").read_text()
        time.sleep(0.1)


@pytest.mark.slow
def test_ctrl_c_reaches_all_and_torchrun_goes_on(start: Start, tmp_path: Path) -> None:
    process = start(more=("--num-processes", "2", "--epochs", "300"))
    wait_for(tmp_path, "step 3/")
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=LIMIT)
    said = (tmp_path / "err").read_text()
    assert process.returncode == ExitCode.INTERRUPTED, said
    assert stdout == ""
    assert said.count("stopped after step") == said.count("finishing this step") == 1
    assert "Traceback" not in said
    assert "hint: go on with: sampo train --resume" in said
    steps = json.loads((tmp_path / "run" / "summary.json").read_text())["steps"]["done"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    again = start(*torchrun, resume=True, more=("--set", "train.epochs=null", "--max-steps", str(steps + 2), "--json"))
    stdout, _ = again.communicate(timeout=LIMIT)
    assert again.returncode == 0, (tmp_path / "err").read_text()
    summary = json.loads(stdout)
    assert (summary["state"], summary["processes"]) == ("finished", 2)
    rows = [row["step"] for row in metrics.read(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    assert rows == list(range(1, steps + 3))


@pytest.mark.slow
def test_a_process_that_is_killed_takes_the_others_with_it(start: Start, tmp_path: Path) -> None:
    process = start(
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        more=("--epochs", "300"),
    )
    wait_for(tmp_path, "step 3/")
    workers = [child for child in psutil.Process(process.pid).children() if "sampo_cli" in child.cmdline()]
    assert len(workers) == 2
    workers[1].kill()
    process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    assert not any(worker.is_running() for worker in workers)
    assert "SIGKILL" in (tmp_path / "err").read_text()  # accelerate says so; it may not leave us the time to
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["state"] != "finished"
