"""How the processes of a run find each other, and how all of them end when one does.

The first to fail says why and the others end silently with its exit code, whoever started them and whatever they were
waiting for.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

from sampo_cli.errors import ExitCode, SampoError, UsageError, shown_failure
from sampo_cli.ranks import (
    FAILURE,
    HERE,
    LAUNCHED,
    beside_another,
    is_first,
    shares_out,
    started_by_launcher,
    tell_launcher,
    wait,
)

UNSUPPORTED = {
    "MEGATRON_LM": "it has models of its own",
}
"""What a launcher may ask for in vain, and why."""

INSTEAD = "--accelerate-config fsdp-qlora shards the base, in 4 bits or 16; ddp leaves it whole"

COLLECTIVE_LIMIT = timedelta(hours=2)
"""A number that takes longer is taken for lost; what is known to take long waits in the store instead."""

LOOK_SECONDS = 0.5
"""Between two looks whether another process has failed."""

GRACE_SECONDS = 5.0
"""What a process has to clean up after another has failed."""

FIRST_WORD_SECONDS = 2.0
"""So long the others leave it to the first process to say what is wrong: most of what fails, fails in all of them."""

_OVER, _LEFT = "sampo/over", "sampo/left"


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this process is one of those that a launcher started; where there is none, nothing happens.

    A failure inside ends all of them: the first to fail says why, the others end silently and with its exit code.

    Raises:
        UsageError: there are fewer devices than processes, or only half of what a launcher leaves.
        SampoError: another process is gone without a word.
    """
    if not started_by_launcher():
        _refuse_half_a_launcher()
        yield
        return
    _connect()
    watch = threading.Thread(target=_watch, args=(HERE.store.clone(),), daemon=True)
    watch.start()
    try:
        yield
        wait()
        HERE.done.set()
        watch.join()
        _leave_together()
    except (Exception, KeyboardInterrupt) as error:
        _fail(error)


def _refuse_half_a_launcher() -> None:
    """What is left in the environment of another program would have accelerate wait for processes that do not come."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes not in ("", "1") and "LOCAL_RANK" not in os.environ:
        raise UsageError(
            f"the environment has WORLD_SIZE={processes} but no LOCAL_RANK: no launcher has started this process",
            hint="unset WORLD_SIZE, and use --num-processes, torchrun or accelerate launch for several processes",
        )


def _connect() -> None:
    """Find the other processes by what the launcher left in the environment."""
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    if (kind := shares_out()) in UNSUPPORTED:
        if beside_another():
            raise SystemExit(int(ExitCode.USAGE))
        raise UsageError(f"{kind} is not supported: {UNSUPPORTED[kind]}", hint=INSTEAD)
    HERE.sharing = kind
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # accelerate would leave backward and optimizer to its engine
    local, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if torch.cuda.is_available() and local >= devices:
        raise UsageError(
            f"process {local + 1} on this machine has no GPU of its own: it has {devices}",
            hint=f"--num-processes {devices} for each machine, or fewer",
        )
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=COLLECTIVE_LIMIT)
    HERE.rank, HERE.count, HERE.on_machine = state.process_index, state.num_processes, state.local_process_index
    HERE.store = dist.distributed_c10d._get_default_store()
    HERE.talk = dist.new_group(backend="gloo", timeout=COLLECTIVE_LIMIT)


def _fail(error: BaseException) -> NoReturn:
    """End this process with its error if it is the first to fail, else silently with the exit code of that one."""
    failure = shown_failure(_gone(error) or error)
    code = ExitCode.INTERRUPTED if isinstance(error, KeyboardInterrupt) else failure.exit_code
    if not is_first():
        _until_first_fails()
    mine = f"{HERE.rank} {int(code)}"
    try:
        cause = HERE.store.compare_set(FAILURE, "", mine).decode()
    except RuntimeError:  # the store is gone as well
        cause = mine
    if cause != mine:
        HERE.done.set()  # the watch would ask a store that is gone, which torch says on stderr
        _leave_together()
        raise SystemExit(int(cause.split()[1])) from error
    _close()
    atexit.register(_leave_together)  # not now: the error has not been shown
    if isinstance(error, KeyboardInterrupt):
        raise error
    if not is_first():
        failure.message = f"process {HERE.rank + 1} of {HERE.count}: {failure.message}"
    if LAUNCHED in os.environ:
        said = "".join(traceback.format_exception(error))
        tell_launcher({"code": int(code), "message": failure.message, "hint": failure.hint, "traceback": said})
        raise SystemExit(int(code)) from error
    raise failure from error


def _until_first_fails() -> None:
    deadline = time.monotonic() + FIRST_WORD_SECONDS
    with suppress(RuntimeError):
        while time.monotonic() < deadline and not HERE.store.check([FAILURE]):
            time.sleep(0.02)


def _gone(error: BaseException) -> SampoError | None:
    """The error to show where another process has left in the middle of a collective."""
    import torch.distributed as dist

    lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    if not lost:
        return None
    return SampoError(
        "another process of this run is gone",
        hint="it was killed, perhaps for the memory that it took; the newest checkpoint is whole, and --resume goes on",
    )


def _close() -> None:
    """Let go of the others, so that who waits for this process hears that it does not come."""
    import torch.distributed as dist

    with suppress(RuntimeError, ValueError):
        dist.destroy_process_group(HERE.talk)
        if dist.get_backend() == "gloo":
            dist.destroy_process_group()


def _watch(store: Any) -> None:
    """End this process some time after another has failed: it may wait for that one in the middle of a collective."""
    while not HERE.done.wait(LOOK_SECONDS):
        try:
            found = HERE.failed(store)
        except RuntimeError:  # who kept the store is gone
            found = -1, int(ExitCode.FAILURE)
        if found and found[0] != HERE.rank and not HERE.done.wait(GRACE_SECONDS):
            with suppress(Exception):
                HERE.last_words()
                store.set(_OVER, "")
                store.add(_LEFT, 1)
            os._exit(found[1])


def _leave_together() -> None:
    """None leaves before the first process has said its last word, nor that one before all know of it.

    Launchers end all processes as soon as one has left with an error, and the first process may keep the store.
    """
    deadline = time.monotonic() + 2 * GRACE_SECONDS
    with suppress(RuntimeError):
        if is_first():
            HERE.store.set(_OVER, "")
        while time.monotonic() < deadline and not HERE.store.check([_OVER]):
            time.sleep(0.02)
        left = HERE.store.add(_LEFT, 1)
        while is_first() and time.monotonic() < deadline and left < HERE.count:
            time.sleep(0.02)
            left = HERE.store.add(_LEFT, 0)
