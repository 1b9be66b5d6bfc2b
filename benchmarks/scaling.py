"""`python -m benchmarks.scaling`: what a step takes with N processes, predicted from one and checked with two.

    python -m benchmarks.scaling --model MODEL --data pairs.jsonl --pairs-per-step 16 --steps 4

One process takes the steps, which gives seconds a position, laying out and the optimizer included. Two processes add up
an adapter's gradients again and again, which gives what that takes. From these, and from how evenly the real steps can
be split, follows a step of N processes. Then two processes take the same steps, and the busier one of each step is
compared with what was predicted for it.

On a CPU, seconds are the CPU's own: they do not count who else computes there, nor who waits. On GPUs, which must be at
least two, they are the wall's.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.measure import machine
from benchmarks.pairs import Silent
from benchmarks.table import machine_lines, wide_console

REPEATS = 20
"""Times that gradients are added up, to measure it."""


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """This process's part: seconds and positions of each step, seconds to add gradients up, bytes of memory."""
    import torch

    from sampo_cli import ranks
    from sampo_cli.method_table import METHODS
    from sampo_cli.model import load_policy
    from sampo_cli.optim import memory_bytes
    from sampo_cli.plan import make_plan, resolve_recipe
    from sampo_cli.trainer import Split, Trainer

    train = {
        "batch_pairs": arguments.pairs_per_step,
        "tokens_per_microbatch": arguments.tokens,
        "cache_reference": "off",
    }
    model = {"name": arguments.model, "quantization": arguments.quantization, "dtype": arguments.dtype}
    tree = {"model": model, "data": {"sources": [arguments.data], "eval_fraction": 0.0}, "train": train}
    recipe = resolve_recipe(tree)
    plan = make_plan(recipe, Silent())
    policy, facts = load_policy(recipe.model, recipe.lora, seed=recipe.train.seed)
    split = Split(plan.dataset, plan.train, [])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(policy, split, recipe, METHODS[recipe.method.name], Path(folder), Silent())
        cuda = trainer.accelerator.device.type == "cuda"

        def now() -> float:
            torch.cuda.synchronize() if cuda else None
            return time.perf_counter() if cuda else time.process_time()

        seconds, positions = [], []
        for step in range(arguments.steps + 1):
            indices, epoch = trainer.schedule.pairs(step, 0)
            batches = [batch for batch in trainer.feed.batches(indices, epoch) if batch is not None]
            ranks.wait()
            started = now()
            trainer.train_step(indices, epoch)
            seconds.append(now() - started)
            positions.append(sum(policy.computed_positions(batch) for batch in batches))
        for parameter in trainer.parameters:
            parameter.grad = torch.zeros_like(parameter)
        started = now()
        for _ in range(REPEATS):
            ranks.add_gradients(trainer.parameters)
        adding = (now() - started) / REPEATS
    found = {"seconds": seconds[1:], "positions": positions[1:], "adding": adding}  # the first step warms up
    memory = memory_bytes(trainer.accelerator.device)
    sizes = {
        "memory": memory,
        "adapter_bytes": 4 * facts.trainable_parameters,
        "dtype": facts.dtype,
        "layout": facts.layout,
    }
    return {**found, **sizes, "device": facts.device}


def run_processes(count: int, words: Sequence[str]) -> list[dict[str, Any]]:
    """What `measure` finds in each of `count` processes, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        several = {**rendezvous, **{name: str(value) for name, value in place.items()}} if count > 1 else {}
        command = [sys.executable, "-m", "benchmarks.scaling", "--worker", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **several}
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a process has failed; what it said is above")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def loads(arguments: argparse.Namespace, count: int, layout: Any) -> np.ndarray:
    """Positions of the busiest process in each timed step, [steps], as `feed.py` splits and cuts them."""
    from sampo_cli.batch import Pair, micro_batches, shares
    from sampo_cli.plan import make_plan, resolve_recipe
    from sampo_cli.rounds import Schedule

    sections = {"model": {"name": arguments.model}, "train": {"batch_pairs": arguments.pairs_per_step}}
    recipe = resolve_recipe({**sections, "data": {"sources": [arguments.data], "eval_fraction": 0.0}})
    plan = make_plan(recipe, Silent())
    schedule = Schedule(plan.train, recipe)

    def computed(group: list[Pair]) -> int:
        rows = [length for pair in group for length in pair.row_lengths(layout)]
        return len(rows) * max(rows)

    most = []
    for step in range(1, arguments.steps + 1):
        parts = shares([plan.dataset[index] for index in schedule.pairs(step, 0)[0]], count, layout)
        plans = [micro_batches(part, arguments.tokens, layout) for part in parts]
        most.append(max(sum(map(computed, plan)) for plan in plans))
    return np.array(most)


def predict(pace: float, adding: float, positions: np.ndarray, count: int) -> float:
    """Seconds of the timed steps: of the busiest process in each, and of a ring that adds gradients up.

    It sends each of them 2 (N - 1) / N times; `adding` is what that took with two.
    """
    transfer = 0.0 if count == 1 else adding * 2 * (count - 1) / count
    return float((pace * positions + transfer).sum())


def report(arguments: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    (one,), two = run_processes(1, words), run_processes(2, words)
    layout = one["layout"]
    pace = sum(one["seconds"]) / sum(one["positions"])
    adding = max(each["adding"] for each in two)
    measured = float(np.max([each["seconds"] for each in two], axis=0).sum())
    alone = predict(pace, adding, loads(arguments, 1, layout), 1)
    rows = []
    for count in arguments.processes:
        positions = loads(arguments, count, layout)
        seconds = predict(pace, adding, positions, count)
        busy = float(loads(arguments, 1, layout).sum() / (count * positions.sum()))
        rows.append({"processes": count, "seconds": seconds, "speed-up": alone / seconds, "busy": busy})
    predicted = predict(pace, adding, loads(arguments, 2, layout), 2)
    check = {"predicted": predicted, "measured": measured, "one measured": sum(one["seconds"])}
    memory = {"one": one["memory"], "each of two": max(each["memory"] for each in two)}
    costs = {"milliseconds a position": 1e3 * pace, "milliseconds to add gradients up": 1e3 * adding}
    facts = {key: one[key] for key in ("adapter_bytes", "dtype", "device", "layout")}
    facts["command"] = shlex.join(["python", "-m", "benchmarks.scaling", *words])
    return {"costs": costs, "rows": rows, "check": check, "memory": memory, **facts, "machine": machine()}


def show(found: dict[str, Any], steps: int) -> None:
    console = wide_console()
    table = Table("processes", "seconds a step, predicted", "times as fast", "busy", box=None)
    for row in found["rows"]:
        cells = f"{row['processes']}", f"{row['seconds'] / steps:.2f}", f"{row['speed-up']:.2f}", f"{row['busy']:.0%}"
        table.add_row(*cells)
    console.print(table)
    check, memory = found["check"], found["memory"]
    console.print(", ".join(f"{name} {value:.3g}" for name, value in found["costs"].items()))
    console.print(
        f"two processes: {check['measured'] / steps:.2f} s a step measured, {check['predicted'] / steps:.2f} predicted "
        f"({check['predicted'] / check['measured'] - 1:+.1%}); one: {check['one measured'] / steps:.2f} measured"
    )
    console.print(f"memory: {memory['one'] / 2**20:,.0f} MiB alone, {memory['each of two'] / 2**20:,.0f} each of two")
    for line in machine_lines(found):
        console.print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--pairs-per-step", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="timed; one more goes before them")
    parser.add_argument("--tokens", type=int, default=2048, help="positions of a micro-batch")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--json", type=Path, help="write everything there as well")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        from sampo_cli.joining import joined

        with joined():
            found = measure(arguments)
        print(json.dumps(found))
        return
    found = report(arguments, sys.argv[1:])
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    show(found, arguments.steps)


if __name__ == "__main__":
    main()
