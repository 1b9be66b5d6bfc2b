"""Where a run's rows go: `metrics.jsonl`, `held_out.jsonl`, the trackers, whoever watches."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator

from sampo_cli import metrics, ranks
from sampo_cli.disk import flush, write_text
from sampo_cli.tracking import track

METRICS_FILE, PAIRS_FILE, TEXTS_FILE = "metrics.jsonl", "held_out.jsonl", "generations.jsonl"


class View(Protocol):
    """Whatever shows the progress."""

    def train_row(self, row: Mapping[str, Any]) -> None: ...
    def eval_row(self, row: Mapping[str, Any]) -> None: ...
    def generate_row(self, row: Mapping[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


class Journal:
    """Writes down rows of kind `train`, `eval` and `generate`; of a run's processes, only the first does.

    Attributes:
        beside: the files with more about the rows of a kind.
        seconds: what the steps took, all of them since the run began.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, view: View) -> None:
        self.path, self.accelerator, self.view = folder / METRICS_FILE, accelerator, view
        self.beside = {"eval": folder / PAIRS_FILE, "generate": folder / TEXTS_FILE}
        self.seconds = 0.0

    def write(self, row: Mapping[str, Any]) -> None:
        """The file first: what it cannot take, nobody is shown.

        Raises:
            SampoError: the disk is full.
        """
        if not ranks.is_first():
            return
        metrics.append(self.path, row)
        self.seconds += row.get("seconds", 0.0)
        track(self.accelerator, row["kind"], row, self.view.note)
        show = {"train": self.view.train_row, "eval": self.view.eval_row, "generate": self.view.generate_row}
        show[row["kind"]](row)

    def write_pairs(self, step: int, pairs: Sequence[Mapping[str, Any]]) -> None:
        """The held-out pairs of an evaluation, in place of those of the one before.

        Raises:
            SampoError: the disk is full.
        """
        if not ranks.is_first():
            return
        lines = [json.dumps({"step": step, **pair}) + "\n" for pair in pairs]
        write_text(self.beside["eval"], "".join(lines))

    def put_on_disk(self) -> None:
        """Before a checkpoint, which relies on the rows so far."""
        if not ranks.is_first():
            return
        for path in (self.path, *self.beside.values()):
            if path.is_file():
                flush(path)

    def go_back(self, step: int, *, evaluated: bool, answered: bool) -> None:
        """Drop the rows after `step`, and of `step` the evaluation and the answers unless they were over.

        A resumed run will write them again.
        """
        if not ranks.is_first():
            return
        last = {"train": step, "eval": step if evaluated else step - 1, "generate": step if answered else step - 1}
        for kind, path in self.beside.items():
            if path.is_file():
                metrics.keep(path, partial(_until, last[kind]))
        kept = metrics.keep(self.path, lambda row: _until(last[row["kind"]], row))
        self.seconds = sum(row.get("seconds", 0.0) for row in kept)
        reached = kept[-1]["step"] if kept else 0
        if reached < step:
            self.view.note(f"warning: {self.path} ends with step {reached}, and the checkpoint is of step {step}")


def _until(last: int, row: Mapping[str, Any]) -> bool:
    return bool(row["step"] <= last)
