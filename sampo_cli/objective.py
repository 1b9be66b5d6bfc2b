"""What a run minimises: forward passes of policy and reference, reduced and put into the method's loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from sampo_cli.batch import Draw, PairBatch
from sampo_cli.config import Recipe
from sampo_cli.losses import LossOutput, PairScores, add_likelihood
from sampo_cli.method_table import Method
from sampo_cli.policy import reference, score_against_reference
from sampo_cli.running import RewardMemory
from sampo_cli.scores import TokenScores, pair_scores


class Measured(NamedTuple):
    """A batch on its way to the loss: by token, by response, by pair."""

    tokens: TokenScores
    scores: PairScores
    out: LossOutput


class Objective:
    """The loss of one method with one recipe's options.

    Args:
        policy: as the run calls it; gradients flow through its log-probs.

    Attributes:
        memory: the earlier rewards that the loss is given.
    """

    def __init__(self, policy: nn.Module, recipe: Recipe, method: Method) -> None:
        self.policy, self.settings, self.seed, self.method = policy, recipe.method, recipe.train.seed, method
        self.options = {name: getattr(recipe.method, name) for name in method.option_names}
        self.memory = RewardMemory(method.memory)

    def draw(self, epoch: int) -> Draw:
        settings = self.settings
        assert settings.reduction is not None, "resolve() fills the reduction"
        return Draw(settings.reduction, self.seed, epoch, settings.sampling, bool(settings.sft_weight), settings.draws)

    def measure(self, batch: PairBatch) -> Measured:
        tokens = self.tokens(batch)
        scores = pair_scores(batch, *tokens, likelihood=bool(self.settings.sft_weight))
        return Measured(tokens, scores, self.loss(scores))

    def tokens(self, batch: PairBatch) -> TokenScores:
        """Log-probs of the scored tokens, by policy and reference, and what else the method needs of the two."""
        if self.method.needs_kl:
            return TokenScores(*score_against_reference(self.policy, batch))
        reference_logps = batch.reference_logps
        if self.method.needs_reference and reference_logps is None:
            with reference(self.policy):
                reference_logps = self.policy(batch)
        return TokenScores(self.policy(batch), reference_logps)

    def loss(self, scores: PairScores) -> LossOutput:
        out = self.method.loss(scores, **self.options, **self.memory.options())
        return add_likelihood(out, scores, self.settings.sft_weight or 0.0)
