"""Where a run's rows go: `metrics.jsonl`, the trackers, whoever watches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator

from sampo_cli import metrics
from sampo_cli.disk import flush
from sampo_cli.tracking import track

METRICS_FILE = "metrics.jsonl"


class View(Protocol):
    """Whatever shows the progress."""

    def train_row(self, row: Mapping[str, Any]) -> None: ...
    def eval_row(self, row: Mapping[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


class Journal:
    """Writes down rows of kind `train` and `eval`.

    Attributes:
        seconds: what the steps took, all of them since the run began.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, view: View) -> None:
        self.path, self.accelerator, self.view = folder / METRICS_FILE, accelerator, view
        self.seconds = 0.0

    def write(self, row: Mapping[str, Any]) -> None:
        """The file first: what it cannot take, nobody is shown.

        Raises:
            SampoError: the disk is full.
        """
        metrics.append(self.path, row)
        self.seconds += row.get("seconds", 0.0)
        track(self.accelerator, row["kind"], row, self.view.note)
        (self.view.eval_row if row["kind"] == "eval" else self.view.train_row)(row)

    def put_on_disk(self) -> None:
        """Before a checkpoint, which relies on the rows so far."""
        if self.path.is_file():
            flush(self.path)

    def go_back(self, step: int, *, evaluated: bool) -> None:
        """Drop the rows after `step`, and its evaluation unless it was over: a resumed run will write them again."""

        def belongs(row: Mapping[str, Any]) -> bool:
            return bool(row["step"] < step or (row["step"] == step and (evaluated or row["kind"] == "train")))

        kept = metrics.keep(self.path, belongs)
        self.seconds = sum(row.get("seconds", 0.0) for row in kept)
        last = kept[-1]["step"] if kept else 0
        if last < step:
            self.view.note(f"warning: {self.path} ends with step {last}, and the checkpoint is of step {step}")
