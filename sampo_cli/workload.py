"""What a run will compute, from the lengths of its pairs alone: positions, padding, scored tokens, truncation.

Exact for the first epoch and taken to be the same for the others. A million pairs take well under a second: the plan of
`batch.micro_batches` is worked out here for all steps of an epoch at once.

Legend: n pairs, K steps of an epoch, B pairs of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sampo_cli.batch import Layout, Pair, epoch_order, forward_cost, row_positions, shares, steps_per_epoch
from sampo_cli.config import MethodConfig, Recipe
from sampo_cli.dataset import PairDataset
from sampo_cli.rounds import Schedule

Counts = NDArray[np.int64]

STEPS_LOOKED_AT = 100
"""For how evenly steps can be split; more tell no more."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of each part of n pairs, int32 [n], and their ids, int64 [n]."""

    pair_ids: NDArray[np.int64]
    prompt_tokens: NDArray[np.int32]
    chosen_tokens: NDArray[np.int32]
    rejected_tokens: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.pair_ids)

    def __getitem__(self, index: int) -> Pair:
        """A pair as long as the one at `index`, of token 0 only."""
        parts = (self.prompt_tokens, self.chosen_tokens, self.rejected_tokens)
        return Pair(int(self.pair_ids[index]), *(np.zeros(int(part[index]), np.int32) for part in parts))

    def cut(self, max_length: int, min_prompt: int) -> Lengths:
        """The lengths under another `max_length`, as `pair_builder.truncate` would cut them."""
        floor = max(1, min(min_prompt, max_length // 2))
        room = max_length - np.maximum(self.chosen_tokens, self.rejected_tokens)
        prompt = np.minimum(self.prompt_tokens, np.maximum(floor, room)).astype(np.int32)
        left = (max_length - prompt).astype(np.int32)
        chosen, rejected = np.minimum(self.chosen_tokens, left), np.minimum(self.rejected_tokens, left)
        return replace(self, prompt_tokens=prompt, chosen_tokens=chosen, rejected_tokens=rejected)


def lengths_of(dataset: PairDataset, indices: list[int]) -> Lengths:
    """The lengths of some pairs of a data set."""
    parts = (dataset.prompt_tokens, dataset.chosen_tokens, dataset.rejected_tokens)
    return Lengths(dataset.pair_ids[indices], *(part[indices] for part in parts))


@dataclass(frozen=True)
class Work:
    """A run in positions and tokens.

    Attributes:
        steps: optimizer steps.
        passes: micro-batches; each is one forward pass of the policy.
        needed: positions that matter: prompt, chosen and rejected tokens of each pair once.
        computed: positions of all rows, padding and repeated prompts included.
        scored: tokens whose log-prob is worked out.
        responses: tokens of responses.
    """

    steps: int
    passes: int
    needed: int
    computed: int
    scored: int
    responses: int


def scored_tokens(lengths: Lengths, method: MethodConfig) -> Counts:
    """Tokens of each pair that get a weight, [n]: all, or those that are drawn; expected where draws may coincide."""
    chosen, rejected = lengths.chosen_tokens, lengths.rejected_tokens
    if method.reduction != "sample":
        return chosen + rejected
    draws = method.draws * (2 if method.sampling == "independent" else 1)
    shorter = np.minimum(chosen, rejected)
    kept = [side * (1 - (1 - shorter / side) ** draws) for side in (chosen, rejected)]
    if method.sft_weight:
        kept[0] = chosen.astype(float)
    return np.rint(kept[0] + kept[1]).astype(np.int64)


def work(lengths: Lengths, schedule: Schedule, recipe: Recipe, layout: Layout, budget: int) -> Work:
    """What the rounds of a run compute, each as many times its first epoch as it has epochs.

    Args:
        lengths: of all training pairs, in the order of `schedule`'s indices.
        schedule: whose parts are indices into `lengths`.
        budget: positions of a micro-batch.
    """
    rows, scored = row_positions(lengths, layout), scored_tokens(lengths, recipe.method)
    responses = lengths.chosen_tokens + lengths.rejected_tokens
    needed = lengths.prompt_tokens + responses
    totals = np.zeros(5)
    settings = recipe.train
    for number, part in enumerate(schedule.parts):
        steps = schedule.ends[number] - schedule.start(number)
        order = np.asarray(part)[epoch_order(len(part), settings.seed, 0)]
        first_epoch = order[: steps * settings.batch_pairs]
        repeats = steps / steps_per_epoch(len(first_epoch), settings.batch_pairs)
        computed, passes = planned(rows[first_epoch], settings.batch_pairs, budget, settings.pairs_per_microbatch)
        sums = [int(values[first_epoch].sum()) for values in (needed, scored, responses)]
        totals += repeats * np.array([passes, computed, *sums])
    passes, computed, total, kept, all_responses = (round(value) for value in totals)
    return Work(schedule.steps, passes, total, computed, kept, all_responses)


def evenness(lengths: Lengths, schedule: Schedule, layout: Layout, processes: int) -> float:
    """Positions of a process on average, as a share of those of the one that has most, over the run's first steps.

    1 where all processes of a step have equally much to do; what is missing they wait for each other.
    """
    most = mean = 0.0
    for step in range(min(schedule.steps, STEPS_LOOKED_AT)):
        pairs = [lengths[index] for index in schedule.pairs(step, 0)[0]]
        loads = [sum(sum(pair.row_lengths(layout)) for pair in part) for part in shares(pairs, processes, layout)]
        most, mean = most + max(loads), mean + sum(loads) / processes
    return mean / most


def planned(rows: Counts, pairs_per_step: int, budget: int, most_pairs: int | None = None) -> tuple[int, int]:
    """Positions and forward passes of an epoch, as `batch.micro_batches` cuts its steps.

    Args:
        rows: positions of each pair, [n], in the epoch's order.
    """
    whole = len(rows) // pairs_per_step * pairs_per_step
    positions = passes = 0
    for steps in (rows[:whole].reshape(-1, pairs_per_step), rows[whole:].reshape(1, -1)):
        if steps.size:
            computed, forwards = _cut(-np.sort(-steps, axis=1), budget, most_pairs or pairs_per_step)
            positions, passes = positions + computed, passes + forwards
    return positions, passes


def _cut(widths: Counts, budget: int, most_pairs: int) -> tuple[int, int]:
    """Positions and passes of K steps whose pairs are sorted, widest first; widths [K, B].

    `cost[i]`, [K]: least cost of each step's pairs from i on, of which `passes[i]` times `forward_cost` is for passes.
    """
    (steps, pairs), pass_cost = widths.shape, forward_cost(budget)
    cost, passes = np.zeros((pairs + 1, steps), np.int64), np.zeros((pairs + 1, steps), np.int64)
    for start in range(pairs - 1, -1, -1):
        width = widths[:, start]
        most = np.minimum(np.maximum(budget // width, 1), most_pairs)
        best = np.full(steps, np.iinfo(np.int64).max)
        for end in range(start + 1, min(start + int(most.max()), pairs) + 1):
            candidate = pass_cost + width * (end - start) + cost[end]
            better = (end - start <= most) & (candidate < best)
            best = np.where(better, candidate, best)
            passes[start] = np.where(better, passes[end] + 1, passes[start])
        cost[start] = best
    forwards = int(passes[0].sum())
    return int(cost[0].sum()) - pass_cost * forwards, forwards
