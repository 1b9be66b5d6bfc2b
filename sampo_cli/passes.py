"""The passes of a step and of an evaluation: this process's micro-batches, run beside those of the other processes.

One process has all of them. Of several, each has a share, and what they found is put together: rows of numbers by pair,
and the gradients of a step, added up once whoever had how many micro-batches. So the model needs no wrapper that
averages gradients pass by pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from sampo_cli import ranks
from sampo_cli.batch import PairBatch
from sampo_cli.evaluation import Evaluation
from sampo_cli.feed import Feed
from sampo_cli.losses import LossOutput, PairScores
from sampo_cli.objective import Objective
from sampo_cli.policy import Policy
from sampo_cli.scores import Tally


class Passes:
    """Runs micro-batches.

    Args:
        policy: as it was loaded; `objective` calls it as accelerate has prepared it.
        parameters: those that are trained.
    """

    def __init__(
        self, accelerator: Accelerator, policy: Policy, parameters: Sequence[Any], feed: Feed, objective: Objective
    ) -> None:
        self.accelerator, self.policy, self.parameters = accelerator, policy, parameters
        self.feed, self.objective = feed, objective

    def backward(self, batch: PairBatch, pairs: int) -> tuple[PairScores, LossOutput]:
        """Add a micro-batch's share of the mean loss over a step of `pairs` pairs to the gradient."""
        _, scores, out = self.objective.measure(batch)
        self.accelerator.backward(out.losses.sum() / pairs)
        return scores, out

    def step(self, indices: Sequence[int], epoch: int) -> Tally:
        """The gradient of the mean loss over the pairs at `indices`, in every process; all pairs' numbers.

        Where one of the losses is not finite, so is the gradient, and it is not put together.
        """
        tally = Tally(self.policy.computed_positions)
        for batch in self.feed.batches(indices, epoch):
            if batch is None:
                self._keep_pace()
            else:
                tally.add(batch, *self.backward(batch, len(indices)))
        tally.gather()
        if not tally.broken():
            ranks.add_gradients(self.parameters)
        return tally

    @torch.no_grad()
    def evaluation(self, indices: Sequence[int], beta: float, granted: Callable[[], object]) -> Evaluation:
        """The pairs at `indices` with the positions of epoch 0 and without dropout, in every process.

        Args:
            granted: called before each pass, in all processes; what it raises ends the evaluation.
        """
        found = Evaluation(self.policy.computed_positions, beta)
        self.policy.eval()
        try:
            for batch in self.feed.whole_batches(indices):
                granted()
                if batch is None:
                    self._keep_pace()
                else:
                    found.add(batch, *self.objective.measure(batch))
        finally:
            self.policy.train()
        found.gather()
        return found

    def _keep_pace(self) -> None:
        """A pass for nothing: where each process has a part of the base, all run each layer together."""
        if self.policy.sharded:
            logps_N = self.objective.tokens(self.feed.filler()).policy
            if torch.is_grad_enabled():
                self.accelerator.backward(0.0 * logps_N.sum())
