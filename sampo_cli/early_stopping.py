"""When a run ends before its last step: a metric that no longer gets better, answers that drift in length.

Numbers in, a reason out; what is remembered stands in the run's progress, so a resumed run goes on counting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sampo_cli.config import StoppingConfig
from sampo_cli.errors import UsageError, nearest
from sampo_cli.length_bias import BUCKETS
from sampo_cli.metrics import numbers

LOW, HIGH = "low", "high"
Aim = str | float
"""What is better: lower, higher, or nearer to a number."""

_BUCKET_ACCURACIES: dict[str, Aim] = {
    f"{key}.buckets.{name.replace(' ', '_')}.accuracy": HIGH
    for key in ("length_bias", "sum_length_bias")
    for name in BUCKETS
}
_KL: dict[str, Aim] = dict.fromkeys(("kl_per_token", "kl_per_response", "kl_per_token_k1", "kl_per_response_k1"), LOW)
_LOW: dict[str, Aim] = dict.fromkeys(("loss", "rejected_reward", "rejected_logps"), LOW)
_HIGH: dict[str, Aim] = dict.fromkeys(
    ("chosen_reward", "margin", "accuracy", "chosen_logps", "sum_margin", "sum_accuracy"), HIGH
)
_BIAS: dict[str, Aim] = {"length_bias.spearman": 0.0, "sum_length_bias.spearman": 0.0}

AIMS: dict[str, dict[str, Aim]] = {
    "eval": _LOW | _HIGH | _KL | _BIAS | _BUCKET_ACCURACIES,
    "generate": {"tokens": LOW, "median_tokens": LOW, "ended": HIGH, "repetition": LOW, "length_ratio": 1.0},
}
"""The metrics by the kind of row that they stand in. Counts, and numbers of the base alone, are none."""


@dataclass
class Waiting:
    """What was seen so far.

    Attributes:
        metric: that was looked at; a resumed run may look at another.
        best: its best value; None before the first.
        rows: rows since then that were no better.
        length_ratio: of the newest answers, to the base's.
    """

    metric: str | None = None
    best: float | None = None
    rows: int = 0
    length_ratio: float | None = None


def kind_of(metric: str) -> str:
    """The kind of row that a metric stands in.

    Raises:
        UsageError: there is no such metric.
    """
    for kind, aims in AIMS.items():
        if metric in aims:
            return kind
    known = [name for aims in AIMS.values() for name in aims]
    raise UsageError(
        f"train.early_stopping.metric: there is no '{metric}'{nearest(metric, known)}",
        hint=f"known: {', '.join(name for name in known if '.buckets.' not in name)}; docs/reference.md has all",
    )


def check(settings: StoppingConfig, *, answers: bool, reference: bool) -> None:
    """Refuse what could never come true, before anything is loaded.

    Args:
        answers: prompts are answered while training.
        reference: the method has one.

    Raises:
        UsageError: no such metric, or rows that will not have it.
    """
    kind = kind_of(settings.metric) if settings.metric else None
    if settings.metric in _KL and not reference:
        raise UsageError(f"train.early_stopping.metric: no {settings.metric}, as the method has no reference")
    if (kind == "generate" or settings.max_length_drift) and not answers:
        key = "metric" if kind == "generate" else "max_length_drift"
        raise UsageError(
            f"train.early_stopping.{key}: nothing is generated while training",
            hint="--set train.generate.prompts=16",
        )


def take_in(settings: StoppingConfig, waiting: Waiting, row: Mapping[str, Any]) -> None:
    """Count a row of kind eval or generate. One that does not know the metric (None) does not count."""
    if row["kind"] == "generate":
        waiting.length_ratio = row["length_ratio"]
    if waiting.metric != settings.metric:
        waiting.metric, waiting.best, waiting.rows = settings.metric, None, 0
    aim = AIMS[row["kind"]].get(settings.metric or "")
    value = numbers(row).get(settings.metric or "")
    if aim is None or value is None:
        return
    if waiting.best is None or _distance(aim, value) < _distance(aim, waiting.best):
        waiting.best, waiting.rows = value, 0
    else:
        waiting.rows += 1


def reason(settings: StoppingConfig, waiting: Waiting) -> str | None:
    """Why the run is to end now, or None."""
    drift, most = (waiting.length_ratio or 1.0) - 1.0, settings.max_length_drift
    if most is not None and abs(drift) > most:
        way = "longer" if drift > 0 else "shorter"
        return f"answers are {abs(drift):.0%} {way} than the base's, and {most:.0%} is the most allowed"
    if settings.metric and settings.metric == waiting.metric and waiting.rows >= settings.patience:
        return f"{settings.metric} was not better than {waiting.best:.4g} for {waiting.rows} rows"
    return None


def _distance(aim: Aim, value: float) -> float:
    """Smaller is better."""
    if isinstance(aim, float):
        return abs(value - aim)
    return value if aim == LOW else -value
