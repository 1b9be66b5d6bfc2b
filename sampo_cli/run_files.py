"""What a run's folder says of the run, whole or not: its state, recipe and rows. Reads files, never writes; no weights.

The files may come from anybody: a value of another type than expected counts as not there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sampo_cli import metrics
from sampo_cli.card_facts import Tree, list_of, read_tree, tree_of
from sampo_cli.errors import ModelError, UsageError
from sampo_cli.lock import refuse_held

SUMMARY = "summary.json"
CRASHED = "crashed"


@dataclass(frozen=True)
class RunFiles:
    """One run.

    Attributes:
        state: running, finished, interrupted, failed; crashed where it says running and no process is at it.
        rows: of metrics.jsonl, those of steps, evaluations and generations.
        held_out: of held_out.jsonl, the pairs of the last evaluation.
    """

    folder: Path
    state: str
    recipe: Tree = field(repr=False)
    summary: Tree = field(repr=False)
    rows: list[metrics.Row] = field(repr=False)
    held_out: list[Tree] = field(repr=False)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def method(self) -> str:
        return text_of(tree_of(self.summary.get("method")).get("name"))

    @property
    def model(self) -> str:
        return text_of(tree_of(self.summary.get("model")).get("name"))

    @property
    def data(self) -> str:
        return ", ".join(map(text_of, list_of(tree_of(self.recipe.get("data")).get("sources"))))

    def of_kind(self, kind: str) -> list[metrics.Row]:
        """The rows of one kind: `train`, `eval` or `generate`."""
        return [row for row in self.rows if row.get("kind") == kind]


def text_of(value: object) -> str:
    return value if isinstance(value, str) else ""


def number_of(value: object) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < float("inf") else None


def read_run(folder: Path) -> RunFiles:
    """Everything that the folder of a run says.

    Raises:
        UsageError: there is no such folder, or it is not a run's.
        ModelError: one of its files is broken.
    """
    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}", hint="`sampo runs` lists the runs in a folder")
    if not (folder / SUMMARY).is_file():
        raise UsageError(f"not a run's folder: {folder} has no {SUMMARY}", hint="give a folder that sampo train wrote")
    summary = read_tree(folder / SUMMARY)
    return RunFiles(
        folder=folder,
        state=_state(folder, text_of(summary.get("state"))),
        recipe=read_tree(folder / "recipe.yaml"),
        summary=summary,
        rows=metrics.read(folder / "metrics.jsonl"),
        held_out=json_lines(folder / "held_out.jsonl"),
    )


def _state(folder: Path, said: str) -> str:
    """A run that was killed still says that it is running; its lock died with it."""
    if said != "running":
        return said
    try:
        refuse_held(folder)
    except (UsageError, OSError):
        return said
    return CRASHED


def find_runs(folder: Path) -> Iterator[RunFiles | tuple[Path, str]]:
    """The runs in a folder and below, newest first; a folder with broken files as its path and what is wrong.

    Raises:
        UsageError: no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}", hint="give the folder that holds the runs, or one run")
    files = [path for path in folder.rglob(SUMMARY) if not any(part.startswith(".") for part in path.parts[1:])]
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            yield read_run(path.parent)
        except (ModelError, UsageError) as error:
            yield path.parent, error.message


def json_lines(path: Path) -> list[Tree]:
    """The objects in a file of JSON lines; nothing without the file, and nothing from a line on that was cut off."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            found.append(tree_of(json.loads(line)))
        except ValueError:
            break
    return found


def headline(run: RunFiles | tuple[Path, str]) -> Tree:
    """A run in a line: nested values of JSON. A folder with broken files says what is wrong."""
    if isinstance(run, tuple):
        return {"run": str(run[0]), "state": "broken", "problem": run[1]}
    steps, best = tree_of(run.summary.get("steps")), tree_of(run.summary.get("evaluation"))
    generated = run.of_kind("generate")
    accuracies = [value for row in run.of_kind("eval") if (value := number_of(row.get("accuracy"))) is not None]
    return {
        "run": str(run.folder),
        "state": run.state,
        "method": run.method,
        "data": run.data,
        "steps": number_of(steps.get("done")),
        "planned_steps": number_of(steps.get("planned")),
        "best_accuracy": max(accuracies, default=None),
        "length_bias": number_of(tree_of(best.get("length_bias")).get("spearman")),
        "generated_tokens": number_of(generated[-1].get("tokens")) if generated else None,
        "base_tokens": number_of(generated[-1].get("base_tokens")) if generated else None,
    }
