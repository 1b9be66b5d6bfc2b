"""What the runs of a sweep reached, beside each other: numbers, the best first, and one page about all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sampo_cli.card_facts import tree_of
from sampo_cli.plots import is_installed
from sampo_cli.run_files import SUMMARY, number_of, read_run
from sampo_cli.run_report import write_report
from sampo_cli.sweep_runs import state_of

MEASURES = ("loss", "accuracy", "margin", "kl_per_token")
REPORT = "report"


def outcome_of(folder: Path, settings: Mapping[str, Any], exit_code: int | None) -> dict[str, Any]:
    """A run of a sweep as plain data: settings, state, and what it reached on held-out pairs, None where unknown."""
    summary = read_run(folder).summary if (folder / SUMMARY).is_file() else {}
    held_out, steps = tree_of(summary.get("evaluation")), tree_of(summary.get("steps"))
    return {
        "name": folder.name,
        "folder": str(folder),
        "settings": dict(settings),
        "state": state_of(folder, exit_code),
        "exit_code": exit_code,
        **{key: number_of(held_out.get(key)) for key in MEASURES},
        "length_bias": number_of(tree_of(held_out.get("length_bias")).get("spearman")),
        "steps": number_of(steps.get("done")),
        "seconds": number_of(summary.get("seconds")),
    }


def ranked(outcomes: Sequence[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """The best first by a metric of held-out pairs; those without a number last."""
    sign = 1 if metric == "loss" else -1
    return sorted(outcomes, key=lambda one: (one[metric] is None, sign * (one[metric] or 0.0)))


def draw(folder: Path, outcomes: Sequence[Mapping[str, Any]]) -> Path | None:
    """The page about the runs that have something to show, in their order; None where there are none, or no matplotlib.

    Raises:
        ModelError: a run's file is broken.
        SampoError: the disk is full.
    """
    runs = [Path(one["folder"]) for one in outcomes if one["steps"]]
    return write_report(runs, folder / REPORT)[0] if runs and is_installed() else None


def caveats(keys: Sequence[str], metric: str) -> list[str]:
    """What to mind when such runs are compared by that metric."""
    found = []
    if metric == "loss" and any(key.startswith("method.") for key in keys):
        advice = "sort by another with --set output.best_metric=accuracy"
        found.append(f"losses of different methods, betas and the like measure different things; {advice}")
    if any(key.startswith("data.") or key == "train.seed" for key in keys):
        found.append("the runs do not hold out the same pairs")
    return found
