"""The command that trains for each combination of values: `sampo sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sampo_cli import api_sweep, completion, console
from sampo_cli.errors import SampoError
from sampo_cli.options import DATA, MODEL, RUN, TRAINING, Debug, Json, Quiet, asked_for, option


def sweep(
    recipe: Annotated[
        Optional[str],
        typer.Argument(
            metavar="RECIPE",
            help="What the runs share: a shipped recipe or a YAML file.",
            autocompletion=completion.recipes,
        ),
    ] = None,
    settings: Annotated[
        Optional[list[str]],
        option(
            "--set",
            "A recipe's key with the values to try, or with one for all runs; repeatable.",
            RUN,
            "SECTION.KEY=VALUE,...",
            completion.settings,
        ),
    ] = None,
    model: Annotated[Optional[str], option("--model", "Base model: a Hub name or a folder.", MODEL)] = None,
    data: Annotated[Optional[list[str]], option("--data", "Pairs: Hub name, file, folder; repeatable.", DATA)] = None,
    method: Annotated[
        Optional[str],
        option("--method", "One of `sampo methods`.", TRAINING, offers=completion.words(*completion.METHODS)),
    ] = None,
    output: Annotated[Optional[Path], option("--output", "The sweep's folder, with one for each run.", RUN)] = None,
    print_commands: Annotated[
        bool, option("--print-commands", "Start nothing; print what is to be run, a line each.", RUN)
    ] = False,
    retry_failed: Annotated[bool, option("--retry-failed", "Run again what failed.", RUN)] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train once for each combination of values, in turn, and compare.

    sampo sweep quickstart --model HuggingFaceTB/SmolLM2-135M-Instruct --set method.beta=0.05,0.1,0.3
    """
    result = api_sweep.sweep(**asked_for(locals()))
    if as_json:
        console.print_json(result.to_dict())
    elif print_commands:
        console.print_raw("".join(f"{line}\n" for line in result.commands))
        if not result.commands:
            console.say("nothing is left to be run")
    elif not quiet:
        from sampo_cli.tables_report import print_sweep

        print_sweep(result.to_dict())
    if result.unfinished and not print_commands:
        states = ", ".join(f"{name} ({state})" for name, state in result.unfinished.items())
        hint = "--retry-failed runs again what failed, and the same command goes on with the others"
        raise SampoError(f"{len(result.unfinished)} of {len(result.runs)} runs are not finished: {states}", hint=hint)
