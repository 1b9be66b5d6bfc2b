"""Trackers (TensorBoard, Weights & Biases) through accelerate; nothing is opened that was not asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sampo_cli import ranks
from sampo_cli.config import Recipe
from sampo_cli.errors import Interrupted, UsageError
from sampo_cli.metrics import numbers
from sampo_cli.remote import first_line


@contextmanager
def tracking(accelerator: Accelerator, recipe: Recipe, folder: Path, note: Callable[[str], object]) -> Iterator[None]:
    """The trackers of `output.report_to`, open inside and closed afterwards.

    Raises:
        UsageError: one does not start (no login, no network).
    """
    trackers = recipe.output.report_to if ranks.is_first() else []
    if trackers:
        settings = {f"{s}.{k}": str(v) for s, part in recipe.model_dump().items() for k, v in part.items()}
        own_folder = {"wandb": {"name": folder.name, "dir": str(folder)}}
        try:
            accelerator.init_trackers("sampo", settings, own_folder)
        except Exception as error:  # whatever a tracker raises is its own
            reason = f"--report-to {' '.join(trackers)}: {first_line(error)}"
            raise UsageError(reason, hint="log in to the tracker, or train without it") from error
    try:
        with _writers_fail_quietly():
            yield
    finally:
        for tracker in accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:
                note(_lost(error, tracker.name))


@contextmanager
def _writers_fail_quietly() -> Iterator[None]:
    """TensorBoard's thread keeps its exception for the next row; without a traceback of its own on the terminal."""
    before = threading.excepthook

    def hook(failure: Any) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            before(failure)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def track(accelerator: Accelerator, prefix: str, row: Mapping[str, Any], note: Callable[[str], object]) -> None:
    """Send a metrics row to the open trackers, if there are any. One that fails is let go, and `note` told: once."""
    values = {f"{prefix}/{key}": value for key, value in numbers(row).items() if key != "step"}
    for tracker in list(accelerator.trackers):
        try:
            tracker.log(values, step=row["step"])
        except Interrupted:
            raise
        except Exception as error:
            accelerator.trackers.remove(tracker)
            note(_lost(error, tracker.name))


def _lost(error: Exception, name: str = "a tracker") -> str:
    return f"warning: {name} failed and gets no more rows: {first_line(error)}; training goes on, metrics.jsonl has all"
