"""`python -m benchmarks.memory`: the memory that a dry run predicts against what a training step takes.

    python -m benchmarks.memory --model M --data D --max-length 512 1024 --quantization none nf4 --checkpointing all

Every combination of the flags' values is a case. For each, a process of its own loads the policy and trains two steps
on the longest pairs of the data, each a micro-batch of its own; the peak of the second above the loaded model is
compared. On a CPU that is resident memory, in a process whose malloc gives blocks back at once
(MALLOC_MMAP_THRESHOLD_): otherwise what was freed stays resident, and what is measured is malloc's habits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Meter, machine
from benchmarks.pairs import PairList, Silent
from sampo_cli.config import Recipe
from sampo_cli.plan import make_plan, resolve_recipe

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "16384"}

AXES: dict[str, tuple[type, list[Any]]] = {
    "--max-length": (int, [1024]),
    "--quantization": (str, ["nf4"]),
    "--checkpointing": (str, ["all"]),
    "--lora-r": (int, [16]),
    "--offload": (str, ["off"]),
}
"""Flags that take several values, the type of a value, and what they are if not given."""


@dataclass(frozen=True)
class Comparison:
    """Bytes.

    Attributes:
        predicted, measured: of a step above the loaded model.
        libraries: of what is measured, what libraries keep between steps: oneDNN's compiled kernels and scratch.
        parameters_predicted, parameters_loaded: of the policy.
        parts: of the prediction.
    """

    predicted: int
    measured: int
    libraries: int
    parameters_predicted: int
    parameters_loaded: int
    parts: dict[str, int]

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--method", default="sampo")
    parser.add_argument("--pairs", type=int, default=2, help="of a step; each is a micro-batch of its own")
    parser.add_argument("--json", action="store_true")
    for flag, (kind, default) in AXES.items():
        parser.add_argument(flag, type=kind, nargs="+", default=default)
    arguments = parser.parse_args(argv)
    cases = list(run(arguments))
    if arguments.json:
        rows = [setting | asdict(comparison) | {"error": comparison.error} for setting, comparison in cases]
        print(json.dumps({"cases": rows, "machine": machine()}))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(table(cases))
    return 0


Row = tuple[dict[str, Any], Comparison]


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    """Predict and measure every combination of settings."""
    names = [flag.removeprefix("--").replace("-", "_") for flag in AXES]
    for values in itertools.product(*(getattr(arguments, name) for name in names)):
        setting = dict(zip(names, values, strict=True))
        recipe = recipe_of(arguments, setting)
        pairs = longest_pairs(recipe, arguments.pairs)
        found = compare(recipe, pairs)
        print(f"{setting}: {found.predicted:,} predicted, {found.measured:,} measured", file=sys.stderr)
        yield setting | {"longest": max(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)}, found


def compare(recipe: Recipe, pairs: PairList) -> Comparison:
    """A step on `pairs`, predicted and measured, each in a process of its own."""
    predicted, parameters, parts = _alone(predict, recipe, pairs)
    measured, libraries, loaded = _alone(measure, recipe, pairs)
    return Comparison(predicted, measured, libraries, parameters, loaded, parts)


def _alone(function: Any, *arguments: Any) -> Any:
    """The function's result, from a new process."""
    os.environ.update(MALLOC)  # read when a process starts
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def recipe_of(arguments: argparse.Namespace, setting: Mapping[str, Any]) -> Recipe:
    rank = setting["lora_r"]
    return resolve_recipe(
        {
            "model": {"name": arguments.model, "quantization": setting["quantization"], "dtype": arguments.dtype},
            "data": {"sources": [arguments.data], "max_length": setting["max_length"], "eval_fraction": 0.0},
            "lora": {"r": rank, "alpha": 2 * rank},
            "method": {"name": arguments.method},
            "train": {
                "batch_pairs": arguments.pairs,
                "pairs_per_microbatch": 1,
                "checkpointing": setting["checkpointing"],
                "offload_activations": setting["offload"] == "on",
                "optimizer": "adamw",  # paged memory is no allocated memory
            },
        }
    )


def longest_pairs(recipe: Recipe, count: int) -> PairList:
    """The longest pairs of the data."""
    dataset = make_plan(recipe, Silent()).dataset
    lengths = dataset.prompt_tokens + dataset.chosen_tokens + dataset.rejected_tokens
    return PairList(dataset[int(index)] for index in np.argsort(lengths, kind="stable")[-count:])


def predict(recipe: Recipe, pairs: PairList) -> tuple[int, int, dict[str, int]]:
    """Bytes above the loaded model, bytes of parameters, and the parts."""
    from sampo_cli.footprint import ADAPTER, WEIGHTS, Rehearsal
    from sampo_cli.forecast import forecast
    from sampo_cli.model import load_config
    from sampo_cli.remote import fetch_model
    from sampo_cli.target import CPU_LIBRARIES, ON_CPU, this_device

    device = this_device()
    architecture = load_config(recipe.model, fetch_model(recipe.model.name, recipe.model.revision))
    rehearsal = Rehearsal(recipe, architecture, device)
    parts = dict(forecast(rehearsal, pairs, device).footprint.parts)
    above = sum(size for part, size in parts.items() if part not in (WEIGHTS, ADAPTER))
    libraries = CPU_LIBRARIES if device.kind == ON_CPU else 0
    return above + libraries, rehearsal.parameter_bytes, parts


def measure(recipe: Recipe, pairs: PairList) -> tuple[int, int, int]:
    """The peak of the second of two equal steps above the loaded model, what is left of it between steps beside the
    optimizer's state, and bytes of parameters.
    """
    from transformers.utils.logging import disable_progress_bar

    from sampo_cli.method_table import METHODS
    from sampo_cli.model import load_policy
    from sampo_cli.trainer import Split, Trainer

    disable_progress_bar()
    train = recipe.train
    policy, facts = load_policy(
        recipe.model, recipe.lora, seed=0, checkpointing=train.checkpointing, offload=train.offload_activations
    )
    indices = list(range(len(pairs)))
    with tempfile.TemporaryDirectory() as folder:
        split = Split(pairs, indices, [])
        trainer = Trainer(policy, split, recipe, METHODS[recipe.method.name], Path(folder), Silent())
        meter = Meter(policy.causal_lm.device)
        loaded = meter.settled_bytes(policy.parameters())
        trainer.train_step(indices, epoch=0)
        settled = meter.settled_bytes(policy.parameters())
        state = sum(
            value.nbytes
            for values in trainer.optimizer.state.values()
            for value in values.values()
            if hasattr(value, "nbytes")
        )
        meter.start()
        trainer.train_step(indices, epoch=0)
        return meter.stop().peak_bytes - loaded, settled - loaded - state, facts.parameter_bytes


def table(rows: Sequence[Row]) -> Table:
    shown = Table(title="a step above the loaded model, MiB", title_justify="left")
    for heading in ("max length", "base", "checkpointing", "r", "offload", "longest pair"):
        shown.add_column(heading)
    for heading in ("predicted", "measured", "error", "libraries", "parameters predicted", "loaded"):
        shown.add_column(heading, justify="right")
    for setting, found in rows:
        sizes = (found.predicted, found.measured, found.libraries, found.parameters_predicted, found.parameters_loaded)
        cells = [f"{size / 2**20:,.1f}" for size in sizes]
        shown.add_row(*map(str, setting.values()), *cells[:2], f"{found.error:+.1%}", *cells[2:])
    return shown


if __name__ == "__main__":
    sys.exit(main())
