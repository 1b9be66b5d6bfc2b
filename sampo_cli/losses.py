"""Pair scores in, losses out: pure functions of tensors and floats.

No config, no device, no sampling: a reduction has already turned each response's token log-probs into one number. What
a method is beside its loss (reduction, defaults, paper) stands in `method_table.py`.

Legend: B pairs. c and r are the policy-minus-reference scores of the chosen and of the rejected response, w and l the
policy's scores alone. Rewards carry no gradient; their difference is the margin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sampo_cli.sampling import Reduction


@dataclass(frozen=True)
class PairScores:
    """What is known of B pairs after the forward passes.

    Attributes:
        policy_chosen, policy_rejected: float32 [B]; reduced log-probs under the policy.
        reference_chosen, reference_rejected: float32 [B]; the same under the reference, or None without one.
        chosen_tokens, rejected_tokens: int64 [B]; tokens of the whole responses.
        chosen_kept, rejected_kept: int64 [B]; tokens that the reduction counts.
        chosen_nll: float32 [B]; minus the policy's mean log-prob per token of the whole chosen response, or None.
        chosen_kl, rejected_kl: float32 [B]; sum over the whole response's tokens of KL(reference || policy) over the
            vocabulary, or None.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    chosen_kept: Tensor
    rejected_kept: Tensor
    chosen_nll: Tensor | None = None
    chosen_kl: Tensor | None = None
    rejected_kl: Tensor | None = None

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """c and r, float32 [B] each."""
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ValueError("this loss compares with a reference, and none was computed")
        return self.policy_chosen - self.reference_chosen, self.policy_rejected - self.reference_rejected


@dataclass(frozen=True)
class LossOutput:
    """float32 [B] each."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def _output(losses: Tensor, beta: float, chosen: Tensor, rejected: Tensor) -> LossOutput:
    return LossOutput(losses, (beta * chosen).detach(), (beta * rejected).detach())


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(logits); the share `label_smoothing` of labels is taken to be swapped (cDPO)."""
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def add_likelihood(out: LossOutput, scores: PairScores, sft_weight: float) -> LossOutput:
    """Any method's losses plus `sft_weight` times the chosen response's negative log-likelihood per token.

    It is a mean over the tokens of each pair, so that a long response does not outweigh a short one. With it `dpo` is
    `dpo-sft`, `simpo` is `cpo-simpo`, and the losses of CPO and ORPO are complete.
    """
    if sft_weight == 0:
        return out
    if scores.chosen_nll is None:
        raise ValueError("a likelihood term needs the whole chosen response, and it was not scored")
    return replace(out, losses=out.losses + sft_weight * scores.chosen_nll)


def dpo(scores: PairScores, *, beta: float, label_smoothing: float = 0.0) -> LossOutput:
    """DPO; with `sample`d scores SamPO."""
    chosen, rejected = scores.log_ratios()
    # Eq. 7, arXiv 2305.18290; with scores over T_m tokens Eq. 6, arXiv 2406.10957.
    return _output(_smoothed(beta * (chosen - rejected), label_smoothing), beta, chosen, rejected)


def hinge(scores: PairScores, *, beta: float) -> LossOutput:
    """The hinge of SLiC-HF on DPO's margin."""
    chosen, rejected = scores.log_ratios()
    # The calibration loss of arXiv 2305.10425, normalised by a reference as in arXiv 2309.06657.
    return _output(torch.relu(1 - beta * (chosen - rejected)), beta, chosen, rejected)


def ipo(scores: PairScores, *, beta: float, reduction: Reduction = "mean") -> LossOutput:
    """IPO: the margin goes to 1 / (2 beta) and no further.

    `reduction` is the one that made the scores. IPO counts per token: `sample` gives sums over T_m tokens, which are
    divided by T_m here; `mean` is already divided, and `sum` is the equation to the letter.
    """
    chosen, rejected = scores.log_ratios()
    if reduction == "sample":
        shorter = torch.minimum(scores.chosen_tokens, scores.rejected_tokens)
        chosen, rejected = chosen / shorter, rejected / shorter
    # Eq. 17, arXiv 2310.12036; per token as its authors computed it.
    return _output((chosen - rejected - 1 / (2 * beta)) ** 2, beta, chosen, rejected)


def kto_pair(
    scores: PairScores, *, beta: float, chosen_baseline: float = 0.0, rejected_baseline: float = 0.0
) -> LossOutput:
    """KTO on pairs: mean of the chosen response's loss and the rejected one's.

    The baselines are beta times the KL of policy to reference, estimated by the mean reward of chosen and of rejected
    responses and not below 0. Each response is compared with the estimate of the other kind.
    """
    chosen, rejected = scores.log_ratios()
    # Eq. 7, arXiv 2402.01306, with both weights 1. A mean over 2B responses, hence half of each; 1 - sigmoid(x) is
    # written sigmoid(-x).
    losses = (torch.sigmoid(rejected_baseline - beta * chosen) + torch.sigmoid(beta * rejected - chosen_baseline)) / 2
    return _output(losses, beta, chosen, rejected)


def dpop(scores: PairScores, *, beta: float, dpop_weight: float) -> LossOutput:
    """DPO-Positive: punishes a chosen response that is less likely than under the reference."""
    chosen, rejected = scores.log_ratios()
    # The loss L_DPOP of arXiv 2402.13228; max(0, log(pi_ref / pi)) is relu(-c).
    logits = beta * (chosen - rejected - dpop_weight * torch.relu(-chosen))
    return _output(-F.logsigmoid(logits), beta, chosen, rejected)


def r_dpo(scores: PairScores, *, beta: float, length_weight: float) -> LossOutput:
    """Length-regularised DPO, "lenN" in the code of SamPO: a longer chosen response has to win by less."""
    chosen, rejected = scores.log_ratios()
    longer = (scores.chosen_tokens - scores.rejected_tokens).to(chosen.dtype)
    # The loss L_R-DPO of arXiv 2403.19159; length_weight is its alpha.
    return _output(-F.logsigmoid(beta * (chosen - rejected) + length_weight * longer), beta, chosen, rejected)


def tdpo(scores: PairScores, *, beta: float, kl_weight: float) -> LossOutput:
    """TDPO2: holds back the rejected response's drift from the reference, token by token."""
    chosen, rejected = scores.log_ratios()
    if scores.chosen_kl is None or scores.rejected_kl is None:
        raise ValueError("this loss needs the KL over the whole vocabulary, and none was computed")
    # The loss L_TDPO2 of arXiv 2404.11999: u - alpha * delta; the chosen response's KL carries no gradient.
    logits = chosen - rejected - kl_weight * (scores.rejected_kl - scores.chosen_kl.detach())
    # The reward that this model of preferences implies has the KL in it.
    return _output(-F.logsigmoid(beta * logits), beta, chosen + scores.chosen_kl, rejected + scores.rejected_kl)


def bco_pair(scores: PairScores, *, beta: float, baseline: float = 0.0) -> LossOutput:
    """BCO: a binary classifier whose logit is the reward above `baseline`, the mean reward so far."""
    chosen, rejected = scores.log_ratios()
    # The binary cross-entropy of arXiv 2404.04656; baseline is its reward shift delta.
    losses = -F.logsigmoid(beta * chosen - baseline) - F.logsigmoid(baseline - beta * rejected)
    return _output(losses, beta, chosen, rejected)


def nca_pair(scores: PairScores, *, beta: float) -> LossOutput:
    """NCA for pairs: raises the chosen response's own likelihood, not only the margin."""
    chosen, rejected = scores.log_ratios()
    # The loss L_NCA of arXiv 2402.05369 for K = 2 with all of the weight on the chosen response.
    losses = -F.logsigmoid(beta * chosen) - 0.5 * (F.logsigmoid(-beta * chosen) + F.logsigmoid(-beta * rejected))
    return _output(losses, beta, chosen, rejected)


def sppo_hard(scores: PairScores, *, beta: float) -> LossOutput:
    """SPPO with hard labels: c goes to 1 / (2 beta), r to -1 / (2 beta)."""
    chosen, rejected = scores.log_ratios()
    # Eq. 4.7, arXiv 2405.00675, with P = 1 for the winner, 0 for the loser, eta = 1 / beta.
    losses = (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2
    return _output(losses, beta, chosen, rejected)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0; a log-prob that was rounded to 0 counts as the nearest one below."""
    return torch.log(-torch.expm1(x.clamp(max=-torch.finfo(x.dtype).eps)))


def orpo(scores: PairScores, *, beta: float) -> LossOutput:
    """ORPO's odds-ratio term, on mean log-probs; its likelihood term is `add_likelihood`."""
    chosen, rejected = scores.policy_chosen, scores.policy_rejected
    # Eq. 4 and 7, arXiv 2403.07691: log of odds(w) / odds(l), odds(p) = p / (1 - p); beta is the paper's lambda.
    log_odds = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
    return _output(-beta * F.logsigmoid(log_odds), beta, chosen, rejected)


def simpo(scores: PairScores, *, beta: float, gamma: float, label_smoothing: float = 0.0) -> LossOutput:
    """SimPO, on mean log-probs: the chosen response has to win by `gamma`."""
    chosen, rejected = scores.policy_chosen, scores.policy_rejected
    # Eq. 6, arXiv 2405.14734.
    logits = beta * (chosen - rejected) - gamma
    return _output(_smoothed(logits, label_smoothing), beta, chosen, rejected)


def cpo(scores: PairScores, *, beta: float, label_smoothing: float = 0.0) -> LossOutput:
    """CPO's preference term: DPO with a uniform reference; its likelihood term is `add_likelihood`."""
    chosen, rejected = scores.policy_chosen, scores.policy_rejected
    # Eq. 3, arXiv 2401.08417.
    return _output(_smoothed(beta * (chosen - rejected), label_smoothing), beta, chosen, rejected)
