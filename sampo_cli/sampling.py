"""Which tokens of a response count, and how much: one weight per token.

Every reduction of a response's per-token log-ratios to one number is a weighted sum, so a reduction is nothing but
its weights. They are data, drawn where a batch is put together; no forward pass draws anything.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Reduction = Literal["sum", "sample", "expected", "average", "mean"]
Sampling = Literal["paired", "independent"]
Weights = NDArray[np.float32]

POLICY, REFERENCE, ORDER, SPLIT, ROUNDS, BALANCE = range(6)
"""What a draw is for: the last part of a generator's key. (numpy pads keys with zeros, so POLICY needs none.)"""


def pair_generator(seed: int, epoch: int, pair_id: int, stream: int = POLICY) -> np.random.Generator:
    """The generator of one pair in one epoch: the same whatever the batch, the order or the process.

    `stream` separates the reference's draw from the policy's, for `sampling: independent` only.
    """
    key = (seed, epoch, pair_id) if stream == POLICY else (seed, epoch, pair_id, stream)
    return np.random.default_rng(key)


def kept_positions(length: int, kept: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """`kept` positions out of `range(length)`, uniformly and without replacement, ascending. Shape [kept]."""
    return np.sort(generator.choice(length, size=kept, replace=False))


def _sample(length: int, kept: int, generator: np.random.Generator) -> Weights:
    weights = np.zeros(length, np.float32)
    weights[kept_positions(length, kept, generator)] = 1.0
    return weights


def pair_weights(
    chosen_tokens: int, rejected_tokens: int, reduction: Reduction, generator: np.random.Generator, draws: int = 1
) -> tuple[Weights, Weights]:
    """Weights of the chosen and of the rejected response, shapes [T_w] and [T_l].

    With T_m = min(T_w, T_l): `sum` is DPO's (every token counts 1); `sample` is SamPO's, T_m positions of each
    response count 1 (arXiv 2406.10957, Eq. 6); `expected` is T_m / T, what `sample` gives on average; `average` is
    (T_w + T_l) / 2T, the authors' other variant; `mean` is 1 / T.

    Both halves of a draw come from `generator`, the chosen response's first. With `draws` K > 1 the weights of `sample`
    are the mean of K independent draws, one after the other from `generator`: the score's variance falls to 1 / K.
    """
    lengths = (chosen_tokens, rejected_tokens)
    shorter = min(lengths)
    if reduction == "sample":
        chosen, rejected = np.zeros(chosen_tokens, np.float32), np.zeros(rejected_tokens, np.float32)
        for _ in range(draws):
            chosen += _sample(chosen_tokens, shorter, generator)
            rejected += _sample(rejected_tokens, shorter, generator)
        return chosen / np.float32(draws), rejected / np.float32(draws)
    total = {"expected": float(shorter), "average": sum(lengths) / 2, "mean": 1.0}
    per_token = [1.0 if reduction == "sum" else total[reduction] / length for length in lengths]
    return np.full(chosen_tokens, per_token[0], np.float32), np.full(rejected_tokens, per_token[1], np.float32)
