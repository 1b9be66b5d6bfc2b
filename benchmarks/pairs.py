"""The pairs of a benchmark's steps: from a source, as sampo tokenizes it, or random ones of a given length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.settings import Settings, Variant, recipe_of
from sampo_cli.batch import Pair, epoch_order, step_indices
from sampo_cli.errors import UsageError
from sampo_cli.plan import make_plan

PROMPT_SHARE = 3 / 8
"""Of a random pair's length; UltraFeedback's prompts are 0.39 of prompt and longer response."""


class Silent:
    """A view that shows nothing."""

    def note(self, text: str) -> None: ...
    def train_row(self, row: Any) -> None: ...
    def eval_row(self, row: Any) -> None: ...
    def generate_row(self, row: Any) -> None: ...


class PairList(list[Pair]):
    """Pairs in memory by ascending id, with the ids and lengths that the trainer plans by."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        super().__init__(sorted(pairs, key=lambda pair: pair.pair_id))
        self.pair_ids = np.array([pair.pair_id for pair in self])
        self.prompt_tokens, self.chosen_tokens, self.rejected_tokens = (
            np.array([len(getattr(pair, part)) for pair in self], np.int32) for part in ("prompt", "chosen", "rejected")
        )


def synthetic_pairs(count: int, length: int, vocabulary: int, seed: int) -> list[Pair]:
    """Random tokens: prompt plus longer response are `length`, the shorter response half of the longer one or more."""
    rng = np.random.default_rng(seed)
    prompt = max(1, round(length * PROMPT_SHARE))
    longer = max(1, length - prompt)
    pairs = []
    for number in range(count):
        lengths = [longer, int(rng.integers((longer + 1) // 2, longer + 1))]
        rng.shuffle(lengths)
        tokens = (rng.integers(3, vocabulary, n, dtype=np.int32) for n in (prompt, *lengths))
        pairs.append(Pair(number, *tokens))
    return pairs


def pairs_of(settings: Settings) -> PairList:
    """As many pairs as the timed steps of an epoch hold, drawn at random with the settings' seed.

    Raises:
        UsageError: a synthetic source that is not written as synthetic:PAIRS:LENGTH, or too few pairs.
        DataError, ModelError: see `sampo_cli.plan.make_plan`.
    """
    found: Sequence[Pair] | Any
    if settings.data.startswith("synthetic:"):
        count, length = _synthetic_sizes(settings.data)
        found = synthetic_pairs(count, length, vocabulary_of(settings.model), settings.seed)
    else:
        found = make_plan(recipe_of(settings, Variant("dpo", "dpo")), Silent()).dataset
    if len(found) < settings.pairs:
        raise UsageError(
            f"{settings.data} has {len(found):,} pairs, and {settings.steps} steps of {settings.pairs_per_step} take "
            f"{settings.pairs:,}",
            hint="lower --steps or --pairs-per-step",
        )
    return PairList(found[int(index)] for index in epoch_order(len(found), settings.seed, 0)[: settings.pairs])


def _synthetic_sizes(source: str) -> tuple[int, int]:
    try:
        _, count, length = source.split(":")
        return int(count), int(length)
    except ValueError as error:
        raise UsageError(f"--data {source}: expected synthetic:PAIRS:LENGTH, as in synthetic:64:1024") from error


def vocabulary_of(model: str) -> int:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(Path(model)).get_text_config().vocab_size


def order_of(settings: Settings) -> list[tuple[int, list[int]]]:
    """Epoch and pairs of each step, as a run visits them, after `warmup_steps` that are not timed.

    The run's first two steps, timed or not, are over the same pairs: there losses are compared.
    """
    total = settings.steps * settings.epochs
    steps = [step_indices(settings.pairs, settings.pairs_per_step, settings.seed, step) for step in range(total)]
    order = [(epoch, indices.tolist()) for epoch, indices in steps]
    return [order[0], *islice(cycle(order), settings.warmup_steps - 1), *order]


def step_sizes(pairs: Sequence[Pair]) -> dict[str, int]:
    """Of a step: `pairs`, `response_tokens`, and `needed_tokens`, which count each prompt once."""
    responses = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    needed = responses + sum(len(pair.prompt) for pair in pairs)
    return {"pairs": len(pairs), "response_tokens": responses, "needed_tokens": needed}
