"""The shapes: a pair, a batch of pairs, and the plan that turns a step's pairs into micro-batches.

The layout lives here and in `model.py`, which runs it. The rest of the code sees scored tokens only: what they are
(`targets`), whose they are (`owner`) and how much they count (`weights`).

Legend: B pairs, R rows, S positions of a row, N scored tokens.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sampo_cli.sampling import ORDER, POLICY, REFERENCE, Reduction, Sampling, pair_generator, pair_weights

Layout = Literal["shared", "separate"]
TokenIds = NDArray[np.int32]
Logps = NDArray[np.float32]

FORWARD_COST = 128
"""What one more forward pass costs at least, in positions; padding below that is cheaper than another cut."""

FORWARD_SHARE = 32
"""It costs this fraction (1/32) of the budget where that is more: with room for large passes, small ones waste time."""

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


class Pairs(Protocol):
    """Anything that gives pairs by index, and knows ids and lengths of all of them: int arrays [n]."""

    def __getitem__(self, index: int) -> Pair: ...
    @property
    def pair_ids(self) -> NDArray[np.int64]: ...
    @property
    def prompt_tokens(self) -> NDArray[np.int32]: ...
    @property
    def chosen_tokens(self) -> NDArray[np.int32]: ...
    @property
    def rejected_tokens(self) -> NDArray[np.int32]: ...


def row_positions(pairs: Pairs, layout: Layout) -> NDArray[np.int64]:
    """Positions of each pair's row, or of its two rows padded to the longer one; int64 [n]."""
    prompt, chosen, rejected = (
        tokens.astype(np.int64) for tokens in (pairs.prompt_tokens, pairs.chosen_tokens, pairs.rejected_tokens)
    )
    if layout == "shared":
        return prompt + chosen + rejected
    return 2 * (prompt + np.maximum(chosen, rejected))


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
        reference_logps: float32 [N]; the reference's log-probs, where they are known already.
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
    reference_logps: Tensor | None = None

    @property
    def pairs(self) -> int:
        return len(self.pair_ids)

    def _each(self, change: Callable[[Tensor], Tensor]) -> PairBatch:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items() if tensor is not None})

    def to(self, device: torch.device | str) -> PairBatch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> PairBatch:
        """In memory that a GPU can fetch from while it computes."""
        return self._each(Tensor.pin_memory)


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


def collate(
    pairs: Sequence[Pair],
    draw: Draw,
    layout: Layout = "shared",
    reference: Callable[[Pair], Logps] | None = None,
    *,
    every_token: bool = False,
) -> PairBatch:
    """Lay `pairs` out as one `PairBatch`, on the CPU.

    Args:
        reference: gives the reference's log-probs of a pair's chosen and rejected tokens in a row, [T_w + T_l].
        every_token: score all response tokens, also those whose weight is 0.
    """
    width = max(length for pair in pairs for length in pair.row_lengths(layout))
    grids: list[list[NDArray]] = [[], [], []]
    scored: dict[str, list[NDArray]] = defaultdict(list)
    for b, pair in enumerate(pairs):
        first_row = len(grids[0])
        for row in _rows(pair, layout):
            for grid, values, fill in zip(grids, row, (0, 0, PADDING), strict=True):
                grid.append(np.pad(values, (0, width - len(values)), constant_values=fill))
        weights = draw.weights(pair, POLICY)
        reference_weights = draw.weights(pair, REFERENCE) if draw.sampling == "independent" else weights
        columns = {
            "positions": _predicting_positions(pair, layout, first_row, width),
            "targets": np.concatenate([pair.chosen, pair.rejected]).astype(np.int64),
            "owner": np.repeat([2 * b, 2 * b + 1], [len(pair.chosen), len(pair.rejected)]),
            "weights": weights,
            "reference_weights": reference_weights,
        }
        if reference:
            columns["reference_logps"] = reference(pair)
        keep = (weights != 0) | (reference_weights != 0) | every_token
        keep[: len(pair.chosen)] |= draw.whole_chosen
        for name, column in columns.items():
            scored[name].append(column[keep])
    input_ids, position_ids, segments = (np.stack(grid) for grid in grids)
    return PairBatch(
        input_ids=torch.from_numpy(input_ids.astype(np.int64)),
        position_ids=torch.from_numpy(position_ids.astype(np.int64)),
        segments=torch.from_numpy(segments.astype(np.int8)),
        lengths=torch.tensor([len(ids) for pair in pairs for ids in (pair.chosen, pair.rejected)]),
        pair_ids=torch.tensor([pair.pair_id for pair in pairs]),
        **{name: torch.from_numpy(np.concatenate(parts)) for name, parts in scored.items()},
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


def forward_cost(token_budget: int) -> int:
    """Positions that one more forward pass is worth."""
    return max(FORWARD_COST, token_budget // FORWARD_SHARE)


def micro_batches(
    pairs: Iterable[Pair], token_budget: int, layout: Layout = "shared", most_pairs: int | None = None
) -> list[list[Pair]]:
    """Cut a step's pairs into micro-batches of at most `token_budget` positions, padding included.

    Pairs are sorted by length, longest first, and cut where the sum of padding and of `forward_cost` per micro-batch
    is least. A pair that is longer than the budget gets a micro-batch of its own.
    """
    cost = forward_cost(token_budget)
    ordered = sorted(pairs, key=lambda pair: (-max(pair.row_lengths(layout)), pair.pair_id))
    rows_per_pair = 1 if layout == "shared" else 2
    widths = [rows_per_pair * max(pair.row_lengths(layout)) for pair in ordered]
    # best[i]: least cost of the pairs from i on, and where their first micro-batch ends.
    best: list[tuple[int, int]] = [(0, 0)] * (len(ordered) + 1)
    for start in range(len(ordered) - 1, -1, -1):
        most = min(max(1, token_budget // widths[start]), most_pairs or len(ordered))
        ends = range(start + 1, min(start + most, len(ordered)) + 1)
        best[start] = min((cost + widths[start] * (end - start) + best[end][0], end) for end in ends)
    groups, start = [], 0
    while start < len(ordered):
        end = best[start][1]
        groups.append(ordered[start:end])
        start = end
    return groups


def shares(pairs: Sequence[Pair], processes: int, layout: Layout = "shared") -> list[list[Pair]]:
    """Split pairs over processes so that all have about as many positions: longest first, each to whom has least.

    The same for everybody who asks. A process may get nothing where there are fewer pairs than processes.
    """
    loads = [(0, process) for process in range(processes)]
    parts: list[list[Pair]] = [[] for _ in range(processes)]
    for pair in sorted(pairs, key=lambda pair: (-sum(pair.row_lengths(layout)), pair.pair_id)):
        load, process = heapq.heappop(loads)
        parts[process].append(pair)
        heapq.heappush(loads, (load + sum(pair.row_lengths(layout)), process))
    return parts
