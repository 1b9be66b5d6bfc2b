"""`--num-processes` and `--accelerate-config`: sampo starts itself under accelerate's launcher and waits for it.

The launcher runs in a thread, so that signals are this process's: it hands each of them on once, and waits however long
the processes take to save. Left to itself the launcher would end them after half a minute.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from sampo_cli.disk import expanded
from sampo_cli.errors import ExitCode, Interrupted, SampoError, UsageError, nearest
from sampo_cli.joining import INSTEAD, UNSUPPORTED
from sampo_cli.ranks import LAUNCHED, started_by_launcher
from sampo_cli.recipe_files import recipes_folder
from sampo_cli.remote import first_line
from sampo_cli.signals import SIGNALS
from sampo_cli.zero import INSTALL

DEFAULT_CONFIG = "ddp"


def shipped_configs() -> dict[str, Path]:
    """The accelerate configs that ship with sampo, by name."""
    return {path.stem: path for path in sorted((recipes_folder() / "accelerate").glob("*.yaml"))}


def find_config(name: str) -> Path:
    """The file of an accelerate config: a path, or the name of one that ships.

    Raises:
        UsageError: there is none.
    """
    path, known = expanded(name), shipped_configs()
    if path.is_file():
        return path.resolve()
    if name not in known:
        raise UsageError(
            f"--accelerate-config: '{name}' is neither a file nor a shipped config{nearest(name, known)}",
            hint=f"shipped: {', '.join(known)}",
        )
    return known[name]


def is_wanted(processes: int | None, config: str | None) -> bool:
    """True where this process is to start others; False in those that it has started, and where one is enough.

    Raises:
        UsageError: another launcher has started this one.
    """
    if os.environ.get(LAUNCHED) or (config is None and processes in (None, 1)):
        return False
    if started_by_launcher():
        raise UsageError(
            "--num-processes and --accelerate-config start a launcher, and one has started this process already",
            hint="leave them out, or start sampo train without the launcher",
        )
    return True


def words_of(command: str, asked: Mapping[str, Any]) -> list[str]:
    """The command line that asks a command for the same as these arguments of its function ask for."""
    words = [command]
    for name, value in asked.items():
        flag = "--set" if name == "settings" else f"--{name.replace('_', '-')}"
        if value is None or value is False or name in ("num_processes", "accelerate_config"):
            continue
        several: Sequence[Any] = [value]
        if isinstance(value, Mapping):
            several = [f"{key}={json.dumps(one)}" for key, one in value.items()]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            several = value
        for one in several:
            words += [flag] if one is True else [flag, str(one)]
    return words


def launch(words: Sequence[str], processes: int | None, config: str | None) -> dict[str, Any]:
    """Run `sampo` with these words in several processes, to their end.

    Args:
        words: of the command line.
        processes: on all machines together; the config's, or one for each GPU, where None.
        config: an accelerate config by path or name.

    Returns:
        What the first process told (`ranks.tell_launcher`).

    Raises:
        UsageError: the config cannot be used, or there are too few devices.
        SampoError: what the first process that failed raised, or how it was killed.
    """
    arguments = _launcher_arguments(find_config(config or DEFAULT_CONFIG), processes, words)
    outcome: list[BaseException] = []
    thread = threading.Thread(target=_run, args=(arguments, outcome), daemon=True)
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        with _quiet_launcher(told, debug="--debug" in sys.argv), _signals_handed_on():
            thread.start()
            while thread.is_alive():
                thread.join(0.2)
        document = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
    if outcome:
        cause = RuntimeError(document["traceback"]) if "traceback" in document else outcome[0]
        raise _failure(outcome[0], document) from cause
    return document


def _launcher_arguments(path: Path, processes: int | None, words: Sequence[str]) -> Any:
    """What `accelerate launch` makes of its own command line.

    Raises:
        UsageError: the config cannot be read, or does not fit the devices that are here.
    """
    import torch
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        config = load_config_from_file(str(path))
    except Exception as error:  # whatever a file that is no config makes accelerate raise
        raise UsageError(f"accelerate config {path}: {error}", hint="accelerate config writes one") from error
    if (kind := config.distributed_type.value) in UNSUPPORTED:
        raise UsageError(f"accelerate config {path}: {kind} is not supported: {UNSUPPORTED[kind]}", hint=INSTEAD)
    machines = getattr(config, "num_machines", 1) or 1
    if kind == "DEEPSPEED":
        _check_deepspeed(path, config.deepspeed_config, machines)
    devices = torch.cuda.device_count()
    asked = getattr(config, "num_processes", -1)
    total = processes or (asked if asked > 0 else devices * machines)
    if total < 1:
        raise UsageError("how many processes? there is no GPU to count", hint="--num-processes 2")
    here = -(-total // machines)
    if devices and here > devices:
        raise UsageError(
            f"{here} processes on this machine and {devices} GPU{'s' * (devices > 1)}: each needs one of its own",
            hint=f"--num-processes {devices * machines}, or fewer",
        )
    options = ["--config_file", str(path), "--num_processes", str(total)]
    if machines == 1 and not config.main_process_port:
        options += ["--main_process_port", "0"]
    if not devices and "OMP_NUM_THREADS" not in os.environ:
        options += ["--num_cpu_threads_per_process", str(max(1, (os.cpu_count() or 1) // here))]
    if not devices and total > 1 and not (config.fsdp_config or config.deepspeed_config):
        options.append("--multi_gpu")  # `--cpu` knows MPI alone; the launcher for GPUs needs none
    return launch_command_parser().parse_args([*options, "--module", "sampo_cli", *words])


def _check_deepspeed(path: Path, settings: Mapping[str, Any], machines: int) -> None:
    """
    Raises:
        UsageError: DeepSpeed is not installed, or is to start processes on other machines in a way of its own.
    """
    if find_spec("deepspeed") is None:
        raise UsageError(f"accelerate config {path} needs DeepSpeed, which is not installed", hint=INSTALL)
    if machines > 1 and settings.get("deepspeed_multinode_launcher") != "standard":
        raise UsageError(
            f"accelerate config {path}: DeepSpeed's own launchers start processes without sampo's environment",
            hint="deepspeed_multinode_launcher: standard, and the same command on each machine",
        )


def _run(arguments: Any, outcome: list[BaseException]) -> None:
    from accelerate.commands.launch import launch_command

    try:
        launch_command(arguments)
    except BaseException as error:
        outcome.append(error)


KINDS = {kind.exit_code: kind for kind in SampoError.__subclasses__() if kind is not Interrupted}
"""What a process raised, by its exit code."""


def _failure(error: BaseException, told: Mapping[str, Any]) -> SampoError:
    """What to raise where the launcher raised `error`.

    Args:
        told: what the first process to fail said of it, if it could.
    """
    failures = getattr(error, "failures", {})  # torch's ChildFailedError: by rank
    in_time = sorted(failures, key=lambda rank: failures[rank].timestamp)
    codes = [failures[rank].exitcode for rank in in_time] or [getattr(error, "returncode", None)]
    first = codes[0]
    if first is not None and first < 0 and -first not in SIGNALS:
        hint = "perhaps for the memory that it took; the newest checkpoint is whole, and --resume goes on"
        return SampoError(f"process {in_time[0] + 1} was killed by {signal.Signals(-first).name}", hint=hint)
    if told:
        return _of_kind(told["code"], told["message"], told["hint"])
    if first is None:
        hint = "run again with --debug to see all that it says"
        return SampoError(f"accelerate's launcher failed: {first_line(error)}", hint=hint)
    if first < 0:
        return Interrupted("stopped before the first step", exit_code=ExitCode(128 - first))
    return _of_kind(first, f"a process ended with exit code {first}", "what it said is above")


def _of_kind(code: int, message: str, hint: str | None) -> SampoError:
    if code > 128 and code in set(ExitCode):
        return Interrupted(message, hint=hint, exit_code=ExitCode(code))
    return KINDS.get(ExitCode(code) if code in set(ExitCode) else ExitCode.FAILURE, SampoError)(message, hint=hint)


@contextmanager
def _quiet_launcher(told: Path, *, debug: bool) -> Iterator[None]:
    """What failed, a process has told; the launcher's own account of it would bury that."""
    loggers = [logging.getLogger(name) for name in ("torch.distributed", "accelerate")]
    levels = [logger.level for logger in loggers]
    os.environ[LAUNCHED] = str(told)
    for logger in loggers:
        logger.setLevel(logging.NOTSET if debug else logging.CRITICAL)
    try:
        yield
    finally:
        del os.environ[LAUNCHED]
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _signals_handed_on() -> Iterator[None]:
    """Inside, `SIGNALS` go to the processes, once each; they decide what that means."""
    import psutil

    def hand_on(number: int, _frame: FrameType | None) -> None:
        children = psutil.Process().children()
        if not children:
            raise Interrupted("stopped before the first step", exit_code=ExitCode(128 + number))
        for child in children:
            with suppress(psutil.Error):
                child.send_signal(number)

    ours = threading.current_thread() is threading.main_thread()  # Python hands signals to no other
    caught = [number for number in SIGNALS if ours and signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, hand_on) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
