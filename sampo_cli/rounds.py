"""Rounds of iterative training: how many steps each has, which pairs, and where its policy is kept.

A run without iterations has one round.
"""

from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path

import numpy as np

from sampo_cli.batch import step_indices, steps_per_epoch
from sampo_cli.config import IterationsConfig, Recipe, TrainConfig
from sampo_cli.errors import UsageError
from sampo_cli.sampling import ROUNDS

LEAST_EVAL_EVERY = 10
"""Where the recipe says nothing: a short run is not to be all evaluation."""


def total_steps(settings: TrainConfig, pairs: int) -> int:
    """Optimizer steps of one round (a whole run, if there is but one) on `pairs` training pairs."""
    return settings.max_steps or math.ceil((settings.epochs or 1) * steps_per_epoch(pairs, settings.batch_pairs))


def round_parts(train: list[int], iterations: IterationsConfig, seed: int) -> list[list[int]]:
    """The pairs of each round: all of them every time, or a random part of equal size (to one) for each."""
    if iterations.data == "all":
        return [train] * iterations.count
    order = np.random.default_rng((seed, 0, 0, ROUNDS)).permutation(len(train))
    return [[train[index] for index in sorted(part)] for part in np.array_split(order, iterations.count)]


def round_folder(run: Path, number: int) -> Path:
    """Where the policy at the end of round `number` (from 0) is kept: the reference of the next."""
    return run / "rounds" / f"round-{number + 1}"


class Schedule:
    """Which pairs each step of a run takes. Steps are counted from 0 over the whole run, rounds from 0 too.

    Attributes:
        parts: the pairs of each round, as indices.
        ends: the step at which each round is over.
        steps: of the whole run.
        eval_every: steps between evaluations.
    """

    def __init__(self, train: list[int], recipe: Recipe) -> None:
        self.settings = recipe.train
        self.parts = round_parts(train, recipe.iterations, recipe.train.seed)
        self.ends = list(accumulate(total_steps(recipe.train, len(part)) for part in self.parts))
        self.steps = self.ends[-1]
        self.eval_every = recipe.train.eval_every or max(LEAST_EVAL_EVERY, math.ceil(self.steps / 5))

    def start(self, number: int) -> int:
        """The first step of a round."""
        return self.ends[number - 1] if number else 0

    def evaluates(self, step: int) -> bool:
        """True where an evaluation comes after `step` steps."""
        return step in self.ends or step % self.eval_every == 0

    def answers(self, step: int) -> bool:
        """True where prompts are answered then."""
        return step in self.ends or step % (self.settings.generate.every or self.eval_every) == 0

    def refuse_elsewhere(self, step: int, number: int) -> None:
        """Stop a resumed run whose rounds have become longer or shorter in the middle of a later one.

        Raises:
            UsageError: `step` is not in round `number`.
        """
        if len(self.parts) > 1 and not self.start(number) <= step <= self.ends[number]:
            raise UsageError(
                f"after step {step} the run was in round {number + 1}, which would now be steps "
                f"{self.start(number) + 1} to {self.ends[number]}",
                hint="leave train.epochs and train.max_steps as they were; they are fixed from round 2 on",
            )

    def steps_per_epoch(self, number: int) -> int:
        return steps_per_epoch(len(self.parts[number]), self.settings.batch_pairs)

    def repeats(self, number: int) -> bool:
        """True if a round sees its pairs more than once."""
        return self.ends[number] - self.start(number) > self.steps_per_epoch(number)

    def pairs(self, step: int, number: int) -> tuple[list[int], int]:
        """The pairs of a step of round `number`, as indices, and their epoch."""
        part, settings = self.parts[number], self.settings
        epoch, chosen = step_indices(len(part), settings.batch_pairs, settings.seed, step - self.start(number))
        return [part[index] for index in chosen], epoch
