"""What an evaluation on held-out pairs says: the method's own numbers, KL to the reference, and length bias.

Every response token is scored, in one forward pass: the method's reduction and DPO's sum are two weightings of the same
log-probs, so a run shows what DPO's reward would have been.

Legend: B pairs of a micro-batch, P pairs in all, N scored tokens, here all of the responses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sampo_cli import ranks
from sampo_cli.batch import PairBatch
from sampo_cli.length_bias import length_bias
from sampo_cli.losses import LossOutput, PairScores
from sampo_cli.scores import Tally, TokenScores, by_response, gathered

COLUMNS = ("loss", "margin", "sum_margin", "chosen_tokens", "rejected_tokens", "k1", "k3", "pair_id")
"""Of a held-out pair: numbers of the method, DPO's margin, lengths, KL summed over all tokens of both responses, id."""

KL_KEYS = ("kl_per_token", "kl_per_response", "kl_per_token_k1", "kl_per_response_k1")


class Evaluation:
    """Gathers the held-out pairs, micro-batch by micro-batch; stays on the device until `row` is asked for.

    Args:
        positions: how many a forward pass of a batch computes.
        beta: of the method; DPO's rewards are multiplied by it too.
    """

    def __init__(self, positions: Callable[[PairBatch], int], beta: float) -> None:
        self.tally, self.beta = Tally(positions), beta
        self.parts: list[Tensor] = []
        self.has_reference = False

    def add(self, batch: PairBatch, tokens: TokenScores, scores: PairScores, out: LossOutput) -> None:
        """Take in the pairs of a batch in which every response token is scored."""
        self.tally.add(batch, scores, out)
        self.has_reference = tokens.reference is not None
        ratios_N = tokens.policy.double()
        if tokens.reference is not None:
            ratios_N = ratios_N - tokens.reference.double()
        chosen, rejected = by_response(batch, ratios_N)
        k1_B = chosen + rejected
        k3_N = torch.expm1(-ratios_N) + ratios_N  # k3 of joschu.net/blog/kl-approx.html: 1/x - 1 + log x, not below 0
        columns = [out.losses, out.chosen_rewards - out.rejected_rewards, self.beta * (chosen - rejected)]
        columns += [scores.chosen_tokens, scores.rejected_tokens, k1_B, torch.stack(by_response(batch, k3_N)).sum(0)]
        columns.append(batch.pair_ids)
        self.parts.append(torch.stack([column.double() for column in columns], 1))

    def gather(self) -> None:
        """Take in the pairs that the other processes have scored; all are then in the order of their ids."""
        self.tally.gather()
        self.parts = [gathered(self.parts, len(COLUMNS))]
        self.has_reference = any(ranks.gather(self.has_reference))

    def broken(self) -> list[int]:
        """Ids of the pairs whose loss is not finite."""
        return self.tally.broken()

    def row(self) -> dict[str, Any]:
        """The tally's row; KL in nats; length bias of the method's margin and of DPO's. None where nothing is known.

        Pairs whose loss is not finite are left out. Without a reference there is no KL, and DPO's rewards are beta
        times the policy's log-probs.
        """
        table = self._finite()
        row: dict[str, Any] = {**self.tally.row(), **self._kl(table), "sum_margin": None, "sum_accuracy": None}
        if not len(table["loss"]):
            return {**row, "length_bias": None, "sum_length_bias": None}
        lengths = table["chosen_tokens"], table["rejected_tokens"]
        row["sum_margin"] = _number(table["sum_margin"].mean())
        row["sum_accuracy"] = float((table["sum_margin"] > 0).mean())
        row["length_bias"] = asdict(length_bias(table["margin"], *lengths))
        row["sum_length_bias"] = asdict(length_bias(table["sum_margin"], *lengths))
        return row

    def pairs(self) -> list[dict[str, Any]]:
        """A row for each pair in the order of the ids: lengths and gap in tokens, both margins; without the broken."""
        table = self._finite()
        rows = []
        for place in np.argsort(table["pair_id"]):
            chosen, rejected = (int(table[f"{side}_tokens"][place]) for side in ("chosen", "rejected"))
            lengths = {"gap": chosen - rejected, "chosen_tokens": chosen, "rejected_tokens": rejected}
            margins = {key: _number(table[key][place]) for key in ("margin", "sum_margin")}
            rows.append({"pair_id": int(table["pair_id"][place]), **lengths, **margins})
        return rows

    def _finite(self) -> dict[str, NDArray[np.float64]]:
        """`COLUMNS` of the pairs whose loss is finite, [P] each."""
        table = torch.cat(self.parts).cpu().numpy()
        return dict(zip(COLUMNS, table[np.isfinite(table[:, 0])].T, strict=True))

    def _kl(self, table: dict[str, NDArray[np.float64]]) -> dict[str, float | None]:
        """`KL_KEYS`: k3, then k1, per response token and per response."""
        pairs = len(table["loss"])
        if not self.has_reference or not pairs:
            return dict.fromkeys(KL_KEYS)
        tokens = (table["chosen_tokens"] + table["rejected_tokens"]).sum()
        sums = (table["k3"].sum(), table["k1"].sum())
        values = [_number(total / count) for total in sums for count in (tokens, 2 * pairs)]
        return dict(zip(KL_KEYS, values, strict=True))


def _number(value: float) -> float | None:
    """As JSON can hold it."""
    return float(value) if math.isfinite(value) else None
