"""The shapes: a pair, a batch of pairs, and the plan that turns a step's pairs into micro-batches.

The layout lives here and in `model.py`, which runs it. The rest of the code sees scored tokens only: what they are
(`targets`), whose they are (`owner`) and how much they count (`weights`).

Legend: B pairs, R rows, S positions of a row, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sampo_cli.sampling import ORDER, POLICY, REFERENCE, Reduction, Sampling, pair_generator, pair_weights

Layout = Literal["shared", "separate"]
TokenIds = NDArray[np.int32]

FORWARD_COST = 128
"""What one more forward pass costs, in positions; padding below that is cheaper than another cut."""

PADDING = -1
PROMPT, CHOSEN, REJECTED = 0, 1, 2


@dataclass(frozen=True)
class Pair:
    """One preference pair as token ids. `pair_id` is the row's number in the data, counted before any is dropped."""

    pair_id: int
    prompt: TokenIds
    chosen: TokenIds
    rejected: TokenIds

    def row_lengths(self, layout: Layout) -> tuple[int, ...]:
        """Positions of the row, or of the two rows, that this pair takes."""
        responses = (len(self.chosen), len(self.rejected))
        if layout == "shared":
            return (len(self.prompt) + sum(responses),)
        return tuple(len(self.prompt) + response for response in responses)


@dataclass(frozen=True)
class PairBatch:
    """B pairs laid out for one forward pass.

    Attributes:
        input_ids: int64 [R, S].
        position_ids: int64 [R, S]; both responses start at the prompt's length.
        segments: int8 [R, S]; PROMPT, CHOSEN, REJECTED or PADDING.
        positions: int64 [N]; where in the flattened [R * S] the hidden state that predicts each scored token is.
        targets: int64 [N]; the scored tokens.
        owner: int64 [N]; 2b for the chosen response of pair b, 2b + 1 for its rejected one.
        weights: float32 [N]; how much each token counts in the policy's reduction, 0 for one that does not.
        reference_weights: float32 [N]; the same for the reference. Equal to `weights` unless sampling is independent.
        lengths: int64 [2B]; tokens of each response.
        pair_ids: int64 [B].
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    positions: Tensor
    targets: Tensor
    owner: Tensor
    weights: Tensor
    reference_weights: Tensor
    lengths: Tensor
    pair_ids: Tensor

    @property
    def pairs(self) -> int:
        return len(self.pair_ids)

    def to(self, device: torch.device | str) -> PairBatch:
        return PairBatch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


@dataclass(frozen=True)
class Draw:
    """How the scored tokens of a pair are chosen: everything but the pair itself.

    `whole_chosen` scores every chosen token, for a likelihood term, whatever the reduction keeps. `draws` is how many
    draws of `sample` are averaged.
    """

    reduction: Reduction
    seed: int
    epoch: int
    sampling: Sampling = "paired"
    whole_chosen: bool = False
    draws: int = 1

    def weights(self, pair: Pair, stream: int) -> NDArray[np.float32]:
        """Weights of chosen and rejected tokens in a row, shape [T_w + T_l]."""
        generator = pair_generator(self.seed, self.epoch, pair.pair_id, stream)
        lengths = len(pair.chosen), len(pair.rejected)
        return np.concatenate(pair_weights(*lengths, self.reduction, generator, self.draws))


def _rows(pair: Pair, layout: Layout) -> list[tuple[NDArray, NDArray, NDArray]]:
    """(ids, positions, segments) of each row of a pair, each of shape [row length]."""
    prompt = len(pair.prompt)
    responses = [(pair.chosen, CHOSEN), (pair.rejected, REJECTED)]
    groups = [responses] if layout == "shared" else [[response] for response in responses]
    rows = []
    for group in groups:
        parts = [(pair.prompt, np.arange(prompt), PROMPT)]
        parts += [(ids, np.arange(prompt, prompt + len(ids)), segment) for ids, segment in group]
        rows.append(
            (
                np.concatenate([ids for ids, _, _ in parts]),
                np.concatenate([positions for _, positions, _ in parts]),
                np.concatenate([np.full(len(ids), segment) for ids, _, segment in parts]),
            )
        )
    return rows


def _predicting_positions(pair: Pair, layout: Layout, first_row: int, width: int) -> NDArray[np.int64]:
    """Flat index of the hidden state that predicts each response token, chosen then rejected, shape [T_w + T_l].

    Both first tokens are predicted by the prompt's last hidden state.
    """
    prompt, chosen, rejected = len(pair.prompt), len(pair.chosen), len(pair.rejected)
    before_chosen = np.arange(prompt - 1, prompt - 1 + chosen)
    if layout == "separate":
        before_rejected = width + np.arange(prompt - 1, prompt - 1 + rejected)
    else:
        before_rejected = np.arange(prompt + chosen - 1, prompt + chosen - 1 + rejected)
        before_rejected[0] = prompt - 1
    return first_row * width + np.concatenate([before_chosen, before_rejected])


def collate(pairs: Sequence[Pair], draw: Draw, layout: Layout = "shared") -> PairBatch:
    """Lay `pairs` out as one `PairBatch`, on the CPU."""
    width = max(length for pair in pairs for length in pair.row_lengths(layout))
    grids: list[list[NDArray]] = [[], [], []]
    scored: list[tuple[NDArray, ...]] = []
    for b, pair in enumerate(pairs):
        first_row = len(grids[0])
        for row in _rows(pair, layout):
            for grid, values, fill in zip(grids, row, (0, 0, PADDING), strict=True):
                grid.append(np.pad(values, (0, width - len(values)), constant_values=fill))
        positions = _predicting_positions(pair, layout, first_row, width)
        targets = np.concatenate([pair.chosen, pair.rejected])
        owner = np.repeat([2 * b, 2 * b + 1], [len(pair.chosen), len(pair.rejected)])
        weights = draw.weights(pair, POLICY)
        reference = draw.weights(pair, REFERENCE) if draw.sampling == "independent" else weights
        keep = (weights != 0) | (reference != 0)
        keep[: len(pair.chosen)] |= draw.whole_chosen
        scored.append(tuple(column[keep] for column in (positions, targets, owner, weights, reference)))
    input_ids, position_ids, segments = (np.stack(grid) for grid in grids)
    positions, targets, owner, weights, reference = (np.concatenate(column) for column in zip(*scored, strict=True))
    return PairBatch(
        input_ids=torch.from_numpy(input_ids).long(),
        position_ids=torch.from_numpy(position_ids).long(),
        segments=torch.from_numpy(segments).to(torch.int8),
        positions=torch.from_numpy(positions).long(),
        targets=torch.from_numpy(targets).long(),
        owner=torch.from_numpy(owner).long(),
        weights=torch.from_numpy(weights),
        reference_weights=torch.from_numpy(reference),
        lengths=torch.tensor([len(ids) for pair in pairs for ids in (pair.chosen, pair.rejected)]),
        pair_ids=torch.tensor([pair.pair_id for pair in pairs]),
    )


@lru_cache(maxsize=2)
def epoch_order(pairs: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which an epoch visits `range(pairs)`: a function of (seed, epoch) alone, so a resume finds it."""
    return np.random.default_rng((seed, epoch, 0, ORDER)).permutation(pairs)


def steps_per_epoch(pairs: int, pairs_per_step: int) -> int:
    """Optimizer steps of an epoch; the last may hold fewer pairs."""
    return -(-pairs // pairs_per_step)


def step_indices(pairs: int, pairs_per_step: int, seed: int, step: int) -> tuple[int, NDArray[np.int64]]:
    """The epoch of optimizer step `step` (counted from 0 over the whole run) and the indices of its pairs."""
    epoch, within = divmod(step, steps_per_epoch(pairs, pairs_per_step))
    return epoch, epoch_order(pairs, seed, epoch)[within * pairs_per_step :][:pairs_per_step]


def micro_batches(pairs: Iterable[Pair], token_budget: int, layout: Layout = "shared") -> list[list[Pair]]:
    """Cut a step's pairs into micro-batches of at most `token_budget` positions, padding included.

    Pairs are sorted by length, longest first, and cut where the sum of padding and of `FORWARD_COST` per micro-batch
    is least. A pair that is longer than the budget gets a micro-batch of its own.
    """
    ordered = sorted(pairs, key=lambda pair: (-max(pair.row_lengths(layout)), pair.pair_id))
    rows_per_pair = 1 if layout == "shared" else 2
    widths = [rows_per_pair * max(pair.row_lengths(layout)) for pair in ordered]
    # best[i]: least cost of the pairs from i on, and where their first micro-batch ends.
    best: list[tuple[int, int]] = [(0, 0)] * (len(ordered) + 1)
    for start in range(len(ordered) - 1, -1, -1):
        most = max(1, token_budget // widths[start])
        ends = range(start + 1, min(start + most, len(ordered)) + 1)
        best[start] = min((FORWARD_COST + widths[start] * (end - start) + best[end][0], end) for end in ends)
    groups, start = [], 0
    while start < len(ordered):
        end = best[start][1]
        groups.append(ordered[start:end])
        start = end
    return groups
