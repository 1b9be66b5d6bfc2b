"""A process that has imported everything and forks for each command, so that a command takes no ten seconds to start.

Real processes that really die: a fault is SIGKILL from outside or in the middle of a file operation, a signal, a disk
that fills up, a limit on memory. `python -m tests.warm` is the process, `Warm` the test's end of it.

The moments that can be chosen are file operations on watched folders, counted from 1: Python reports each of them to
an audit hook before it happens.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import mmap
import os
import pty
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_started: list[subprocess.Popen[bytes]] = []

COUNTED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree")


@dataclass(frozen=True)
class Outcome:
    """What became of a command.

    Attributes:
        code: its exit code, or the negative number of the signal that killed it.
        moments: file operations on watched folders, up to its end.
    """

    code: int
    moments: int
    seconds: float
    stdout: str
    stderr: str


class Warm:
    """Runs `sampo` commands in forks of a process that is ready."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"],
            cwd=Path(__file__).resolve().parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: object, watch: Sequence[Path] = (), cache: Path | None = None, **fault: Any) -> Outcome:
        """One command.

        Args:
            watch: folders whose file operations are counted.
            cache: SAMPO_CACHE, if not the tests' own.
            fault: `kill_after` seconds. Or, at moment `at` and `delay` seconds: `kill`=True, `signals` to send (a list
                of numbers), `fill` (a file that takes what is free on its disk but for `left` bytes), `memory` (bytes
                that the process may have beyond what it has then) or `meanwhile` (a command that is started, waited
                for until it says a line, and ended with the process). Moments are counted among those of the audit
                event `event` and of paths with `path` in them, where these are given. `ignored` signals are ignored
                from the start; with `terminal`=True the command has a terminal, which is closed at moment `at`; with
                `deaf`=True its stderr is a pipe without a reader. `observe` is no fault: (open files, threads, resident
                bytes) at each moment, as lines in that file.
        """
        request = {
            "arguments": [str(argument) for argument in arguments],
            "folder": str(Path.cwd()),
            "environment": os.environ | ({"SAMPO_CACHE": str(cache)} if cache else {}),
            "watch": [str(path) for path in watch],
            "output": str(self.folder / "output"),
            "fault": fault,
        }
        (reply,) = self._ask([request])
        texts = {name: (self.folder / f"output.{name}").read_text() for name in ("stdout", "stderr")}
        return Outcome(**reply, **texts)

    def run_ranks(
        self, count: int, *arguments: object, cache: Path, environment: Sequence[dict[str, str]] = (), **fault: Any
    ) -> list[Outcome]:
        """One command in `count` processes, with what a launcher leaves in the environment; by rank.

        Args:
            environment: more of it for each rank, from the first on.
            fault: see `run`; it strikes the first process, whose file operations under `cache`'s folder are counted.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        requests = []
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            more = environment[rank] if rank < len(environment) else {}
            own = {"SAMPO_CACHE": str(cache), **rendezvous, **{name: str(value) for name, value in place.items()}}
            requests.append(
                {
                    "arguments": [str(argument) for argument in arguments],
                    "folder": str(Path.cwd()),
                    "environment": os.environ | own | more,
                    "watch": [] if rank else [str(cache.parent)],
                    "output": str(self.folder / f"output{rank}"),
                    "fault": {} if rank else fault,
                }
            )
        replies = self._ask(requests)
        return [
            Outcome(
                **reply,
                stdout=(self.folder / f"output{rank}.stdout").read_text(),
                stderr=(self.folder / f"output{rank}.stderr").read_text(),
            )
            for rank, reply in enumerate(replies)
        ]

    def _ask(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(requests) + "\n")
        self.process.stdin.flush()
        return list(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.communicate()


def _serve() -> None:
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for replies; DeepSpeed, where installed, says something
        _warm_up()
    moments = mmap.mmap(-1, 8)
    for line in sys.stdin:
        children = []
        moments[:] = bytes(8)
        started = time.monotonic()
        for request in json.loads(line):
            child, terminal = pty.fork() if request["fault"].get("terminal") else (os.fork(), None)
            if not child:
                _become(request, moments)
            children.append((child, request["fault"], terminal))
        replies = []
        for child, fault, terminal in children:
            code = _wait(child, fault, moments, terminal)
            passed = time.monotonic() - started
            replies.append({"code": code, "moments": int.from_bytes(moments[:], "little"), "seconds": passed})
        print(json.dumps(replies), flush=True)


def _warm_up() -> None:
    """Import what a run and a merge import. Nothing that starts a thread: a fork has only the one that forked.

    Tokenizers must not start theirs: a fork would wait for them for ever.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["TQDM_DISABLE"] = "1"  # read when it is imported
    import datasets  # noqa: F401
    import torch

    from sampo_cli import card, cli, commands_train, dry_run, merging, run  # noqa: F401
    from sampo_cli.config import LoraSection, ModelConfig
    from sampo_cli.model import load_policy
    from tests import tiny

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = tiny.save_model(tiny.CONFIGS["llama"](), Path(folder) / "model")
        load_policy(ModelConfig(name=str(model)), LoraSection(), seed=0)


def _wait(child: int, fault: dict[str, Any], moments: mmap.mmap, terminal: int | None) -> int:
    deadline = time.monotonic() + fault.get("kill_after", 600)
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if terminal and select.select([terminal], [], [], 0)[0]:
            os.read(terminal, 2**16)
        if terminal and int.from_bytes(moments[:], "little") >= fault["at"]:
            os.close(terminal)
            terminal = None
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.002)


def _become(request: dict[str, Any], moments: mmap.mmap) -> None:
    """The forked process: the command, and its fault when the moment comes."""
    try:
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        fault, watched = request["fault"], tuple(request["watch"])
        for number, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(f"{request['output']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            if not fault.get("terminal"):
                os.dup2(file, number)
        if not fault.get("terminal"):
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if fault.get("deaf"):
            reading, writing = os.pipe()
            os.dup2(writing, 2)
            os.close(reading)
        for number in fault.get("ignored", []):
            signal.signal(number, signal.SIG_IGN)
        counted = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal counted
            path = str(arguments[0]) if event in COUNTED else ""
            wanted = fault.get("path", "") in path and fault.get("event", event) == event
            if path.startswith(watched) and wanted:
                counted += 1
                moments[:] = counted.to_bytes(8, "little")
                if counted == fault.get("at"):
                    _strike(fault)
                if "observe" in fault:
                    _observe(Path(fault["observe"]))

        if watched:
            sys.addaudithook(hook)
        from sampo_cli.cli import main

        main(request["arguments"])
    except SystemExit as end:
        _end(end.code)
    finally:
        os._exit(99)


def _end(code: Any) -> None:
    if "RANK" in os.environ:
        atexit._run_exitfuncs()  # where the first process waits for the others
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


def _strike(fault: dict[str, Any]) -> None:
    if fault.get("delay"):
        threading.Timer(fault.pop("delay"), _strike, [fault]).start()
        return
    if fault.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    for number in fault.get("signals", []):
        os.kill(os.getpid(), number)
    if "meanwhile" in fault:
        other = subprocess.Popen(fault["meanwhile"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert other.stdout
        assert other.stdout.readline()
        _started.append(other)
    if "fill" in fault:
        fill(Path(fault["fill"]), fault.get("left", 0))
    if "memory" in fault:
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + fault["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _observe(path: Path) -> None:
    status = Path("/proc/self/statm").read_text().split()
    numbers = len(os.listdir("/proc/self/fd")), threading.active_count(), int(status[1]) * resource.getpagesize()
    with path.open("a") as file:
        print(*numbers, file=file)


def fill(path: Path, left: int) -> None:
    """Take all room on a disk but `left` bytes."""
    status = os.statvfs(path.parent)
    with path.open("ab") as file:
        wanted = max(status.f_bavail * status.f_frsize - left, 0)
        if wanted:
            os.posix_fallocate(file.fileno(), file.tell(), wanted)


if __name__ == "__main__":
    _serve()
