"""What `sampo runs` and `sampo sweep` print."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from sampo_cli.console import stdout

COLOURS = {"finished": "green", "running": "cyan", "failed": "red", "crashed": "red", "broken": "red"}
RUN_COLUMNS = ("run", "method", "data", "steps", "best\naccuracy", "length\nbias", "answers (base)", "state")
FOLDED = ("run", "data")
"""Columns of names, which are as long as people make them; the others stay in one piece."""


def print_runs(found: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """A row for each run; what a run has no number for stays empty."""
    if not found:
        stdout.print(f"no runs in {folder}", markup=False, soft_wrap=True)
        return
    rows = [_cells(run, folder) for run in found]
    table = Table(box=None, header_style="bold")
    # A column without a value goes: in 80 characters names need its room.
    shown = [place for place in range(len(RUN_COLUMNS)) if any(row[place] for row in rows)]
    for place in shown:
        table.add_column(RUN_COLUMNS[place], overflow="fold", no_wrap=RUN_COLUMNS[place] not in FOLDED)
    for row in rows:
        table.add_row(*(row[place] for place in shown))
    stdout.print(table)
    for run in found:
        if "problem" in run:
            stdout.print(f"{run['run']}: {run['problem']}", markup=False, soft_wrap=True)


def _cells(run: Mapping[str, Any], folder: Path) -> list[str]:
    path = Path(run["run"])
    name = str(path.relative_to(folder)) if path.is_relative_to(folder) and path != folder else str(path)
    steps = (
        f"{run['steps']:g}/{run['planned_steps']:g}" if run.get("steps") is not None and run["planned_steps"] else ""
    )
    accuracy = "" if run.get("best_accuracy") is None else f"{run['best_accuracy']:.3f}"
    bias = "" if run.get("length_bias") is None else f"{run['length_bias']:+.2f}"
    lengths = ""
    if run.get("generated_tokens") is not None:
        base = "" if run["base_tokens"] is None else f" ({run['base_tokens']:.0f})"
        lengths = f"{run['generated_tokens']:.0f}{base} tokens"
    data = ", ".join(Path(source).name for source in run.get("data", "").split(", "))
    plain = [name, run.get("method", ""), data, steps, accuracy, bias, lengths]
    return [*map(escape, plain), f"[{COLOURS.get(run['state'], 'yellow')}]{escape(run['state'])}[/]"]


MEASURES = {
    "loss": "{:.4f}",
    "accuracy": "{:.3f}",
    "margin": "{:+.3f}",
    "length_bias": "{:+.2f}",
    "kl_per_token": "{:.4f}",
    "steps": "{:g}",
    "seconds": "{:,.0f}",
}


def print_sweep(result: Mapping[str, Any]) -> None:
    """A row for each run, the best first; then where the page is and what to mind."""
    keys = list(result["runs"][0]["settings"])
    table = Table(box=None, header_style="bold", collapse_padding=True, pad_edge=False)
    for key in keys:
        table.add_column(re.sub("([._])", r"\1\n", key), overflow="fold")
    for key in MEASURES:
        table.add_column(key.replace("_", "\n") + " ▼" * (key == result["metric"]), no_wrap=True)
    table.add_column("state", no_wrap=True)
    for run in result["runs"]:
        settings = [escape(str(run["settings"].get(key, ""))) for key in keys]
        numbers = ["" if run[key] is None else text.format(run[key]) for key, text in MEASURES.items()]
        state = run["state"] + (f" ({run['exit_code']})" if run["exit_code"] else "")
        table.add_row(*settings, *numbers, f"[{COLOURS.get(run['state'], 'yellow')}]{escape(state)}[/]")
    stdout.print(table)
    for note in result["notes"]:
        stdout.print(f"note: {note}", markup=False, soft_wrap=True)
    best = result["runs"][0]
    facts = {"best": best["folder"]} if best[result["metric"]] is not None else {}
    facts |= {"report": result["report"]} if result["report"] else {}
    for name, value in facts.items():
        stdout.print(f"{name}: {value}", markup=False, soft_wrap=True)
