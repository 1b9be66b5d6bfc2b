"""The table of methods: complete, consistent, and strict about what has no meaning."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import pytest

from sampo_cli.config import MethodConfig, Recipe
from sampo_cli.errors import UsageError
from sampo_cli.method_checks import DRAWING, OPTIONS, check
from sampo_cli.method_table import METHODS
from sampo_cli.plan import resolve_recipe
from sampo_cli.sampling import Reduction
from scripts import make_methods

REFERENCE_FREE = {"orpo", "simpo", "cpo", "cpo-simpo"}
NAMES = [
    *("dpo", "sampo", "hinge", "ipo", "kto-pair", "dpop", "dpo-sft", "r-dpo", "tdpo"),
    *("bco-pair", "nca-pair", "sppo-hard", "orpo", "simpo", "cpo", "cpo-simpo"),
]


def resolved(name: str, **method: Any) -> Recipe:
    tree = {"model": {"name": "m"}, "data": {"sources": ["d"]}, "method": {"name": name, **method}}
    return resolve_recipe(tree)


def warnings(name: str, **method: Any) -> list[str]:
    return check(METHODS[name], resolved(name, **method).method.model_dump())


def test_all_names_are_there() -> None:
    assert set(METHODS) == set(NAMES)
    assert {name for name, method in METHODS.items() if not method.needs_reference} == REFERENCE_FREE
    assert {name for name, method in METHODS.items() if method.needs_kl} == {"tdpo"}


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_is_complete(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert method.paper
    assert method.citation.startswith("@")
    assert method.formula.count("\n") <= 3
    assert method.reduction in method.reductions
    assert set(method.refused) <= set(get_args(Reduction))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_resolves_to_everything_that_the_loss_takes(name: str) -> None:
    method, recipe = METHODS[name], resolved(name)
    settings = recipe.method.model_dump()
    parameters = inspect.signature(method.loss).parameters
    assert set(method.option_names) <= set(parameters)
    assert all(settings[option] is not None for option in method.option_names)
    given = set(method.option_names) | {"scores", "baseline", "chosen_baseline", "rejected_baseline"}
    assert set(parameters) <= given
    assert settings["reduction"] == method.reduction
    assert settings["sft_weight"] is not None
    assert recipe.train.learning_rate is not None
    assert recipe.train.epochs == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_within_the_usual_range(name: str) -> None:
    assert warnings(name) == []


def test_published_defaults() -> None:
    keys = ("beta", "gamma", "sft_weight", "dpop_weight", "length_weight", "kl_weight")
    values = {name: [getattr(resolved(name).method, key) for key in keys] for name in NAMES}
    plain = [0.1, None, 0.0, None, None, None]
    assert values == {
        **dict.fromkeys(NAMES, plain),
        "dpop": [0.1, None, 0.0, 50.0, None, None],
        "dpo-sft": [0.1, None, 1.0, None, None, None],
        "r-dpo": [0.1, None, 0.0, None, 0.01, None],
        "tdpo": [0.1, None, 0.0, None, None, 0.5],
        "orpo": [0.1, None, 1.0, None, None, None],
        "simpo": [2.5, 1.4, 0.0, None, None, None],
        "cpo": [0.1, None, 1.0, None, None, None],
        "cpo-simpo": [10.0, 5.4, 0.05, None, None, None],
    }


def test_what_is_said_is_not_overwritten_by_a_default() -> None:
    method = resolved("cpo", beta=0.3, sft_weight=0, reduction="mean").method
    assert (method.beta, method.sft_weight, method.reduction) == (0.3, 0, "mean")


# Warnings ------------------------------------------------------------------------------------------------------------


def test_values_far_from_usual_are_named_with_the_usual_range() -> None:
    assert warnings("simpo", beta=0.1, gamma=0.05) == ["method.beta is 0.1; simpo is known to work with 1 to 20"]
    assert warnings("ipo", beta=10) == ["method.beta is 10; ipo is known to work with 0.01 to 1"]
    # 5 / 2.5 = 2
    expected = "method.gamma is 2 times beta; simpo is known to work with 0 to 1 times beta"
    assert warnings("simpo", gamma=5) == [expected]


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 1.6), (2.5, 0.25), (2.0, 1.0), (2.5, 1.375), (10, 3)])
def test_published_simpo_settings_are_usual(beta: float, gamma: float) -> None:
    assert warnings("simpo", beta=beta, gamma=gamma) == []


# Refusals ------------------------------------------------------------------------------------------------------------


def test_reductions_that_have_a_meaning() -> None:
    every = get_args(Reduction)
    assert {name: METHODS[name].reductions for name in NAMES} == {
        **dict.fromkeys(NAMES, every),
        "ipo": ("sum", "sample", "mean"),
        "tdpo": ("sum",),
        "cpo": ("sum", "mean"),
        **dict.fromkeys(("orpo", "simpo", "cpo-simpo"), ("mean",)),
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", get_args(Reduction))
def test_a_reduction_is_taken_or_refused_with_the_reason(name: str, reduction: Reduction) -> None:
    if reduction in METHODS[name].reductions:
        assert resolved(name, reduction=reduction).method.reduction == reduction
        return
    with pytest.raises(UsageError, match=f"'{reduction}' has no meaning for {name}, because ") as refusal:
        resolved(name, reduction=reduction)
    assert METHODS[name].refused[reduction] in refusal.value.message


@pytest.mark.parametrize("key", OPTIONS)
def test_an_option_that_a_method_does_not_have_is_refused_and_not_ignored(key: str) -> None:
    for name, method in METHODS.items():
        if key in method.option_names:
            assert getattr(resolved(name, **{key: 0.25}).method, key) == 0.25
        else:
            with pytest.raises(UsageError, match=f"method.{key}: {name} has none; it belongs to"):
                resolved(name, **{key: 0.25})


def test_settings_of_the_draw_are_refused_where_nothing_is_drawn() -> None:
    assert resolved("sampo", draws=4, sampling="independent").method.draws == 4
    assert resolved("hinge", reduction="sample", draws=4).method.draws == 4
    with pytest.raises(UsageError) as refusal:
        resolved("dpo", draws=4, sampling="independent")
    assert refusal.value.message.splitlines() == [
        "method.draws: only reduction 'sample' draws positions, and this is 'sum'",
        "method.sampling: only reduction 'sample' draws positions, and this is 'sum'",
    ]


def test_every_key_of_the_section_is_somebodys() -> None:
    anybodys = {"name", "beta", "reduction", "sft_weight", *DRAWING}
    assert set(MethodConfig.model_fields) == anybodys | set(OPTIONS)


def test_the_page_is_what_the_table_says() -> None:
    written = make_methods.PAGE.read_text(encoding="utf-8")
    assert written == make_methods.page(), "run: .venv/bin/python -m scripts.make_methods"
