"""Ctrl-C and SIGTERM as a wish that the loop can grant between two steps."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sampo_cli.errors import Interrupted


class StopRequest:
    """Remembers the first signal that asked for an end; a second one ends the run at once.

    Args:
        announce: called at the first signal.
    """

    def __init__(self, announce: Callable[[], object] = lambda: None) -> None:
        self.signal: int | None = None
        self._announce = announce

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def terminated(self) -> bool:
        return self.signal == signal.SIGTERM

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None:
            raise Interrupted(
                "left at once; the newest checkpoint is whole", hint="--resume goes on", terminated=self.terminated
            )
        self.signal = number
        self._announce()


@contextmanager
def stop_requests(announce: Callable[[], object] = lambda: None) -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM inside; the handlers that were there come back afterwards."""
    request = StopRequest(announce)
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
