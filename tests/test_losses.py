"""Losses against hand-computed numbers, against the released code's, and against finite differences."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sampo_cli.losses import LossOutput, PairScores, add_likelihood
from sampo_cli.method_table import METHODS
from sampo_cli.sampling import pair_generator, pair_weights


def scores(policy: tuple, reference: tuple | None = (0.0, 0.0), tokens: tuple = (1, 1), **more: float) -> PairScores:
    """One pair from plain numbers."""
    chosen, rejected = (torch.tensor([x]) for x in tokens)
    return PairScores(
        *(torch.tensor([float(x)]) for x in policy),
        *((None, None) if reference is None else (torch.tensor([float(x)]) for x in reference)),
        chosen_tokens=chosen,
        rejected_tokens=rejected,
        chosen_kept=chosen,
        rejected_kept=rejected,
        **{name: torch.tensor([float(x)]) for name, x in more.items()},
    )


def defaults(name: str) -> dict[str, Any]:
    """What the loss of a method is called with when a recipe says nothing."""
    section = METHODS[name].recipe_defaults()["method"]
    return {option: section[option] for option in METHODS[name].option_names if option != "label_smoothing"}


def softplus(x: float) -> float:
    """-log sigmoid(-x) = log(1 + e^x)."""
    return math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# One pair with c = -1 - (-2) = 1 and r = -4 - (-3.5) = -0.5, hence c - r = 1.5; beta 0.1 unless given ----------------

PAIR = scores((-1, -4), (-2, -3.5), tokens=(3, 7), chosen_kl=0.6, rejected_kl=2.0)
BY_HAND = {
    "dpo": ({}, softplus(-0.15)),
    "sampo": ({}, softplus(-0.15)),
    "dpo-sft": ({}, softplus(-0.15)),  # its likelihood term is tested below
    "hinge": ({}, 1 - 0.15),
    "ipo": ({}, (1.5 - 5) ** 2),  # 1 / (2 * 0.1) = 5
    # chosen: 1 - s(0.1 - 0.2) = s(0.1); rejected: 1 - s(0.3 - (-0.05)) = s(-0.35)
    "kto-pair": ({"chosen_baseline": 0.3, "rejected_baseline": 0.2}, (sigmoid(0.1) + sigmoid(-0.35)) / 2),
    "dpop": ({"dpop_weight": 50.0}, softplus(-0.15)),  # c > 0: no punishment
    "r-dpo": ({"length_weight": 0.01}, softplus(-(0.15 - 0.04))),  # 3 - 7 = -4 tokens
    "tdpo": ({"kl_weight": 0.5}, softplus(-0.1 * (1.5 - 0.5 * (2.0 - 0.6)))),
    "bco-pair": ({"baseline": 0.02}, softplus(-(0.1 - 0.02)) + softplus(-0.05 - 0.02)),
    "nca-pair": ({}, softplus(-0.1) + 0.5 * softplus(0.1) + 0.5 * softplus(-0.05)),
    "sppo-hard": ({}, (1 - 5) ** 2 + (-0.5 + 5) ** 2),
    "simpo": ({"beta": 2.5, "gamma": 1.4}, softplus(-(2.5 * 3 - 1.4))),  # w - l = -1 - (-4) = 3
    "cpo-simpo": ({"beta": 10.0, "gamma": 5.4}, softplus(-(10 * 3 - 5.4))),
    "cpo": ({}, softplus(-0.3)),
    # log odds: w - log(1 - e^w) = -1 - log(1 - 0.367879) = -0.541325; l: -4 - log(1 - 0.018316) = -3.981515
    "orpo": ({}, 0.1 * softplus(-(-0.5413248 + 3.9815149))),
}


@pytest.mark.parametrize("name", METHODS)
def test_by_hand(name: str) -> None:
    options, expected = BY_HAND[name]
    out = METHODS[name].loss(PAIR, **{"beta": 0.1, **options})
    assert out.losses.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_rewards_are_beta_times_what_is_compared(name: str) -> None:
    options, _ = BY_HAND[name]
    beta = options.get("beta", 0.1)
    out = METHODS[name].loss(PAIR, **{"beta": beta, **options})
    expected = (beta * 1, beta * -0.5) if METHODS[name].needs_reference else (beta * -1, beta * -4)
    if name == "tdpo":  # log-ratio plus sequence KL: 1 + 0.6 and -0.5 + 2
        expected = (0.16, 0.15)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == pytest.approx(expected, rel=1e-6)


def test_label_smoothing_weighs_both_labels() -> None:
    expected = 0.9 * softplus(-0.15) + 0.1 * softplus(0.15)
    assert METHODS["dpo"].loss(PAIR, beta=0.1, label_smoothing=0.1).losses.item() == pytest.approx(expected)
    expected = 0.9 * softplus(-6.1) + 0.1 * softplus(6.1)  # 2.5 * 3 - 1.4 = 6.1
    out = METHODS["simpo"].loss(PAIR, beta=2.5, gamma=1.4, label_smoothing=0.1)
    assert out.losses.item() == pytest.approx(expected)
    expected = 0.9 * softplus(-0.3) + 0.1 * softplus(0.3)
    assert METHODS["cpo"].loss(PAIR, beta=0.1, label_smoothing=0.1).losses.item() == pytest.approx(expected)


def test_dpop_punishes_a_chosen_response_below_the_reference() -> None:
    # c = -2, r = -5: 0.1 * (-2 + 5 - 50 * 2) = -9.7
    out = METHODS["dpop"].loss(scores((-2, -5)), beta=0.1, dpop_weight=50.0)
    assert out.losses.item() == pytest.approx(softplus(9.7))


def test_ipo_divides_sampled_sums_by_the_tokens_of_a_draw() -> None:
    # T_m = min(4, 10) = 4: c = 8 / 4 = 2, r = -2 / 4 = -0.5, (2.5 - 5)^2; the released code divides r by 10
    pair = scores((8, -2), tokens=(4, 10))
    sampled = METHODS["ipo"].loss(pair, beta=0.1, reduction="sample")
    assert sampled.losses.item() == pytest.approx(6.25)
    assert sampled.chosen_rewards.item() == pytest.approx(0.2)
    assert METHODS["ipo"].loss(pair, beta=0.1, reduction="sum").losses.item() == pytest.approx((10 - 5) ** 2)


def test_the_likelihood_term_is_the_same_for_every_method() -> None:
    pair = replace(PAIR, chosen_nll=torch.tensor([0.8]))
    for name, method in METHODS.items():
        options, _ = BY_HAND[name]
        out = method.loss(pair, **{"beta": 0.1, **options})
        more = add_likelihood(out, pair, sft_weight=0.5)
        assert (more.losses - out.losses).item() == pytest.approx(0.4, rel=1e-5)
        assert torch.equal(more.chosen_rewards, out.chosen_rewards)
        assert add_likelihood(out, PAIR, sft_weight=0.0) is out


def test_what_was_not_computed_is_not_taken_for_zero() -> None:
    nothing = scores((-1, -2), None)
    for name, method in METHODS.items():
        if method.needs_reference:
            with pytest.raises(ValueError, match="reference"):
                method.loss(nothing, **defaults(name))
    with pytest.raises(ValueError, match="whole vocabulary"):
        METHODS["tdpo"].loss(scores((-1, -2)), **defaults("tdpo"))
    out = METHODS["cpo"].loss(nothing, beta=0.1)
    with pytest.raises(ValueError, match="whole chosen response"):
        add_likelihood(out, nothing, sft_weight=1.0)


# Limits --------------------------------------------------------------------------------------------------------------

AT_THE_START = {
    **dict.fromkeys(("sampo", "dpo", "dpo-sft", "dpop", "r-dpo", "tdpo"), math.log(2)),
    **{"hinge": 1.0, "ipo": 25.0, "kto-pair": 0.5, "sppo-hard": 50.0},
    **{"bco-pair": 2 * math.log(2), "nca-pair": 2 * math.log(2)},
}


@pytest.mark.parametrize("name", AT_THE_START)
def test_policy_equal_to_reference(name: str) -> None:
    """Every log-ratio is 0, whatever the log-probs; r-dpo needs equal lengths for ln 2."""
    pair = scores((-7, -90), (-7, -90), tokens=(5, 5), chosen_kl=0.0, rejected_kl=0.0)
    assert METHODS[name].loss(pair, **defaults(name)).losses.item() == pytest.approx(AT_THE_START[name], abs=1e-6)


IDENTICAL = {"orpo": 0.1 * math.log(2), "simpo": softplus(1.4), "cpo-simpo": softplus(5.4), "cpo": math.log(2)}


@pytest.mark.parametrize("name", IDENTICAL)
def test_identical_responses_without_a_reference(name: str) -> None:
    out = METHODS[name].loss(scores((-3, -3), None), **defaults(name))
    assert out.losses.item() == pytest.approx(IDENTICAL[name], rel=1e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_extreme_log_ratios_have_finite_losses_and_gradients(name: str, gap: float) -> None:
    policy = [torch.tensor([x], requires_grad=True) for x in ((gap, 0.0) if gap < 0 else (0.0, -gap))]
    pair = replace(scores((0, 0), chosen_kl=1e4, rejected_kl=0), policy_chosen=policy[0], policy_rejected=policy[1])
    losses = METHODS[name].loss(pair, **defaults(name)).losses
    losses.sum().backward()
    assert losses.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy)


@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_extreme_dpo_is_linear_and_not_infinite(gap: float) -> None:
    # log(sigmoid(x)) is -inf at x = -120 in float32; the loss at -x is x
    assert METHODS["dpo"].loss(scores((gap, 0)), beta=1.0).losses.item() == pytest.approx(max(-gap, 0.0))
    out = METHODS["simpo"].loss(scores((gap, 0)), beta=1.0, gamma=0.0)
    assert out.losses.item() == pytest.approx(max(-gap, 0.0))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if "sample" in method.reductions])
def test_one_token_responses_and_equal_lengths_make_sample_sum(name: str) -> None:
    for length in (1, 6):
        made = [loss_of(name, reduction, (length, length)).losses for reduction in ("sample", "sum")]
        if name == "ipo":  # the mean over the same tokens
            made[1] = loss_of(name, "mean", (length, length)).losses
        torch.testing.assert_close(*made)


# Finite differences --------------------------------------------------------------------------------------------------


def token_scores(
    policy: list[torch.Tensor], reference: list[torch.Tensor] | None, reduction: str, draws: int, **more: torch.Tensor
) -> PairScores:
    """One pair from token log-probs, float64 [T_w] and [T_l], reduced as a batch does it."""
    lengths = [len(row) for row in policy]
    weights = pair_weights(*lengths, reduction, pair_generator(0, 0, 0), draws)
    weight_rows = [torch.from_numpy(row).double() for row in weights]

    def reduced(rows: list[torch.Tensor]) -> list[torch.Tensor]:
        return [(row * weight).sum()[None] for row, weight in zip(rows, weight_rows, strict=True)]

    counts = [torch.tensor([n]) for n in lengths]
    kept = [(weight != 0).sum()[None] for weight in weight_rows]
    without: list[torch.Tensor | None] = [None, None]
    nll = -policy[0].mean()[None]
    ours = reduced(reference) if reference else without
    return PairScores(*reduced(policy), *ours, *counts, *kept, chosen_nll=nll, **more)


def token_rows(lengths: tuple[int, int], seed: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(-rng.gamma(2.0, 1.0, n) - 0.05) for n in lengths]


def loss_of(name: str, reduction: str, lengths: tuple[int, int], draws: int = 1) -> LossOutput:
    kl = {"chosen_kl": torch.tensor([0.4]), "rejected_kl": torch.tensor([0.9])} if METHODS[name].needs_kl else {}
    pair = token_scores(token_rows(lengths, 1), token_rows(lengths, 2), reduction, draws, **kl)
    return METHODS[name].loss(pair, **options_of(name, reduction))


def options_of(name: str, reduction: str) -> dict[str, Any]:
    more: dict[str, dict[str, Any]] = {
        "ipo": {"reduction": reduction},
        "kto-pair": {"chosen_baseline": 0.1, "rejected_baseline": 0.05},
        "bco-pair": {"baseline": 0.03},
    }
    return defaults(name) | more.get(name, {})


@pytest.mark.parametrize(
    ("name", "reduction", "draws"),
    [(n, r, d) for n, m in METHODS.items() for r in m.reductions for d in ((1, 3) if r == "sample" else (1,))],
)
def test_gradients_are_those_of_finite_differences(name: str, reduction: str, draws: int) -> None:
    """In every token's log-prob, the likelihood term included, and for tdpo in the rejected response's KL."""
    policy, reference = token_rows((4, 7), 1), token_rows((4, 7), 2)
    rejected_kl = torch.tensor([0.9], dtype=torch.float64, requires_grad=True)
    method = METHODS[name]

    def loss(chosen: torch.Tensor, rejected: torch.Tensor, kl: torch.Tensor) -> torch.Tensor:
        more = {"chosen_kl": torch.tensor([0.4]), "rejected_kl": kl} if method.needs_kl else {}
        against = reference if method.needs_reference else None
        pair = token_scores([chosen, rejected], against, reduction, draws, **more)
        return add_likelihood(method.loss(pair, **options_of(name, reduction)), pair, 0.3).losses

    inputs = [row.requires_grad_() for row in policy]
    assert torch.autograd.gradcheck(loss, (*inputs, rejected_kl))


def test_tdpo_sends_no_gradient_through_the_chosen_responses_kl() -> None:
    kl = [torch.tensor([x], requires_grad=True) for x in (0.6, 2.0)]
    pair = replace(PAIR, chosen_kl=kl[0], rejected_kl=kl[1])
    METHODS["tdpo"].loss(pair, beta=0.1, kl_weight=0.5).losses.sum().backward()
    assert kl[0].grad is None
    # d/dKL_l of -log s(u), u = 0.1 * (1.5 - 0.5 * 1.4) = 0.08: s(-u) * 0.1 * 0.5
    assert kl[1].grad is not None
    assert kl[1].grad.item() == pytest.approx(sigmoid(-0.08) * 0.05)


# The released implementations' numbers ------------------------------------------------------------------------------

# golden name: (our method, reduction, their names of our options)
RELEASED: dict[str, tuple[str, str, dict[str, str]]] = {
    "dpo": ("dpo", "sum", {}),
    "dpo_label_smoothing": ("dpo", "sum", {}),
    "sampo": ("sampo", "sample", {}),
    "hinge": ("hinge", "sum", {}),
    "ipo": ("ipo", "mean", {}),
    "kto_pair": ("kto-pair", "sum", {}),
    "dpop": ("dpop", "sum", {"dpop_lambda": "dpop_weight"}),
    "mix": ("dpo-sft", "sum", {"sft_lambda": "sft_weight"}),
    "lenN": ("r-dpo", "sum", {"lenN_lambda": "length_weight"}),
    "bco_pair_first_batch": ("bco-pair", "sum", {}),
    "nca_pair": ("nca-pair", "sum", {}),
    "sppo_hard": ("sppo-hard", "sum", {}),
    "sampo+hinge": ("hinge", "sample", {}),
    "sampo+kto_pair": ("kto-pair", "sample", {}),
    "sampo+dpop": ("dpop", "sample", {}),
    "sampo+nca_pair": ("nca-pair", "sample", {}),
    "sampo+sppo_hard": ("sppo-hard", "sample", {}),
    "tdpo2": ("tdpo", "sum", {"alpha": "kl_weight"}),
    "orpo_odds_term": ("orpo", "mean", {}),
    "simpo": ("simpo", "mean", {}),
    "cpo": ("cpo", "sum", {}),
    "cpo_simpo": ("cpo-simpo", "mean", {}),
}


def released_cases(shared: Path) -> list[dict[str, Any]]:
    cases = json.loads((shared / "golden" / "released_losses.json").read_text())["cases"]
    assert len(cases) == 3
    return cases


def released_scores(case: dict, reduction: str) -> PairScores:
    def reduced(model: str, side: str) -> torch.Tensor:
        rows = zip(case[model][side], case["kept_positions"][side], strict=True)
        sums = [sum(row[i] for i in kept) if reduction == "sample" else sum(row) for row, kept in rows]
        return torch.tensor(sums, dtype=torch.float64) / (counts[side] if reduction == "mean" else 1)

    counts = {side: torch.tensor([len(row) for row in case["policy_logps"][side]]) for side in ("chosen", "rejected")}
    kept = {side: torch.tensor([len(row) for row in case["kept_positions"][side]]) for side in ("chosen", "rejected")}
    nll = torch.tensor([-sum(row) / len(row) for row in case["policy_logps"]["chosen"]])
    return PairScores(
        *(reduced(model, side) for model in ("policy_logps", "ref_logps") for side in ("chosen", "rejected")),
        *counts.values(),
        *(kept if reduction == "sample" else counts).values(),
        chosen_nll=nll,
        chosen_kl=torch.tensor(case["sequential_kl"]["chosen"]),
        rejected_kl=torch.tensor(case["sequential_kl"]["rejected"]),
    )


def test_every_released_number_is_used(shared: Path) -> None:
    assert all(set(case["expected"]) == set(RELEASED) for case in released_cases(shared))
    assert {method for method, _, _ in RELEASED.values()} == set(METHODS)


@pytest.mark.parametrize("name", RELEASED)
def test_released_numbers(shared: Path, name: str) -> None:
    method, reduction, names = RELEASED[name]
    for case in released_cases(shared):
        pairs, expected = released_scores(case, reduction), case["expected"][name]
        options = {names.get(key, key): value for key, value in expected["params"].items()}
        if name == "sampo+dpop":
            options["dpop_weight"] = 50.0
        sft_weight = options.pop("sft_weight", 0.0)
        theirs = torch.tensor(expected["losses"], dtype=torch.float64)
        chosen, rejected = pairs.log_ratios()
        if method == "kto-pair":
            # Theirs are the batch's own means, and 2B losses whose mean is taken: the pair's is half their sum.
            options["chosen_baseline"] = options["beta"] * max(0.0, chosen.mean().item())
            options["rejected_baseline"] = options["beta"] * max(0.0, rejected.mean().item())
            theirs = (theirs[: len(chosen)] + theirs[len(chosen) :]) / 2
        if method == "bco-pair":  # the running mean after its first update: this batch's mean reward
            options["baseline"] = options["beta"] * torch.cat([chosen, rejected]).mean().item()
        out = add_likelihood(METHODS[method].loss(pairs, **options), pairs, sft_weight)
        # Their sampled scores are float32 sums; a square of 50 keeps 1e-6 of itself.
        rtol = 1e-6 if reduction == "sample" else 0
        torch.testing.assert_close(out.losses, theirs, atol=1e-5, rtol=rtol)
        for ours, side in ((out.chosen_rewards, "chosen_rewards"), (out.rejected_rewards, "rejected_rewards")):
            torch.testing.assert_close(ours, torch.tensor(expected[side], dtype=ours.dtype), atol=1e-5, rtol=0)


def test_the_released_likelihood_lets_long_responses_dominate_and_ours_does_not(shared: Path) -> None:
    """The released CPO takes the mean over the batch's tokens; ours is the mean over pairs of the mean per token."""
    for case in released_cases(shared):
        rows = case["policy_logps"]["chosen"]
        theirs = -sum(map(sum, rows)) / sum(map(len, rows))
        assert case["expected"]["cpo"]["chosen_nll_batch_token_mean"] == pytest.approx(theirs)
        pairs = released_scores(case, "sum")
        out = METHODS["cpo"].loss(pairs, beta=0.1)
        ours = (add_likelihood(out, pairs, 1.0).losses - out.losses).mean().item()
        assert ours == pytest.approx(sum(-sum(row) / len(row) for row in rows) / len(rows), abs=1e-6)
        assert abs(ours - theirs) > 0.01
