"""Trackers (TensorBoard, Weights & Biases) through accelerate; nothing is opened that was not asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sampo_cli.config import Recipe
from sampo_cli.errors import UsageError
from sampo_cli.remote import first_line


@contextmanager
def tracking(accelerator: Accelerator, recipe: Recipe, folder: Path) -> Iterator[None]:
    """The trackers of `output.report_to`, open inside and closed afterwards.

    Raises:
        UsageError: one does not start (no login, no network).
    """
    trackers = recipe.output.report_to
    if trackers:
        settings = {f"{s}.{k}": str(v) for s, part in recipe.model_dump().items() for k, v in part.items()}
        own_folder = {"wandb": {"name": folder.name, "dir": str(folder)}}
        try:
            accelerator.init_trackers("sampo", settings, own_folder)
        except Exception as error:  # whatever a tracker raises is its own
            reason = f"--report-to {' '.join(trackers)}: {first_line(error)}"
            raise UsageError(reason, hint="log in to the tracker, or train without it") from error
    try:
        yield
    finally:
        accelerator.end_training()


def track(accelerator: Accelerator, prefix: str, row: Mapping[str, Any]) -> None:
    """Send a metrics row to the open trackers, if there are any."""
    numbers = {
        f"{prefix}/{key}": value for key, value in row.items() if key not in ("kind", "step") and value is not None
    }
    if accelerator.trackers:
        accelerator.log(numbers, step=row["step"])
