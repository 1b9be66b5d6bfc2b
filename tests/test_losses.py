"""Losses against hand-computed numbers and against the released code's."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from sampo_cli.losses import METHODS, PairScores


def scores(policy: tuple, reference: tuple | None = (0.0, 0.0), tokens: tuple = (1, 1)) -> PairScores:
    """One pair from plain numbers."""
    chosen, rejected = (torch.tensor([x]) for x in tokens)
    return PairScores(
        *(torch.tensor([float(x)]) for x in policy),
        *((None, None) if reference is None else (torch.tensor([float(x)]) for x in reference)),
        chosen_tokens=chosen,
        rejected_tokens=rejected,
        chosen_kept=chosen,
        rejected_kept=rejected,
    )


def test_dpo_by_hand() -> None:
    # c = -1 - (-2) = 1, r = -4 - (-3) = -1, beta (c - r) = 0.2, -log sigmoid(0.2) = log(1 + e^-0.2) = 0.598139
    out = METHODS["dpo"].loss(scores((-1, -4), (-2, -3)), beta=0.1)
    assert out.losses.item() == pytest.approx(math.log1p(math.exp(-0.2)), abs=1e-7)
    assert out.chosen_rewards.item() == pytest.approx(0.1)
    assert out.rejected_rewards.item() == pytest.approx(-0.1)


def test_policy_equal_to_reference_is_ln_2() -> None:
    out = METHODS["sampo"].loss(scores((-7, -90), (-7, -90)), beta=0.1)
    assert out.losses.item() == pytest.approx(math.log(2), abs=1e-7)


def test_label_smoothing_weighs_both_labels() -> None:
    # 0.9 * log(1 + e^-0.2) + 0.1 * log(1 + e^0.2)
    expected = 0.9 * math.log1p(math.exp(-0.2)) + 0.1 * math.log1p(math.exp(0.2))
    out = METHODS["dpo"].loss(scores((-1, -4), (-2, -3)), beta=0.1, label_smoothing=0.1)
    assert out.losses.item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_extreme_log_ratios_stay_finite(gap: float) -> None:
    out = METHODS["dpo"].loss(scores((gap, 0)), beta=1.0)
    assert out.losses.item() == pytest.approx(max(-gap, 0.0))


def test_a_missing_reference_is_not_taken_for_zero() -> None:
    with pytest.raises(ValueError, match="reference"):
        METHODS["dpo"].loss(scores((-1, -2), None), beta=0.1)


def golden_scores(case: dict, kept: bool) -> PairScores:
    sums = []
    for model in ("policy_logps", "ref_logps"):
        for side in ("chosen", "rejected"):
            rows = zip(case[model][side], case["kept_positions"][side], strict=True)
            sums.append(torch.tensor([sum(row[i] for i in keep) if kept else sum(row) for row, keep in rows]))
    whole = [torch.tensor([len(row) for row in case["policy_logps"][side]]) for side in ("chosen", "rejected")]
    return PairScores(*sums, *whole, *whole)


@pytest.mark.parametrize(
    ("name", "method", "kept"), [("dpo", "dpo", False), ("dpo_label_smoothing", "dpo", False), ("sampo", "sampo", True)]
)
def test_released_numbers(shared: Path, name: str, method: str, kept: bool) -> None:
    cases = json.loads((shared / "golden" / "released_losses.json").read_text())["cases"]
    assert len(cases) == 3
    for case in cases:
        expected = case["expected"][name]
        out = METHODS[method].loss(golden_scores(case, kept), **expected["params"])
        for ours, theirs in (
            (out.losses, "losses"),
            (out.chosen_rewards, "chosen_rewards"),
            (out.rejected_rewards, "rejected_rewards"),
        ):
            torch.testing.assert_close(ours, torch.tensor(expected[theirs]), atol=1e-5, rtol=0)


def test_the_table_names_its_methods_and_gives_defaults_for_every_option() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert method.formula
        assert method.paper
        assert method.citation.startswith("@")
        assert method.recipe_defaults()["method"]["beta"] > 0
