"""What a run reached, as tables for trackers: held-out numbers, accuracy by length, rounds, pairs, answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sampo_cli.metrics import numbers
from sampo_cli.run_files import json_lines

MOST_ANSWERS = 20
ANSWER_KEYS = ("prompt", "base", "answer", "base_tokens", "tokens")
ROUND_KEYS = ("loss", "accuracy", "margin")


@dataclass(frozen=True)
class RunTable:
    """A table of texts and numbers; a column holds one kind, or None."""

    name: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def markdown(self) -> str:
        cells = [self.columns, ("---",) * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in cells)

    def by_column(self) -> dict[str, list[Any]]:
        return {column: [row[place] for row in self.rows] for place, column in enumerate(self.columns)}

    def by_row(self) -> list[dict[str, Any]]:
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def final_tables(summary: Mapping[str, Any], folder: Path) -> list[RunTable]:
    """The tables of a finished run that have rows.

    Args:
        summary: as in summary.json.
        folder: the run's, for its answers.
    """
    evaluation = summary["evaluation"] or {}
    rounds = [row for row in (*summary["rounds"], evaluation) if row] if summary["rounds"] else []
    answers = {row.get("prompt"): row for row in json_lines(folder / "generations.jsonl")}
    found = [
        RunTable("held_out", ("metric", "value"), [(key, float(value)) for key, value in numbers(evaluation).items()]),
        RunTable("accuracy_by_length", ("chosen is", "pairs", "accuracy", "as DPO's sum"), list(_buckets(evaluation))),
        RunTable(
            "rounds",
            ("round", *ROUND_KEYS),
            [(number, *(row[key] for key in ROUND_KEYS)) for number, row in enumerate(rounds, 1)],
        ),
        RunTable("pairs", ("pairs", "number"), [(key, int(value)) for key, value in numbers(summary["pairs"]).items()]),
        RunTable(
            "answers",
            ANSWER_KEYS,
            [tuple(row.get(key) for key in ANSWER_KEYS) for row in list(answers.values())[:MOST_ANSWERS]],
        ),
    ]
    return [table for table in found if table.rows]


def _buckets(evaluation: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Accuracy by how long the chosen response is: of the method's margin, and of DPO's on the same pairs."""
    own, summed = ((evaluation.get(key) or {}).get("buckets", []) for key in ("length_bias", "sum_length_bias"))
    for bucket, of_sum in zip(own, summed, strict=True):
        yield bucket["name"], bucket["pairs"], bucket["accuracy"], of_sum["accuracy"]
