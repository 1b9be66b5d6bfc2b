"""Rounds of iterative training: how many steps each has, which pairs, and where its policy is kept."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from sampo_cli.batch import steps_per_epoch
from sampo_cli.config import IterationsConfig, TrainConfig
from sampo_cli.sampling import ROUNDS


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
