"""The table of methods: each a named preset over loss, reduction, reference and defaults.

The mathematics is in `losses.py`; `method_checks.py` holds a recipe against its method's entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from sampo_cli import citations, losses
from sampo_cli.errors import UsageError, nearest
from sampo_cli.losses import LossOutput
from sampo_cli.running import Memory
from sampo_cli.sampling import Reduction


def _defaults(*, learning_rate: float = 2e-5, beta: float = 0.1, **options: float) -> dict[str, dict[str, Any]]:
    """Published options; the rate is for LoRA, which wants 10 to 50 times that of full fine-tuning (4e-7 to 1e-6)."""
    return {"method": {"beta": beta, **options}, "train": {"learning_rate": learning_rate, "epochs": 1.0}}


@dataclass(frozen=True)
class Method:
    """A named preset.

    Attributes:
        loss: called as `loss(scores, **options)`, where `options` are this method's values of `option_names`.
        reduction: the default.
        refused: reductions that have no meaning here, with the reason.
        needs_reference: whether reference log-probs are computed.
        needs_kl: whether `chosen_kl` and `rejected_kl` are, over the whole vocabulary.
        memory: which earlier rewards the loss is given in addition, as `running.RewardMemory` keeps them.
        option_names: fields of the recipe's `method` section that the loss takes.
        defaults: by section of the recipe, used where recipe and flags are empty.
        usual: smallest and largest value that is known to work, by key; `gamma` in multiples of beta.
        formula: of one pair, in text.
        paper: where it comes from.
        citation: BibTeX.
    """

    name: str
    loss: Callable[..., LossOutput]
    reduction: Reduction
    formula: str
    paper: str
    citation: str = field(repr=False)
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=_defaults)
    usual: Mapping[str, tuple[float, float]] = field(default_factory=lambda: {"beta": (0.01, 1.0)})
    option_names: tuple[str, ...] = ("beta",)
    refused: Mapping[Reduction, str] = field(default_factory=dict)
    needs_reference: bool = True
    needs_kl: bool = False
    memory: Memory = "none"

    @property
    def caches_reference(self) -> bool:
        """True if log-probs of the response's tokens are all that is needed of the reference."""
        return self.needs_reference and not self.needs_kl

    @property
    def reductions(self) -> tuple[Reduction, ...]:
        """The reductions that have a meaning here."""
        return tuple(reduction for reduction in get_args(Reduction) if reduction not in self.refused)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the function, as JSON can hold it."""
        plain = {name: getattr(self, name) for name in ("name", "formula", "paper", "citation", "needs_reference")}
        return {**plain, "reduction": self.reduction, "reductions": list(self.reductions), **self.recipe_defaults()}

    def recipe_defaults(self) -> dict[str, dict[str, Any]]:
        """`defaults` with the method's own reduction, as `config.resolve` takes them."""
        sections = {section: dict(values) for section, values in self.defaults.items()}
        sections["method"] = {"reduction": self.reduction, "sft_weight": 0.0, **sections.get("method", {})}
        return sections


def _refuse_all_but(kept: Reduction, reason: str) -> dict[Reduction, str]:
    return {reduction: reason for reduction in get_args(Reduction) if reduction != kept}


_RATIOS = "\nc, r: log-ratios log pi_theta - log pi_ref of the chosen and the rejected response, reduced over tokens"
_SFT = "\nNLL(y_w): -log pi_theta(y_w) per token of the whole chosen response"
_MEANS = "\nw, l: log pi_theta of the chosen and the rejected response, mean per token"
_MARGIN = "-log sigmoid(beta * (c - r))"

_SMOOTH = ("beta", "label_smoothing")
_SIMPO = ("beta", "gamma", "label_smoothing")
_SIMPO_USUAL = {"beta": (1.0, 20.0), "gamma": (0.0, 1.0)}

_NO_RATIO = "down-sampling makes two log-ratios to a reference comparable, and there is no reference"
_PER_TOKEN = "it is defined on the mean log-prob per token"
_IS_MEAN = "divided by its count of tokens it is 'mean'"

_ALL = [
    Method(
        name="sampo",
        loss=losses.dpo,
        reduction="sample",
        option_names=_SMOOTH,
        formula="-log sigmoid(beta * (sum over S_w of r(y_w, t) - sum over S_l of r(y_l, t))), "
        "|S_w| = |S_l| = min(T_w, T_l), r = log pi_theta - log pi_ref",
        paper="arXiv 2406.10957",
        citation=citations.SAMPO,
    ),
    Method(
        name="dpo",
        loss=losses.dpo,
        reduction="sum",
        option_names=_SMOOTH,
        formula="-log sigmoid(beta * (sum over t of r(y_w, t) - sum over t of r(y_l, t))), "
        "r = log pi_theta - log pi_ref",
        paper="arXiv 2305.18290",
        citation=citations.DPO,
    ),
    Method(
        name="hinge",
        loss=losses.hinge,
        reduction="sum",
        formula=f"max(0, 1 - beta * (c - r)){_RATIOS}",
        paper="arXiv 2305.10425 (SLiC-HF)",
        citation=citations.SLIC,
    ),
    Method(
        name="ipo",
        loss=losses.ipo,
        reduction="mean",
        option_names=("beta", "reduction"),
        refused={"expected": _IS_MEAN, "average": _IS_MEAN},
        formula=f"((c - r) - 1 / (2 * beta))^2{_RATIOS}\nwith reduction sample: c and r divided by min(T_w, T_l)",
        paper="arXiv 2310.12036",
        citation=citations.IPO,
    ),
    Method(
        name="kto-pair",
        loss=losses.kto_pair,
        reduction="sum",
        memory="last step",
        formula=f"1/2 (1 - sigmoid(beta * c - K_l)) + 1/2 (1 - sigmoid(K_w - beta * r)){_RATIOS}\n"
        "K_w, K_l: max(0, mean of beta * c, of beta * r) over the previous step",
        paper="arXiv 2402.01306",
        citation=citations.KTO,
    ),
    Method(
        name="dpop",
        loss=losses.dpop,
        reduction="sum",
        option_names=("beta", "dpop_weight"),
        defaults=_defaults(dpop_weight=50.0),
        usual={"beta": (0.01, 1.0), "dpop_weight": (1.0, 500.0)},
        formula=f"-log sigmoid(beta * (c - r - dpop_weight * max(0, -c))){_RATIOS}",
        paper="arXiv 2402.13228",
        citation=citations.DPOP,
    ),
    Method(
        name="dpo-sft",
        loss=losses.dpo,
        reduction="sum",
        option_names=_SMOOTH,
        defaults=_defaults(sft_weight=1.0),
        usual={"beta": (0.01, 1.0), "sft_weight": (0.001, 10.0)},
        formula=f"{_MARGIN} + sft_weight * NLL(y_w){_RATIOS}{_SFT}",
        paper="arXiv 2404.19733",
        citation=citations.IRPO,
    ),
    Method(
        name="r-dpo",
        loss=losses.r_dpo,
        reduction="sum",
        option_names=("beta", "length_weight"),
        defaults=_defaults(length_weight=0.01),
        usual={"beta": (0.01, 1.0), "length_weight": (0.001, 0.5)},
        formula=f"-log sigmoid(beta * (c - r) + length_weight * (T_w - T_l)){_RATIOS}",
        paper="arXiv 2403.19159",
        citation=citations.R_DPO,
    ),
    Method(
        name="tdpo",
        loss=losses.tdpo,
        reduction="sum",
        option_names=("beta", "kl_weight"),
        refused=_refuse_all_but("sum", "its KL is a sum over all tokens, to be set against log-ratios of the same"),
        needs_kl=True,
        defaults=_defaults(kl_weight=0.5),
        usual={"beta": (0.01, 1.0), "kl_weight": (0.05, 2.0)},
        formula=f"-log sigmoid(beta * (c - r - kl_weight * (KL_l - stop_gradient(KL_w)))){_RATIOS}\n"
        "KL_w, KL_l: sum over tokens of KL(pi_ref || pi_theta), whole vocabulary",
        paper="arXiv 2404.11999 (TDPO2)",
        citation=citations.TDPO,
    ),
    Method(
        name="bco-pair",
        loss=losses.bco_pair,
        reduction="sum",
        memory="all steps",
        formula=f"-log sigmoid(beta * c - d) - log sigmoid(-(beta * r - d)){_RATIOS}\n"
        "d: mean of beta * c and beta * r over all steps before",
        paper="arXiv 2404.04656",
        citation=citations.BCO,
    ),
    Method(
        name="nca-pair",
        loss=losses.nca_pair,
        reduction="sum",
        usual={"beta": (0.001, 1.0)},
        formula=f"-log sigmoid(beta * c) - 1/2 log sigmoid(-beta * c) - 1/2 log sigmoid(-beta * r){_RATIOS}",
        paper="arXiv 2402.05369",
        citation=citations.NCA,
    ),
    Method(
        name="sppo-hard",
        loss=losses.sppo_hard,
        reduction="sum",
        usual={"beta": (0.001, 1.0)},
        formula=f"(c - 1 / (2 * beta))^2 + (r + 1 / (2 * beta))^2{_RATIOS}",
        paper="arXiv 2405.00675",
        citation=citations.SPPO,
    ),
    Method(
        name="orpo",
        loss=losses.orpo,
        reduction="mean",
        refused=_refuse_all_but("mean", "odds need a probability per token, the mean"),
        needs_reference=False,
        defaults=_defaults(learning_rate=8e-5, sft_weight=1.0),
        usual={"beta": (0.02, 1.0), "sft_weight": (0.1, 10.0)},
        formula="-beta * log sigmoid(log odds(w) - log odds(l)) + sft_weight * NLL(y_w), odds(x) = e^x / (1 - e^x)"
        f"{_MEANS}{_SFT}",
        paper="arXiv 2403.07691",
        citation=citations.ORPO,
    ),
    Method(
        name="simpo",
        loss=losses.simpo,
        reduction="mean",
        option_names=_SIMPO,
        refused=_refuse_all_but("mean", _PER_TOKEN),
        needs_reference=False,
        defaults=_defaults(beta=2.5, gamma=1.4),
        usual=_SIMPO_USUAL,
        formula=f"-log sigmoid(beta * (w - l) - gamma){_MEANS}",
        paper="arXiv 2405.14734",
        citation=citations.SIMPO,
    ),
    Method(
        name="cpo",
        loss=losses.cpo,
        reduction="sum",
        option_names=_SMOOTH,
        refused={"sample": _NO_RATIO, "expected": _NO_RATIO, "average": _NO_RATIO},
        needs_reference=False,
        defaults=_defaults(sft_weight=1.0),
        usual={"beta": (0.01, 1.0), "sft_weight": (0.01, 10.0)},
        formula="-log sigmoid(beta * (w - l)) + sft_weight * NLL(y_w)"
        f"\nw, l: log pi_theta of the chosen and the rejected response, sum over tokens{_SFT}",
        paper="arXiv 2401.08417",
        citation=citations.CPO,
    ),
    Method(
        name="cpo-simpo",
        loss=losses.simpo,
        reduction="mean",
        option_names=_SIMPO,
        refused=_refuse_all_but("mean", _PER_TOKEN),
        needs_reference=False,
        defaults=_defaults(beta=10.0, gamma=5.4, sft_weight=0.05),
        usual=_SIMPO_USUAL | {"sft_weight": (0.001, 1.0)},
        formula=f"-log sigmoid(beta * (w - l) - gamma) + sft_weight * NLL(y_w){_MEANS}{_SFT}",
        paper="arXiv 2401.08417 with arXiv 2405.14734, github.com/fe1ixxu/CPO_SIMPO",
        citation=f"{citations.CPO}\n\n{citations.SIMPO}",
    ),
]

METHODS: dict[str, Method] = {method.name: method for method in _ALL}


def find(name: str) -> Method:
    """The method of that name. Raises UsageError with the nearest one where there is none."""
    if name not in METHODS:
        raise UsageError(f"unknown method '{name}'{nearest(name, METHODS)}", hint=f"known: {', '.join(METHODS)}")
    return METHODS[name]
