"""`python -m benchmarks.step`: a training step of sampo against one of trl's DPOTrainer, in one run.

    python -m benchmarks.step --opponent trl --model M --data D --pairs-per-step 16 --steps 4

Same pairs, same steps, same adapter, same limit of pairs in a forward pass. Stops with exit code 1 if the two do not
compute the same loss. The table goes to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.compare import Disagreement, agreement, figures, ratios
from benchmarks.duel import OPPONENT, Contender, ContenderError, run_duel, say_on_stderr
from benchmarks.measure import machine
from benchmarks.models import RANDOM_MODELS, random_model
from benchmarks.settings import Settings, add_arguments, recipe_of, settings_of, variants_of
from benchmarks.table import show
from sampo_cli.errors import SampoError, UsageError
from sampo_cli.method_table import METHODS
from sampo_cli.remote import fetch_model


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 if losses disagree or a contender failed, 2 for flags or inputs that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    command = shlex.join(["python", "-m", "benchmarks.step", *(sys.argv[1:] if argv is None else argv)])
    try:
        report = benchmark(arguments, command)
    except (Disagreement, ContenderError) as error:
        say_on_stderr(f"error: {error}")
        return 1
    except SampoError as error:
        say_on_stderr(f"error: {error}" + (f"\n  {error.hint}" if error.hint else ""))
        return 2
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        show(report)
    return 0


def benchmark(arguments: argparse.Namespace, command: str) -> dict[str, Any]:
    """Run what the flags ask for and return the report, as plain data.

    Raises:
        Disagreement, ContenderError, SampoError: see `compare.agreement` and `duel.run_duel`.
    """
    choose_device(arguments.device)
    variants = variants_of(arguments)
    folder = random_model(arguments.model) if arguments.model in RANDOM_MODELS else fetch_model(arguments.model, None)
    settings = settings_of(arguments, Path(folder).resolve())
    for variant in variants:
        recipe_of(settings, variant)  # what is wrong with a variant is said before anything is loaded
    # trl has no SimPO that takes token ids, so nothing is compared where that is all there is of ours.
    opponent = arguments.opponent if any(METHODS[variant.method].needs_reference for variant in variants) else "none"
    contenders = run_duel(settings, variants, opponent, say_on_stderr)
    return {
        "command": command,
        "settings": asdict(settings),
        "opponent": opponent if opponent == OPPONENT else None,
        "contenders": summaries(contenders, settings),
        "machine": machine(),
    }


def choose_device(name: str | None) -> None:
    """Hide the GPU from everybody if the CPU is asked for.

    Raises:
        UsageError: a GPU is asked for and there is none.
    """
    import torch

    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is no CUDA device")


def summaries(contenders: Sequence[Contender], settings: Settings) -> list[dict[str, Any]]:
    """Each contender's figures, its ratios to trl and to the first of ours, how well losses agree, and every step.

    Raises:
        Disagreement: see `compare.agreement`.
    """
    found = [
        {"name": contender.name, "method": contender.method, **figures(contender.facts, contender.rows)}
        for contender in contenders
    ]
    couples = list(zip(contenders, found, strict=True))
    rival = next((couple for couple in couples if couple[0].name == OPPONENT), None)
    first = next(couple for couple in couples if couple is not rival)
    for contender, summary in couples:
        summary |= {"ratio": None, "ratio_to_first": None, "agreement": None}
        if rival and contender is not rival[0]:
            summary["ratio"] = ratios(summary, contender.rows, rival[1], rival[0].rows)
            summary["agreement"] = compared_losses(contender, rival[0])
        if contender is not first[0]:
            summary["ratio_to_first"] = ratios(summary, contender.rows, first[1], first[0].rows)
        summary |= {"facts": contender.facts, "steps": contender.rows}
    return found


def compared_losses(contender: Contender, rival: Contender) -> dict[str, Any] | None:
    """How well a contender of ours agrees with trl; None for a method without a reference, which never starts at ln 2.

    Raises:
        Disagreement: see `compare.agreement`.
    """
    if not METHODS[contender.method].needs_reference:
        return None
    same, facts = contender.method == "dpo", contender.facts
    cached = facts["cached"] or rival.facts["cached"]
    difference = agreement(
        contender.rows, rival.rows, same_loss=same, dtype=facts["dtype"], beta=facts["beta"], cached=cached
    )
    return difference | {"expected": "the same loss" if same else f"{contender.method} is another loss than trl's dpo"}


if __name__ == "__main__":
    sys.exit(main())
