"""Pair scores in, losses out: pure functions of tensors and floats, and the table of methods.

No config, no device, no sampling: a reduction has already turned each response's token log-probs into one number.
Shapes: B pairs. c and r below are the policy-minus-reference scores of the chosen and the rejected response.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

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
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    chosen_kept: Tensor
    rejected_kept: Tensor

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """c and r, float32 [B] each."""
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ValueError("this loss compares with a reference, and none was computed")
        return self.policy_chosen - self.reference_chosen, self.policy_rejected - self.reference_rejected


@dataclass(frozen=True)
class LossOutput:
    """float32 [B] each. Rewards carry no gradient; their difference is the margin."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo(scores: PairScores, *, beta: float, label_smoothing: float = 0.0) -> LossOutput:
    """-log sigmoid(beta (c - r)): Eq. 7 of arXiv 2305.18290; with `sample`d scores, Eq. 6 of arXiv 2406.10957.

    `label_smoothing` e weighs the loss by 1 - e and that of the swapped label by e (cDPO).
    """
    chosen, rejected = scores.log_ratios()
    logits = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
    return LossOutput(losses, (beta * chosen).detach(), (beta * rejected).detach())


@dataclass(frozen=True)
class Method:
    """A named preset over (loss, reduction, reference, defaults).

    Attributes:
        loss: called as `loss(scores, **options)`, where `options` are this method's values of `option_names`.
        option_names: fields of the recipe's `method` section that the loss takes.
        defaults: by section of the recipe, used where recipe and flags are empty.
        formula: of one pair, in text.
        paper: where it comes from.
        citation: BibTeX.
    """

    name: str
    loss: Callable[..., LossOutput]
    reduction: Reduction
    needs_reference: bool
    option_names: tuple[str, ...]
    defaults: Mapping[str, Mapping[str, Any]]
    formula: str
    paper: str
    citation: str = field(repr=False)

    def recipe_defaults(self) -> dict[str, dict[str, Any]]:
        """`defaults` with the method's own reduction, as `config.resolve` takes them."""
        sections = {section: dict(values) for section, values in self.defaults.items()}
        sections.setdefault("method", {})["reduction"] = self.reduction
        return sections


_DPO_CITATION = """@inproceedings{rafailov2023direct,
  title = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author = {Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Manning, Christopher D. and Ermon, Stefano
            and Finn, Chelsea},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  url = {https://arxiv.org/abs/2305.18290}
}"""

_SAMPO_CITATION = """@inproceedings{lu2024eliminating,
  title = {Eliminating Biased Length Reliance of Direct Preference Optimization via Down-Sampled {KL} Divergence},
  author = {Lu, Junru and Li, Jiazheng and An, Siyu and Zhao, Meng and He, Yulan and Yin, Di and Sun, Xing},
  booktitle = {Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing},
  year = {2024},
  url = {https://arxiv.org/abs/2406.10957}
}"""

# LoRA wants 10 to 50 times the rate of full fine-tuning; the paper's is 4e-7.
_LORA_DEFAULTS = {"method": {"beta": 0.1}, "train": {"learning_rate": 2e-5, "epochs": 1.0}}

METHODS: dict[str, Method] = {
    "sampo": Method(
        name="sampo",
        loss=dpo,
        reduction="sample",
        needs_reference=True,
        option_names=("beta", "label_smoothing"),
        defaults=_LORA_DEFAULTS,
        formula="-log sigmoid(beta * (sum over S_w of r(y_w, t) - sum over S_l of r(y_l, t))), "
        "|S_w| = |S_l| = min(T_w, T_l), r = log pi_theta - log pi_ref",
        paper="arXiv 2406.10957",
        citation=_SAMPO_CITATION,
    ),
    "dpo": Method(
        name="dpo",
        loss=dpo,
        reduction="sum",
        needs_reference=True,
        option_names=("beta", "label_smoothing"),
        defaults=_LORA_DEFAULTS,
        formula="-log sigmoid(beta * (sum over t of r(y_w, t) - sum over t of r(y_l, t))), "
        "r = log pi_theta - log pi_ref",
        paper="arXiv 2305.18290",
        citation=_DPO_CITATION,
    ),
}
