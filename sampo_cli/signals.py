"""Ctrl-C, SIGTERM and SIGHUP as a wish that the loop can grant between two steps."""

from __future__ import annotations

import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from sampo_cli import ranks
from sampo_cli.errors import ExitCode, Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))

ECHO_SECONDS = 2.0
"""A launcher passes on what the terminal has sent to all of its processes; within that time it is one signal."""


class StopRequest:
    """Remembers the first signal that asked for an end; a second one ends the run at once.

    Args:
        announce: called at the first signal.
    """

    def __init__(self, announce: Callable[[], object] = lambda: None) -> None:
        self.signal: int | None = None
        self._since = 0.0
        self._announce = announce

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> ExitCode:
        """128 plus the signal; Ctrl-C's where there was none."""
        return ExitCode(128 + (self.signal or signal.SIGINT))

    def after(self, step: int, steps: int, run: Path) -> Interrupted:
        """The end of a run that granted the wish, to be raised once it has saved itself."""
        if not step:
            return Interrupted("stopped before the first step", hint="start it again", exit_code=self.exit_code)
        return Interrupted(
            f"stopped after step {step} of {steps}; everything so far is saved",
            hint=f"go on with: {resume_command(run)}",
            exit_code=self.exit_code,
        )

    def agree(self) -> None:
        """Make a wish that one process of the run has heard the wish of all of them."""
        heard = max(ranks.gather(self.signal or 0))
        self.signal = self.signal or heard or None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None:
            if ranks.hears_twice() and time.monotonic() - self._since < ECHO_SECONDS:
                return
            raise Interrupted(
                "left at once; the newest checkpoint is whole", hint="--resume goes on", exit_code=self.exit_code
            )
        self.signal, self._since = number, time.monotonic()
        with suppress(OSError, RuntimeError):  # the terminal is gone, or this came in the middle of a print to it
            self._announce()


def resume_command(folder: Path) -> str:
    """What goes on with a run, to be pasted into a shell."""
    return f"sampo train --resume {shlex.quote(str(folder))}"


@contextmanager
def stop_requests(announce: Callable[[], object] = lambda: None) -> Iterator[StopRequest]:
    """Catch `SIGNALS` inside; the handlers that were there come back afterwards.

    One that is ignored already stays so: `nohup` and shells that put a command into the background ask for that. So
    does one that a program around this handles outside Python. In another thread than the main one nothing is caught:
    Python gives signals to that one.
    """
    request = StopRequest(announce)
    mine = threading.current_thread() is threading.main_thread()
    caught = [number for number in SIGNALS if mine and signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, request) for number in caught}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
