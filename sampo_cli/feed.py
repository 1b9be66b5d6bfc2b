"""This process's share of a step as micro-batches on its device; the next step's are put together meanwhile.

Every process finds the same split of a step's pairs and takes its own part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from sampo_cli import ranks
from sampo_cli.batch import Draw, Layout, Logps, Pair, PairBatch, Pairs, collate, micro_batches, row_positions, shares

Step = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class Split:
    """The pairs, and which of them train and which are held out (indices into `pairs`).

    `where` names the row that a pair id came from, for messages.
    """

    pairs: Pairs
    train: list[int]
    evaluation: list[int]
    where: Callable[[int], str] = str


class Feed:
    """Cuts and lays out steps.

    Args:
        pairs: where the indices of a step point to.
        layout: of the policy.
        draw: how an epoch's scored tokens are chosen.
        device: of the policy.
        most_pairs: of one micro-batch, where that is limited.

    Attributes:
        tokens: most positions of a micro-batch.
        reference: gives a pair's reference log-probs, if they are known beforehand.
    """

    def __init__(
        self,
        pairs: Pairs,
        layout: Layout,
        draw: Callable[[int], Draw],
        device: torch.device,
        tokens: int,
        most_pairs: int | None,
    ) -> None:
        self.pairs, self.layout, self.draw, self.device = pairs, layout, draw, device
        self.tokens, self.most_pairs = tokens, most_pairs
        self.reference: Callable[[Pair], Logps] | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._ahead: dict[Step, Future[list[PairBatch | None]]] = {}

    def batches(self, indices: Sequence[int], epoch: int) -> Iterator[PairBatch | None]:
        """This process's micro-batches of some pairs, on the device, longest first.

        As many as every other process gets of these pairs: None stands for those that only others have.
        """
        step = (epoch, tuple(indices))
        ahead = self._ahead.pop(step, None)
        for batch in ahead.result() if ahead else self._make(step):
            yield batch and batch.to(self.device)

    def whole_batches(self, indices: Sequence[int]) -> Iterator[PairBatch | None]:
        """The same of epoch 0, in which every response token is scored."""
        for batch in self._make((0, tuple(indices)), every_token=True):
            yield batch and batch.to(self.device)

    def look_ahead(self, indices: Sequence[int], epoch: int) -> None:
        """Begin with a step that `batches` will be asked for soon."""
        step = (epoch, tuple(indices))
        self._ahead[step] = self._worker.submit(lambda: list(self._make(step)))

    def group(self, indices: Sequence[int]) -> PairBatch:
        """Some pairs as one micro-batch of epoch 0, whatever its size, on the device."""
        return self._collate([self.pairs[index] for index in indices], 0).to(self.device)

    def filler(self) -> PairBatch:
        """The shortest pair: for who computes only to keep others company."""
        widths = row_positions(self.pairs, self.layout)
        return self.group([int(np.argmin(widths))])

    def _make(self, step: Step, *, every_token: bool = False) -> Iterator[PairBatch | None]:
        epoch, indices = step
        pairs = [self.pairs[index] for index in indices]
        parts = shares(pairs, ranks.count(), self.layout)
        plans = [micro_batches(part, self.tokens, self.layout, self.most_pairs) for part in parts]
        own = plans[ranks.rank()]
        for group in own:
            yield self._collate(group, epoch, every_token=every_token)
        yield from [None] * (max(map(len, plans)) - len(own))

    def _collate(self, group: Sequence[Pair], epoch: int, *, every_token: bool = False) -> PairBatch:
        batch = collate(group, self.draw(epoch), self.layout, self.reference, every_token=every_token)
        return batch.pinned() if self.device.type == "cuda" else batch
