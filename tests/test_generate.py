"""Answers to prompts, and the demo's table of them."""

from __future__ import annotations

import io

from rich.console import Console

from sampo_cli.generate import Answer, answer
from sampo_cli.policy import Policy
from scripts.demo import answers_table
from tests import tiny


def test_a_batch_answers_as_each_prompt_alone() -> None:
    """Left padding must not show; tokens are counted up to the end of turn, or to the cap."""
    policy = Policy(tiny.make_model(tiny.CONFIGS["llama"]()))
    tokenizer = tiny.make_tokenizer()
    prompts = ["one", "the user and the assistant say the same thing"]
    together = answer(policy, tokenizer, prompts, max_new_tokens=12)
    assert together == [answer(policy, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert all(0 < one.tokens <= 12 and (one.ended or one.tokens == 12) for one in together)


def test_answers_with_brackets_are_shown_as_they_are() -> None:
    before, after = Answer("a [list]?", "x[0] [/dim] [bold]", 7, True), Answer("a [list]?", "y[1]", 3, False)
    shown = io.StringIO()
    Console(width=120, file=shown).print(answers_table([before], [after]))
    text = shown.getvalue()
    assert all(part in text for part in ("a [list]?", "x[0] [/dim] [bold]", "(7)", "y[1]", "(3+)"))
    assert "7.0" in text
