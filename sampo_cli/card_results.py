"""What was measured of a run, for its card: numbers with the Hub's `model-index`, length bias, benchmarks, figures.

Everything is read from the run's files; nothing is measured here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sampo_cli.card_facts import Facts, Tree, list_of, tree_of
from sampo_cli.errors import ModelError
from sampo_cli.fingerprint import read_json
from sampo_cli.length_bias import BUCKETS
from sampo_cli.plots import is_installed, png
from sampo_cli.run_files import number_of, read_run, text_of
from sampo_cli.run_report import sections_of

_NAME = re.compile(r"[\w .:+,()-]{1,100}")
"""What a task, its title and its metric look like: no markup, no path."""

_HELD_OUT = (("accuracy", "Held-out preference accuracy", "accuracy"), ("loss", "Held-out loss", "loss"))
"""Type and name of a metric, and its key in an evaluation's row."""


@dataclass(frozen=True)
class Plot:
    """A figure as it is published: path in the repository, words for who cannot see it, PNG."""

    path: str
    alt: str
    content: bytes


def plots_of(run: Path | None) -> list[Plot]:
    """The figures of a run's report; none without a run, its rows, or matplotlib."""
    if run is None or not is_installed():
        return []
    charts = [chart for section in sections_of([read_run(run)]) for chart in section.charts]
    return [Plot(f"plots/{chart.key}.png", chart.alt, png(chart.draw)) for chart in charts]


def benchmarks_of(run: Path | None) -> list[Tree]:
    """The rows of every suite that `sampo eval` wrote into the run's folder: task, metric, value, stderr, shots."""
    rows: list[Tree] = []
    for path in sorted((run / "eval").glob("*.json")) if run else []:
        try:
            found = read_json(path)
        except ModelError:
            continue  # a list of answers, or broken: not a suite
        rows += [tree_of(row) for row in list_of(tree_of(found).get("results"))]
    named = [row for row in rows if all(_NAME.fullmatch(text_of(row.get(key))) for key in ("task", "title", "metric"))]
    return [row for row in named if number_of(row.get("value")) is not None]


def index_of(facts: Facts, benchmarks: Sequence[Tree]) -> list[Any]:
    """The results as huggingface_hub's `EvalResult`, which become the card's `model-index`."""
    from huggingface_hub import EvalResult

    only = facts.datasets[0] if len(facts.datasets) == 1 and not facts.local_data else None
    held_out = tree_of(facts.summary.get("evaluation"))
    kind, name = only or "preference-pairs", f"{only or 'preference pairs'}, held out"
    found: list[tuple[str, str, str, str, Any]] = [
        (kind, name, metric_type, metric_name, held_out.get(key)) for metric_type, metric_name, key in _HELD_OUT
    ]
    for row in benchmarks:
        metric = row["metric"]
        found.append((row["task"], row["title"], metric.partition(",")[0], metric, row["value"]))
    results = [
        EvalResult(
            "text-generation",
            dataset_type=kind,
            dataset_name=name,
            metric_type=metric_type,
            metric_name=metric_name,
            metric_value=value,
        )
        for kind, name, metric_type, metric_name, value in found
        if number_of(value) is not None
    ]
    return results


def bucket_rows(held_out: Tree) -> list[tuple[str, object]]:
    """Accuracy by how long the chosen response is, of an evaluation's row, with the number of pairs."""
    buckets = [tree_of(bucket) for bucket in list_of(tree_of(held_out.get("length_bias")).get("buckets"))]
    known = {text_of(bucket.get("name")): bucket for bucket in buckets}
    rows: list[tuple[str, object]] = []
    for name in BUCKETS:
        accuracy, pairs = (number_of(known.get(name, {}).get(key)) for key in ("accuracy", "pairs"))
        if accuracy is not None and pairs:
            rows.append((f"{name} ({pairs:.0f} pairs)", accuracy))
    return rows
