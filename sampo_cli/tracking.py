"""Trackers (TensorBoard, Weights & Biases, MLflow, trackio) through accelerate; none is opened that was not asked for.

Each gets the resolved recipe, every row, and at the end the tables of `run_tables.py`. What they write to stdout goes
to stderr.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate import tracking as trackers

from sampo_cli import ranks
from sampo_cli.config import Recipe, leaves
from sampo_cli.errors import Interrupted, UsageError
from sampo_cli.metrics import numbers
from sampo_cli.remote import first_line
from sampo_cli.run_tables import RunTable

PROJECT = "sampo"

HINTS = {
    "wandb": "`wandb login`, or WANDB_MODE=offline and later `wandb sync`; or train without it",
    "mlflow": "check MLFLOW_TRACKING_URI, or train without it",
}

Note = Callable[[str], object]


def make(name: str, folder: Path) -> Any:
    """A tracker, not started; its own environment variables say where to and under which project."""
    if name == "tensorboard":
        return trackers.TensorBoardTracker(PROJECT, folder)
    if name == "wandb":
        return trackers.WandBTracker(os.environ.get("WANDB_PROJECT") or PROJECT, name=folder.name, dir=str(folder))
    if name == "mlflow":
        return trackers.MLflowTracker(PROJECT, run_name=folder.name)
    return trackers.TrackioTracker(PROJECT, name=folder.name)


@contextmanager
def tracking(accelerator: Accelerator, recipe: Recipe, folder: Path, note: Note) -> Iterator[None]:
    """The trackers of `output.report_to`, open inside and closed afterwards.

    Raises:
        UsageError: one does not start (no login, no network); those that have are closed.
    """
    ended = "failed"
    try:
        for name in recipe.output.report_to if ranks.is_first() else ():
            with redirect_stdout(sys.stderr):
                _open(name, recipe, folder, accelerator.trackers)
        with _writers_fail_quietly():
            yield
        ended = "finished"
    except Interrupted:
        ended = "interrupted"
        raise
    finally:
        for tracker in accelerator.trackers:
            _guarded(tracker, partial(_close, ended=ended), note)
        accelerator.trackers.clear()
        accelerator.end_training()


def _open(name: str, recipe: Recipe, folder: Path, started: list[Any]) -> None:
    """Start a tracker, put it among `started`, give it the recipe: settings by name, a text where it keeps texts."""
    tracker = make(name, folder)
    try:
        tracker.start()
        started.append(tracker)
        tracker.store_init_configuration(settings_of(recipe))
        if name == "tensorboard":
            tracker.log({"recipe": f"```yaml\n{recipe.dump()}```"}, step=0)
        elif name == "mlflow":
            import mlflow

            mlflow.log_text(recipe.dump(), "recipe.yaml")
    except Exception as error:  # whatever a tracker raises is its own
        hint = HINTS.get(name, "train without it")
        raise UsageError(f"--report-to {name}: {first_line(error)}", hint=hint) from error


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe as trackers take it: `section.key` to a text, number or boolean; what is empty is left out."""
    plain = {key: value for key, value in leaves(recipe.model_dump()).items() if value is not None and value != {}}
    return {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in plain.items()}


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


def track(accelerator: Accelerator, prefix: str, row: Mapping[str, Any], note: Note) -> None:
    """Send a metrics row to the open trackers, if there are any. One that fails is let go, and `note` told: once."""
    values = {f"{prefix}/{key}": value for key, value in numbers(row).items() if key != "step"}
    _send(accelerator, lambda tracker: tracker.log(values, step=row["step"]), note)


def track_tables(accelerator: Accelerator, tables: Sequence[RunTable], step: int, note: Note) -> None:
    """Send the tables of a run's end to the open trackers; one that fails does so as in `track`."""

    def log(tracker: Any) -> None:
        for table in tables:
            _log_table(tracker, table, step)

    _send(accelerator, log, note)


def _send(accelerator: Accelerator, act: Callable[[Any], object], note: Note) -> None:
    for tracker in list(accelerator.trackers):
        if not _guarded(tracker, act, note):
            accelerator.trackers.remove(tracker)


def _log_table(tracker: Any, table: RunTable, step: int) -> None:
    name = f"tables/{table.name}"
    if tracker.name == "tensorboard":
        tracker.log({name: table.markdown()}, step=step)
    elif tracker.name == "wandb":
        tracker.log_table(name, columns=list(table.columns), data=[list(row) for row in table.rows], step=step)
    elif tracker.name == "mlflow":
        import mlflow

        mlflow.log_table(table.by_column(), f"{name}.json")
    else:
        import trackio

        tracker.log({name: trackio.Table(data=table.by_row())}, step=step)


def _close(tracker: Any, ended: str) -> None:
    """Close a tracker and have it show how the run ended: finished, interrupted or failed."""
    if tracker.name == "wandb":
        tracker.tracker.finish(exit_code=int(ended != "finished"))
    elif tracker.name == "mlflow":
        import mlflow

        mlflow.end_run({"finished": "FINISHED", "interrupted": "KILLED"}.get(ended, "FAILED"))
    elif tracker.name == "trackio":
        import trackio

        trackio.finish()  # the run's own leaves it open for Python's end, where it writes to stdout
    else:
        tracker.finish()


def _guarded(tracker: Any, act: Callable[[Any], object], note: Note) -> bool:
    """Do something with a tracker; False if that failed, and `note` is told."""
    try:
        with redirect_stdout(sys.stderr):
            act(tracker)
    except Interrupted:
        raise
    except Exception as error:  # whatever a tracker raises is its own
        said = f"{tracker.name} failed and gets no more rows: {first_line(error)}"
        note(f"warning: {said}; training goes on, metrics.jsonl has all")
        return False
    return True
