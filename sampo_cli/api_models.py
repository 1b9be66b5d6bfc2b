"""Functions about what came of a run: measured, talked with. Each does what its command does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

from sampo_cli.calls import Place, frees_models, interface, refuse_below, text, texts
from sampo_cli.errors import UsageError

if TYPE_CHECKING:
    from sampo_cli.dialogue import Chat, Reply, Side
    from sampo_cli.eval_subject import Evaluation
    from sampo_cli.generate import Decoding
    from sampo_cli.settings import Settings
    from sampo_cli.subject import Subject

SIDES: dict[str, tuple[Side, ...]] = {"adapter": ("adapter",), "base": ("base",), "both": ("adapter", "base")}
"""Who answers, by what `side` may be."""


@interface
@frees_models
def evaluate(
    subject: Place,
    *,
    adapter: Place | None = None,
    quantization: str | None = None,
    data: Place | Sequence[Place] | None = None,
    limit: int | None = None,
    generate: int = 0,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    seed: int = 0,
    judge: str | None = None,
    suite: str | None = None,
    output: Place | None = None,
    settings: Settings | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Measure a run or a model: pairs against the base, length bias, answers, benchmarks.

    Args:
        subject: a run, an adapter or a model.
        adapter: of a run or a folder, on the model that `subject` is then.
        quantization: of the base, if not as trained: nf4, int8 or none.
        data: pairs, instead of the run's held-out ones.
        limit: most pairs, and examples of a task.
        generate: prompts of the pairs to answer.
        max_new_tokens: of an answer.
        temperature: 0 is greedy.
        seed: of sampled answers.
        judge: an annotator of alpaca_eval.
        suite: sampo-paper, open-llm-leaderboard or tasks of lm-eval with commas between.
        output: a folder for the results; `eval/` in the run if not given.
        settings: any other key of a recipe.
        quiet: no progress, only warnings.

    Raises:
        SampoError: of the kind that `sampo eval` would end with.
    """
    if suite == "":
        raise UsageError("--suite: no name", hint="sampo-paper, open-llm-leaderboard or tasks of lm-eval")
    refuse_below(1, limit=limit)
    refuse_below(0, generate=generate)
    decoding = _decoding(max_new_tokens, temperature, seed)
    from sampo_cli.console import run_view
    from sampo_cli.eval_subject import Wanted
    from sampo_cli.eval_subject import evaluate as measure
    from sampo_cli.judge import check_judge
    from sampo_cli.suites import find_suite

    found = _find(subject, adapter, quantization, settings, texts(data) or ())
    if judge:
        check_judge(judge)
    wanted = Wanted(
        pairs=bool(data or generate) or not suite,
        generate=generate,
        decoding=decoding,
        judge=judge,
        suite=find_suite(suite) if suite else None,
        limit=limit,
    )
    with run_view(quiet=quiet) as view:
        return measure(found, wanted, text(output), view.note)


@overload
def chat(
    subject: Place,
    *,
    adapter: Place | None = ...,
    quantization: str | None = ...,
    prompt: None = ...,
    side: Literal["adapter", "base", "both"] | None = ...,
    system: str | None = ...,
    max_new_tokens: int = ...,
    temperature: float = ...,
    seed: int = ...,
    settings: Settings | None = ...,
) -> Chat: ...


@overload
def chat(
    subject: Place,
    *,
    adapter: Place | None = ...,
    quantization: str | None = ...,
    prompt: str,
    side: Literal["adapter", "base", "both"] | None = ...,
    system: str | None = ...,
    max_new_tokens: int = ...,
    temperature: float = ...,
    seed: int = ...,
    settings: Settings | None = ...,
) -> list[Reply]: ...


@interface
@frees_models
def chat(
    subject: Place,
    *,
    adapter: Place | None = None,
    quantization: str | None = None,
    prompt: str | None = None,
    side: Literal["adapter", "base", "both"] | None = None,
    system: str | None = None,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    seed: int = 0,
    settings: Settings | None = None,
) -> Chat | list[Reply]:
    """Answers of a run or a model to one prompt; without one a conversation, whose `ask` answers.

    Args:
        subject: a run, an adapter or a model.
        adapter: of a run or a folder, on the model that `subject` is then.
        quantization: of the base, if not as trained: nf4, int8 or none.
        prompt: what to answer.
        side: who answers; the adapter if there is one.
        system: a system turn.
        max_new_tokens: of an answer.
        temperature: 0 is greedy.
        seed: of sampled answers.
        settings: any other key of a recipe.

    Raises:
        SampoError: of the kind that `sampo chat` would end with.
    """
    if prompt is not None and not prompt.strip():
        raise UsageError("nothing to answer: the prompt is empty", hint='--prompt "...", or text on stdin')
    if side not in (None, *SIDES):
        raise UsageError(f"side '{side}': not known", hint=f"one of {', '.join(SIDES)}")
    decoding = _decoding(max_new_tokens, temperature, seed)
    from sampo_cli.dialogue import Chat
    from sampo_cli.model import context_length
    from sampo_cli.subject import load_subject
    from sampo_cli.template import PairEncoder, load_tokenizer

    found = _find(subject, adapter, quantization, settings)
    tokenizer = load_tokenizer(found.recipe.model, found.recipe.data)
    policy = load_subject(found)
    context = context_length(policy.causal_lm.config)
    encoder = PairEncoder(tokenizer, found.recipe.data.template_date)
    talk = Chat(policy, encoder, decoding, context, found.adapter is not None, system, found.name)
    if side:
        talk.sides = SIDES[side]
    return talk if prompt is None else talk.ask(prompt)


def _find(
    subject: Place,
    adapter: Place | None,
    quantization: str | None,
    settings: Settings | None,
    data: Sequence[str] = (),
) -> Subject:
    from sampo_cli.subject import find_subject

    name = str(text(subject))
    return find_subject(name, adapter=text(adapter), data=data, quantization=quantization, settings=settings or ())


def _decoding(max_new_tokens: int, temperature: float, seed: int) -> Decoding:
    refuse_below(1, max_new_tokens=max_new_tokens)
    refuse_below(0, temperature=temperature, seed=seed)
    from sampo_cli.generate import Decoding

    return Decoding(max_new_tokens, temperature, seed)
