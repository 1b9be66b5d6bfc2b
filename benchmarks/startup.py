"""How long a run takes until its first step, and in how much memory, by the number of its pairs.

A file of random rows is tokenized once, in one process; then another one trains on it for a few steps, as
`sampo train` does the second time. Nothing is evaluated, so that nothing but the start grows with the pairs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Meter
from benchmarks.pairs import Silent
from sampo_cli.config import Recipe
from sampo_cli.plan import make_plan, resolve_recipe

MEBIBYTE = 2**20
STEPS = 4
WORDS = ("red", "green", "blue", "one", "two", "cats", "dogs", "sleep")


def write_rows(path: Path, count: int, seed: int = 0) -> None:
    """Rows of prompt, chosen and rejected, of a few words each."""
    rng = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            words = [WORDS[index] for index in rng.integers(0, len(WORDS), 20)]
            cuts = rng.integers(1, 6, 2)
            row = {
                "prompt": f"{number}: {' '.join(words[:8])}",
                "chosen": f"yes {' '.join(words[8 : 8 + cuts[0]])}",
                "rejected": f"no {' '.join(words[14 : 14 + cuts[1]])}",
            }
            file.write(json.dumps(row) + "\n")


def start_up(count: int, model: Path, folder: Path) -> dict[str, Any]:
    """One row of the table: `count` pairs, each stage in a process of its own.

    Returns:
        Seconds of `tokenize`, `plan` (again, from the cache), `start` (until the first step begins: plan, loading and
        all), `first_step` (with the search for the budget) and `step` (the median of those after it); and MiB that
        planning and the whole run take above a process that has only imported sampo.
    """
    source = folder / f"rows-{count}.jsonl"
    write_rows(source, count)
    cache = str(folder / "cache")
    tokenized = _in_a_new_process(_tokenize, recipe_for(source, model), cache)
    planned = _in_a_new_process(_plan, recipe_for(source, model), cache)
    trained = _in_a_new_process(_train, recipe_for(source, model), cache, folder / f"run-{count}")
    source.unlink()
    return {"pairs": count} | tokenized | planned | trained


def recipe_for(source: Path, model: Path) -> Recipe:
    return resolve_recipe(
        {
            "model": {"name": str(model), "quantization": "none", "dtype": "float32"},
            "data": {"sources": [str(source)], "eval_fraction": 0.0},
            "train": {"max_steps": STEPS, "tokens_per_microbatch": 2048},
        }
    )


def _in_a_new_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _tokenize(recipe: Recipe, cache: str) -> dict[str, Any]:
    os.environ["SAMPO_CACHE"] = cache
    began = time.perf_counter()
    make_plan(recipe, Silent())
    return {"tokenize": time.perf_counter() - began}


def _plan(recipe: Recipe, cache: str) -> dict[str, Any]:
    os.environ["SAMPO_CACHE"] = cache
    meter = Meter(torch.device("cpu"))
    before = meter.settled_bytes([])
    meter.start()
    the_plan = make_plan(recipe, Silent())
    readings = meter.stop()
    assert the_plan.dataset.cached, "planning must find what was tokenized"
    return {"plan": readings.seconds, "plan_mib": (readings.peak_bytes - before) / MEBIBYTE}


class Watch(Silent):
    """A view that keeps the times at which a run began and at which each of its steps was over."""

    def __init__(self) -> None:
        self.began = 0.0
        self.steps: list[float] = []

    def begin(self, folder: Path, steps: int, done: int) -> None:
        self.began = time.perf_counter()

    def train_row(self, row: Mapping[str, Any]) -> None:
        self.steps.append(time.perf_counter())


def _train(recipe: Recipe, cache: str, folder: Path) -> dict[str, Any]:
    from sampo_cli.run import train

    os.environ["SAMPO_CACHE"] = cache
    meter, view = Meter(torch.device("cpu")), Watch()
    before = meter.settled_bytes([])
    meter.start()
    began = time.perf_counter()
    train(recipe, view, folder)
    readings = meter.stop()
    return {
        "start": view.began - began,
        "first_step": view.steps[0] - view.began,
        "step": float(np.median(np.diff(view.steps))),
        "run_mib": (readings.peak_bytes - before) / MEBIBYTE,
    }
