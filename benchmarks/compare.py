"""From what the contenders report to figures: pairs per second, tokens, memory, ratios, and whether losses agree.

Warm-up steps count for the losses and for the peak of memory, not for time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

MEBIBYTE = 2**20

FRESH_TOLERANCE = 1e-4
"""Before the first update both losses are ln 2 but for the rounding of a mean."""

TOKEN_ROUNDING = {"float32": 1e-5, "float16": 0.01, "bfloat16": 0.06}
"""Standard deviation of the log-ratio of a token, in nats, that comes of rounding alone: SmolLM2's, with adapters too
small to matter, in bfloat16; float16 has eight times finer steps."""

DEVIATIONS = 4

UPDATE_SHARE = {"float32": 0.01, "float16": 0.1, "bfloat16": 0.2}
"""By what share an update's effect may differ: AdamW's first update is nearly the sign of the gradient, and where the
gradient is nothing but rounding, so is its sign."""

Rows = Sequence[Mapping[str, Any]]


class Disagreement(Exception):
    """Two contenders that ought to compute the same loss do not; the text says by how much."""


def timed_rows(rows: Rows) -> Rows:
    return [row for row in rows if row["timed"]]


def figures(facts: Mapping[str, Any], rows: Rows) -> dict[str, Any]:
    """Totals of one contender over its timed steps, and over the pass of the reference where there was one.

    The search for the budget, which takes seconds once in a run of hours, counts for memory and not for time.
    """
    timed, prepared = timed_rows(rows), facts["prepared"]
    reference = prepared.get("reference", {"seconds": 0.0, "cpu_seconds": 0.0})
    seconds = sum(row["seconds"] for row in timed) + reference["seconds"]
    cpu_seconds = sum(row["cpu_seconds"] for row in timed) + reference["cpu_seconds"]
    pairs, computed, needed = (sum(row[key] for row in timed) for key in ("pairs", "computed_tokens", "needed_tokens"))
    peak = max(part["peak_bytes"] for part in [*prepared.values(), *rows])
    return {
        "pairs_per_second": pairs / seconds,
        "pairs_per_cpu_second": pairs / cpu_seconds,
        "seconds_per_step": sum(row["seconds"] for row in timed) / len(timed),
        "reference_seconds": reference["seconds"],
        "computed_per_needed": computed / needed,
        "peak_mib": peak / MEBIBYTE,
        "peak_above_model_mib": (peak - facts["settled_bytes"]) / MEBIBYTE,
    }


def ratios(ours: Mapping[str, Any], our_rows: Rows, theirs: Mapping[str, Any], their_rows: Rows) -> dict[str, Any]:
    """Ours against theirs: pairs per second (more is better) with the least and the most of any step, and memory.

    The spread is that of steps alone; a pass of the reference before them counts in the ratio.
    """
    walls, cpus = (
        [theirs[key] / ours[key] for ours, theirs in zip(timed_rows(our_rows), timed_rows(their_rows), strict=True)]
        for key in ("seconds", "cpu_seconds")
    )
    return {
        "pairs_per_second": ours["pairs_per_second"] / theirs["pairs_per_second"],
        "pairs_per_second_spread": [min(walls), max(walls)],
        "pairs_per_cpu_second": ours["pairs_per_cpu_second"] / theirs["pairs_per_cpu_second"],
        "pairs_per_cpu_second_spread": [min(cpus), max(cpus)],
        "peak_above_model": ours["peak_above_model_mib"] / theirs["peak_above_model_mib"],
        "peak": ours["peak_mib"] / theirs["peak_mib"],
    }


def margin_of(loss: float) -> float:
    """The margin (times beta) of a pair whose -log sigmoid is `loss`; 0 at ln 2.

    Losses are compared by it, because two losses near 0 are near each other whatever the margins.
    """
    return -math.log(math.expm1(loss)) if loss > 0 else math.nan


def tolerance(row: Mapping[str, Any], dtype: str, beta: float, margin: float) -> float:
    """By how much two margins (times beta) may differ that are the same but for rounding.

    A margin sums the log-ratios of T tokens, so rounding moves the mean margin of a step's B pairs by
    rounding * sqrt(T / B), and the difference of two trainers by sqrt(2) times that.

    Args:
        row: of a step; B is `pairs`, T is `response_tokens` / `pairs`.
        margin: what the update made of it.
    """
    tokens = row["response_tokens"] / row["pairs"]
    rounding = math.sqrt(2) * beta * TOKEN_ROUNDING[dtype] * math.sqrt(tokens / row["pairs"])
    return FRESH_TOLERANCE + DEVIATIONS * rounding + UPDATE_SHARE[dtype] * abs(margin)


def agreement(
    ours: Rows, theirs: Rows, *, same_loss: bool, dtype: str, beta: float, cached: bool = False
) -> dict[str, float]:
    """Differences of the two losses before the first update and after it, and of the margin that the update made.

    Both start from one adapter, so the first loss is ln 2 for both. The second is the first that says whether loss,
    gradient, clipping and optimizer agree. It is over the same pairs again, so that one update moves it furthest; it
    says something where the margin is larger than what is allowed.

    Args:
        same_loss: False for methods that trl's DPO does not compute: only their first loss must agree.
        dtype: the compute dtype.
        beta: ours.
        cached: a reference was computed beforehand, in other batches, so that even the first margins are rounded.

    Raises:
        Disagreement: by more than rounding.
    """
    first, second = (abs(ours[k]["loss"] - theirs[k]["loss"]) for k in (0, 1))
    allowed_at_first = tolerance(ours[0], dtype, beta, 0.0) if cached else FRESH_TOLERANCE
    if not first <= allowed_at_first:  # nan disagrees
        raise Disagreement(
            f"the losses before the first update differ by {first:.2g}: {ours[0]['loss']:.6f} against "
            f"{theirs[0]['loss']:.6f}; the two do not compute the same thing"
        )
    margin, their_margin = (margin_of(rows[1]["loss"]) for rows in (ours, theirs))
    allowed = tolerance(ours[1], dtype, beta, margin)
    if same_loss and not abs(margin - their_margin) <= allowed:
        raise Disagreement(
            f"after the first update the margins (times beta) are {margin:.4f} and {their_margin:.4f}, and in {dtype} "
            f"rounding explains a difference of {allowed:.2g}; the two do not compute the same thing"
        )
    return {"first": first, "second": second, "margin": margin, "their_margin": their_margin, "allowed": allowed}
