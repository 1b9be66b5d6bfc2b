"""From log-probs of scored tokens to scores of pairs, and from pairs to a metrics row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sampo_cli import ranks
from sampo_cli.batch import PairBatch
from sampo_cli.losses import LossOutput, PairScores


class TokenScores(NamedTuple):
    """Numbers of the scored tokens, float32 [N] each: log-probs, and KL of reference to policy over the vocabulary."""

    policy: Tensor
    reference: Tensor | None = None
    kl: Tensor | None = None


def by_response(batch: PairBatch, values: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of scored tokens, [N], summed over the chosen and over the rejected responses, [B] each.

    In float64: a GPU adds them up in any order, and what a float32 loses of a sum of thousands is more than a reward of
    the first steps.
    """
    wide = values.double() if values.is_floating_point() else values
    sums = torch.zeros(2 * batch.pairs, device=values.device, dtype=wide.dtype).index_add(0, batch.owner, wide)
    return sums[0::2].to(values.dtype), sums[1::2].to(values.dtype)


def pair_scores(
    batch: PairBatch,
    policy_logps: Tensor,
    reference_logps: Tensor | None,
    kl: Tensor | None = None,
    *,
    likelihood: bool = False,
) -> PairScores:
    """Reduce numbers of scored tokens, float32 [N] each, to numbers of responses, and lay them out by pair.

    Args:
        kl: KL of reference to policy at each token; every response token must be scored for it.
        likelihood: also the chosen response's negative log-likelihood; it must be scored as a whole.
    """

    nothing: tuple[None, None] = (None, None)
    policy = by_response(batch, policy_logps * batch.weights)
    reference = nothing if reference_logps is None else by_response(batch, reference_logps * batch.reference_weights)
    divergence = nothing if kl is None else by_response(batch, kl)
    kept = by_response(batch, (batch.weights != 0).long())
    return PairScores(
        policy_chosen=policy[0],
        policy_rejected=policy[1],
        reference_chosen=reference[0],
        reference_rejected=reference[1],
        chosen_tokens=batch.lengths[0::2],
        rejected_tokens=batch.lengths[1::2],
        chosen_kept=kept[0],
        rejected_kept=kept[1],
        chosen_nll=-by_response(batch, policy_logps)[0] / batch.lengths[0::2] if likelihood else None,
        chosen_kl=divergence[0],
        rejected_kl=divergence[1],
    )


MEANS = ("loss", "chosen_reward", "rejected_reward", "margin", "accuracy", "chosen_logps", "rejected_logps")
SUMS = ("kept_tokens", "response_tokens")
"""Numbers of a pair that a row has the mean or the sum of."""


def gathered(parts: list[Tensor], columns: int) -> Tensor:
    """The pairs of all processes, float64 [P, columns] on the CPU, in the order of their ids.

    Args:
        parts: of this process, [B, columns] each; the last column is the pair's id.
    """
    own = torch.cat(parts).cpu() if parts else torch.zeros(0, columns, dtype=torch.float64)
    table = np.concatenate(ranks.gather(own.numpy()))
    return torch.from_numpy(table[np.argsort(table[:, -1], kind="stable")])


class Tally:
    """Sums over the pairs of a step or an evaluation; stays on the device until `row` is asked for.

    Args:
        positions: how many a forward pass of a batch computes.
    """

    def __init__(self, positions: Callable[[PairBatch], int]) -> None:
        self.positions = positions
        self.parts: list[Tensor] = []
        self.computed_tokens = 0

    def add(self, batch: PairBatch, scores: PairScores, out: LossOutput) -> None:
        margins = out.chosen_rewards - out.rejected_rewards
        columns = [out.losses, out.chosen_rewards, out.rejected_rewards, margins, (margins > 0).float()]
        columns += [scores.policy_chosen, scores.policy_rejected]
        columns += [scores.chosen_kept + scores.rejected_kept, scores.chosen_tokens + scores.rejected_tokens]
        columns.append(batch.pair_ids)
        self.parts.append(torch.stack([column.detach().double() for column in columns], 1))
        self.computed_tokens += self.positions(batch)

    def gather(self) -> None:
        """Take in what the other processes have tallied; pairs are then in the order of their ids."""
        self.parts = [gathered(self.parts, len(MEANS) + len(SUMS) + 1)]
        self.computed_tokens = sum(ranks.gather(self.computed_tokens))

    def pair_ids(self) -> list[int]:
        return torch.cat(self.parts)[:, -1].long().tolist()

    def broken(self) -> list[int]:
        """Ids of the pairs whose loss is not finite."""
        table = torch.cat(self.parts)
        return table[~table[:, 0].isfinite(), -1].long().tolist()

    def row(self) -> dict[str, Any]:
        """Means over pairs, token counts as sums; pairs whose loss is not finite are counted and left out.

        Means are None where no pair is left.
        """
        table = torch.cat(self.parts).cpu()
        finite = table[table[:, 0].isfinite()]
        means = finite[:, : len(MEANS)].mean(0).tolist() if len(finite) else [None] * len(MEANS)
        row: dict[str, Any] = dict(zip(MEANS, means, strict=True))
        row |= zip(SUMS, map(int, table[:, len(MEANS) : -1].sum(0).tolist()), strict=True)
        broken = len(table) - len(finite)
        return {**row, "pairs": len(table), "nonfinite": broken, "computed_tokens": self.computed_tokens}
