"""A run's folder belongs to one process at a time. The lock dies with its process, however that ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sampo_cli.errors import UsageError

LOCK = ".lock"
LOOKING_SECONDS = 0.5
"""Who only looks whether somebody has a folder holds its lock for a moment; a run waits that long for it."""


@contextmanager
def held(run: Path) -> Iterator[None]:
    """The folder `run`, which must be there, for this process alone.

    Raises:
        UsageError: another process has it.
    """
    lock = FileLock(run / LOCK)
    try:
        lock.acquire(timeout=LOOKING_SECONDS)
    except Timeout:
        raise UsageError(
            f"another process is writing into {run}", hint="wait until it has ended, or give a new run another --output"
        ) from None
    try:
        yield
    finally:
        lock.release()


def refuse_held(run: Path) -> None:
    """Stop if another process has the folder; leaves nothing in one that never was a run's.

    Raises:
        UsageError: it has.
    """
    if (run / LOCK).is_file():
        with held(run):
            pass
