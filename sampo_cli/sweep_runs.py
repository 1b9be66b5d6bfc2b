"""The runs of a sweep, each in a process of its own: what is to be done for each, and doing it in turn.

A process for each run, so that its memory is gone when it ends, and one that crashes takes no other with it.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sampo_cli import checkpoint
from sampo_cli.errors import ExitCode, Interrupted
from sampo_cli.run_files import SUMMARY, read_run
from sampo_cli.signals import StopRequest, stop_requests
from sampo_cli.sweep_plan import CONSENT, PlannedRun, save_plan

WAITING = "waiting"
DONE = ("finished", "running")
STOPPED = (ExitCode.HANGUP, ExitCode.INTERRUPTED, ExitCode.TERMINATED)


def state_of(folder: Path, exit_code: int | None) -> str:
    """Of a run: waiting, running, finished, interrupted, crashed or failed.

    Args:
        exit_code: what its process ended with, if it was one of this sweep's.
    """
    state = read_run(folder).state if (folder / SUMMARY).is_file() else WAITING
    return "failed" if exit_code and state not in DONE else state


def commands_to_run(runs: Sequence[PlannedRun], plan: Mapping[str, Any], *, retry_failed: bool) -> dict[str, list[str]]:
    """The words after `sampo` for each run that is to be started or resumed, by its name."""
    states = {run.name: state_of(run.folder, plan["runs"][run.name]["exit_code"]) for run in runs}
    skipped = DONE if retry_failed else (*DONE, "failed")
    return {run.name: _words(run, states[run.name]) for run in runs if states[run.name] not in skipped}


def _words(run: PlannedRun, state: str) -> list[str]:
    if state != WAITING and checkpoint.all_checkpoints(run.folder):
        consent = ["--set", CONSENT] if CONSENT in run.words else []
        return ["train", "--resume", str(run.folder), *consent]
    return run.words


def command_of(words: Sequence[str]) -> str:
    """To be pasted into a shell."""
    return shlex.join(["sampo", *words])


class _Child:
    """The process of the run that goes. It gets no signal of the terminal's: those come through `passed_on`."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.told = False

    def run(self, words: Sequence[str], group: str, stop: StopRequest) -> int:
        """Start it, and wait for its end, also where a second signal asks for that at once."""
        environment = {"WANDB_RUN_GROUP": group, **os.environ}
        command = [sys.executable, "-m", "sampo_cli", *words]
        self.told = False
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        try:
            if stop and not self.told:  # it came while this one was started; twice would mean at once
                self.passed_on(stop)
            return self.process.wait()
        except Interrupted:
            self.passed_on(stop)
            self.process.wait()
            raise
        finally:
            self.process = None

    def passed_on(self, stop: StopRequest) -> None:
        if self.process:
            self.told = True
            self.process.send_signal(stop.signal or signal.SIGINT)


def run_all(
    folder: Path,
    plan: dict[str, Any],
    commands: Mapping[str, Sequence[str]],
    note: Callable[[str], object],
    *,
    quiet: bool,
) -> None:
    """Run the commands in turn and write into the plan how each ended.

    Args:
        commands: words after `sampo`, by the names of runs.

    Raises:
        Interrupted: a signal asked for an end; the run that went has saved itself.
    """
    child = _Child()

    def announce() -> None:
        note("stopping: the run finishes its step and saves; once more to leave at once")
        child.passed_on(stop)

    with stop_requests(announce) as stop:
        for number, (name, words) in enumerate(commands.items(), 1):
            if not stop:
                note(f"sweep: run {number} of {len(commands)}: {name}")
                plan["runs"][name]["exit_code"] = None
                save_plan(folder, plan)
                code = child.run([*words, *["--quiet"] * quiet], folder.name, stop)
                plan["runs"][name]["exit_code"] = None if stop or code in STOPPED else code
                save_plan(folder, plan)
                if code and not stop:
                    note(f"warning: {name} ended with exit code {code}")
        if stop:
            hint = "the same command goes on with it"
            raise Interrupted("the sweep is stopped", hint=hint, exit_code=stop.exit_code)
