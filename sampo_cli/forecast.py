"""Will it fit: the budget that a device has room for, and what to change where it has none.

Tries what the trainer will try before its first step (`budget.py`), on a skeleton instead of a policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sampo_cli.batch import row_positions
from sampo_cli.budget import START_TOKENS, worst_groups
from sampo_cli.config import Recipe
from sampo_cli.footprint import Footprint, Rehearsal
from sampo_cli.target import ON_CUDA, Device
from sampo_cli.workload import Lengths

LENGTH_STEP = 64
"""Maximal lengths that are suggested are multiples of this."""


@dataclass(frozen=True)
class Forecast:
    """A budget and what it needs.

    Attributes:
        tokens: positions of a micro-batch.
        longest: (rows, positions of a row) of the micro-batch that needs most.
        footprint: of a step with it.
        needed: bytes, the framework's included.
        fits: within the device's room.
    """

    tokens: int
    longest: tuple[int, int]
    footprint: Footprint
    needed: int
    fits: bool


def forecast(rehearsal: Rehearsal, lengths: Lengths, device: Device) -> Forecast:
    """The largest budget that fits, searched as the trainer searches it; else the smallest, which does not fit.

    Args:
        lengths: of the pairs to train on.

    Raises:
        ModelError: the architecture cannot be run without its weights.
    """
    if rehearsal.recipe.train.tokens_per_microbatch:
        return smallest(rehearsal, lengths, device)
    tokens = START_TOKENS[device.kind]
    most = _attempt(rehearsal, lengths, tokens, device)
    if most.fits:
        return most
    least = smallest(rehearsal, lengths, device)
    while least.fits and (tokens := tokens // 2) > least.tokens:
        found = _attempt(rehearsal, lengths, tokens, device)
        if found.fits:
            return found
    return least


def smallest(rehearsal: Rehearsal, lengths: Lengths, device: Device) -> Forecast:
    """With the budget that the recipe gives, or the smallest that the trainer tries: what the longest pair exceeds.

    Raises:
        ModelError: see `forecast`.
    """
    tokens, longest = START_TOKENS[device.kind], int(row_positions(lengths, rehearsal.layout).max())
    while tokens > longest:
        tokens //= 2
    return _attempt(rehearsal, lengths, rehearsal.recipe.train.tokens_per_microbatch or tokens, device)


def _attempt(rehearsal: Rehearsal, lengths: Lengths, tokens: int, device: Device) -> Forecast:
    settings, layout = rehearsal.recipe.train, rehearsal.layout
    step = min(settings.batch_pairs, len(lengths))
    most_pairs = min(settings.pairs_per_microbatch or step, step)
    rows = row_positions(lengths, layout)
    several = most_pairs < step or step * int(rows.max()) > tokens  # micro-batches, in some step
    found = []
    for group in worst_groups(rows, tokens, most_pairs):
        pairs = [lengths[index] for index in group]
        shapes = [pair.row_lengths(layout) for pair in pairs]
        longest = sum(map(len, shapes)), max(map(max, shapes))
        found.append((rehearsal.footprint(pairs, others=several), longest))
    footprint, longest = max(found, key=lambda one: one[0].total)
    return Forecast(tokens, longest, footprint, footprint.total + device.framework, footprint.total <= device.room)


@dataclass(frozen=True)
class Change:
    """Something to change, what the run would need then, and whether that fits."""

    flags: str
    needed: int
    fits: bool


Rehearse = Callable[[Recipe], Rehearsal]


def changes(recipe: Recipe, lengths: Lengths, device: Device, rehearse: Rehearse) -> list[Change]:
    """What to change where nothing fits, each tried alone; together if nothing alone is enough.

    All is tried with the smallest budget. What costs only time comes first, then what costs precision, then shorter
    pairs, then a smaller adapter.
    """
    found = []
    together = recipe
    flags: list[str] = []
    for flag, update in _updates(recipe, device):
        found.append(_tried(flag, _with(recipe, update), lengths, device, rehearse))
        together, flags = _with(together, update), [*flags, flag]
    found.append(_shorter("", recipe, lengths, device, rehearse))
    if recipe.lora.r > 1 and not recipe.model.adapter:
        smaller = max(1, recipe.lora.r // 4)
        update = {"lora": {"r": smaller}}
        found.append(_tried(f"--lora-r {smaller}", _with(recipe, update), lengths, device, rehearse))
    if not any(change.fits for change in found) and flags:
        both = " ".join(flags)
        whole = _tried(both, together, lengths, device, rehearse)
        found.append(whole if whole.fits else _shorter(f"{both} ", together, lengths, device, rehearse))
    return sorted(found, key=lambda change: not change.fits)


def _updates(recipe: Recipe, device: Device) -> Iterator[tuple[str, Mapping[str, Mapping[str, Any]]]]:
    """Flags and what they change, of what leaves the pairs and the adapter as they are."""
    if recipe.train.tokens_per_microbatch:
        yield "--set train.tokens_per_microbatch=null", {"train": {"tokens_per_microbatch": None}}
    if recipe.train.checkpointing != "all":
        yield "--set train.checkpointing=all", {"train": {"checkpointing": "all"}}
    if device.kind == ON_CUDA and recipe.train.optimizer == "adamw":
        yield "--set train.optimizer=paged_adamw_8bit", {"train": {"optimizer": "paged_adamw_8bit"}}
    if device.kind == ON_CUDA and not recipe.train.offload_activations:
        yield "--set train.offload_activations=true", {"train": {"offload_activations": True}}
    if recipe.model.quantization != "nf4":
        yield "--quantization nf4", {"model": {"quantization": "nf4"}}


def _with(recipe: Recipe, update: Mapping[str, Mapping[str, Any]]) -> Recipe:
    sections = {name: getattr(recipe, name).model_copy(update=dict(keys)) for name, keys in update.items()}
    return recipe.model_copy(update=sections)


def _tried(flags: str, recipe: Recipe, lengths: Lengths, device: Device, rehearse: Rehearse) -> Change:
    found = smallest(rehearse(recipe), lengths, device)
    return Change(flags, found.needed, found.fits)


def _shorter(flags: str, recipe: Recipe, lengths: Lengths, device: Device, rehearse: Rehearse) -> Change:
    """The largest `--max-length` that fits, by bisection; a quarter of what there is if none does."""
    rehearsal = rehearse(recipe)
    least = recipe.data.min_prompt_tokens

    def at(length: int) -> Forecast:
        return smallest(rehearsal, lengths.cut(length, least), device)

    longest = int((lengths.prompt_tokens + np.maximum(lengths.chosen_tokens, lengths.rejected_tokens)).max())
    high = longest // LENGTH_STEP
    low = max(1, high // 4)
    best = at(low * LENGTH_STEP)
    while best.fits and high - low > 1:
        middle = (low + high) // 2
        tried = at(middle * LENGTH_STEP)
        low, high, best = (middle, high, tried) if tried.fits else (low, middle, best)
    return Change(f"{flags}--max-length {low * LENGTH_STEP}", best.needed, best.fits)
