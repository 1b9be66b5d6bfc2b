"""The command that measures what came of a run: `sampo eval`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from sampo_cli import api_models, completion, console
from sampo_cli.options import (
    DATA,
    RUN,
    Debug,
    Json,
    Quiet,
    Set,
    SubjectAdapter,
    SubjectName,
    SubjectQuantization,
    asked_for,
    option,
)

ANSWERS, BENCHMARKS = "Answers", "Benchmarks"


def evaluate(
    subject: SubjectName,
    adapter: SubjectAdapter = None,
    quantization: SubjectQuantization = None,
    data: Annotated[
        Optional[list[str]], option("--data", "Pairs, instead of the run's held-out ones; repeatable.", DATA)
    ] = None,
    limit: Annotated[
        Optional[int], typer.Option("--limit", min=1, help="Most pairs, examples of a task.", rich_help_panel=DATA)
    ] = None,
    generate: Annotated[
        int, typer.Option("--generate", min=0, help="Prompts of the pairs to answer.", rich_help_panel=ANSWERS)
    ] = 0,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Of an answer.", rich_help_panel=ANSWERS)
    ] = 1024,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 is greedy.", rich_help_panel=ANSWERS)
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of sampled answers.", rich_help_panel=ANSWERS)] = 0,
    judge: Annotated[
        Optional[str], option("--judge", "An annotator of alpaca_eval: win rates against the base.", ANSWERS, "CONFIG")
    ] = None,
    suite: Annotated[
        Optional[str],
        option(
            "--suite",
            "sampo-paper, open-llm-leaderboard or tasks of lm-eval.",
            BENCHMARKS,
            "NAME|TASK,TASK",
            completion.words("sampo-paper", "open-llm-leaderboard"),
        ),
    ] = None,
    output: Annotated[Optional[str], option("--output", "Of the results; default: RUN/eval.", RUN, "DIR")] = None,
    settings: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a run or a model: pairs against the base, length bias, answers, benchmarks."""
    done = api_models.evaluate(**asked_for(locals()))
    if as_json:
        console.print_json(done.to_dict())
    elif not quiet:
        from sampo_cli.tables_eval import print_evaluation

        print_evaluation(done)
