"""Does what is preferred change the length of answers, and does the method matter? docs/experiments/length.md.

    python -m scripts.length_experiment --model SmolLM2-135M-Instruct --train ultrafeedback_train_1000.jsonl \
        --held-out ultrafeedback_eval_200.jsonl

For each seed, each part of the pairs (chosen longer, chosen shorter, whole) and each method: `sampo train`, then
`sampo eval` on held-out pairs and answers to held-out prompts. May be stopped at any time; the same command goes on.
Seeds are the outer loop, so that after each one there is a whole table. What the numbers say is `length_page.py`'s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sampo_cli import metrics
from sampo_cli.checkpoint import all_checkpoints
from sampo_cli.disk import write_text

if TYPE_CHECKING:
    from sampo_cli.dataset import PairDataset

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "experiments" / "length.jsonl"

EARLY = "dpo-8"
"""DPO that stops after eight steps: where all fifteen take it three times as far from the base as SamPO goes."""

METHODS = {
    "dpo": ["--method", "dpo"],
    "sampo": ["--method", "sampo"],
    "expected": ["--method", "sampo", "--set", "method.reduction=expected"],
    "simpo": ["--method", "simpo"],
    EARLY: ["--method", "dpo", "--max-steps", "8"],
}
PARTS = ("longer", "shorter", "whole")
EARLY_PART = "shorter"
SEEDS = (0, 1, 2)
BASE = "base"


@dataclass(frozen=True)
class Setting:
    """What is the same for all runs; lengths in tokens.

    Attributes:
        longest: of prompt, chosen and rejected response together: longer pairs are left out.
    """

    pairs: int = 120
    batch_pairs: int = 8
    learning_rate: float = 5e-4
    longest: int = 400
    longest_held_out: int = 500
    prompts: int = 64
    max_new_tokens: int = 1024
    temperature: float = 0.7


SETTING = Setting()


@dataclass(frozen=True)
class Cell:
    """One run."""

    seed: int
    part: str
    method: str

    @property
    def name(self) -> str:
        return f"{self.part}-{self.method}-{self.seed}"


def all_cells() -> list[Cell]:
    cells = [Cell(seed, part, method) for seed in SEEDS for part in PARTS for method in METHODS]
    return [cell for cell in cells if cell.method != EARLY or cell.part == EARLY_PART]


def tokenized(model: str, path: Path) -> PairDataset:
    from sampo_cli.config import DataConfig, ModelConfig
    from sampo_cli.dataset import prepare
    from sampo_cli.template import load_tokenizer

    data = DataConfig(sources=[str(path)])
    return prepare(data, load_tokenizer(ModelConfig(name=model), data))


def write_pairs(model: str, train: Path, held_out: Path, folder: Path) -> None:
    """The parts of each seed and the held-out pairs, as rows of the files that they come from."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset = tokenized(model, train)
    fitting = [pair for pair in dataset if _size(pair) <= SETTING.longest]
    parts = {
        "longer": [pair.pair_id for pair in fitting if len(pair.chosen) > len(pair.rejected)],
        "shorter": [pair.pair_id for pair in fitting if len(pair.chosen) < len(pair.rejected)],
        "whole": [pair.pair_id for pair in fitting],
    }
    for seed in SEEDS:
        for part, ids in parts.items():
            drawn = np.random.default_rng((seed, PARTS.index(part))).choice(ids, SETTING.pairs, replace=False)
            _copy_rows(train, sorted(drawn.tolist()), folder / f"{part}-{seed}.jsonl")
    kept = [pair.pair_id for pair in tokenized(model, held_out) if _size(pair) <= SETTING.longest_held_out]
    _copy_rows(held_out, kept, folder / "held-out.jsonl")


def _size(pair: Any) -> int:
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def _copy_rows(source: Path, numbers: Sequence[int], target: Path) -> None:
    lines = source.read_text(encoding="utf-8").split("\n")
    write_text(target, "".join(f"{lines[number]}\n" for number in numbers))


def sampo(*arguments: str) -> None:
    """A command of sampo, on one thread: that is the least CPU time a run takes."""
    command = [sys.executable, "-m", "sampo_cli", *arguments, "--quiet"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def train(model: str, cell: Cell, data: Path, run: Path) -> None:
    if (run / "adapter").is_dir():
        return
    if all_checkpoints(run):
        sampo("train", "--resume", str(run))
        return
    said = ["--model", model, "--data", str(data), *METHODS[cell.method], "--seed", str(cell.seed)]
    said += ["--quantization", "none", "--batch-pairs", str(SETTING.batch_pairs), "--epochs", "1"]
    said += ["--learning-rate", str(SETTING.learning_rate), "--eval-fraction", "0", "--save-every", "4"]
    said += ["--set", "train.checkpointing=none", "--set", "train.tokens_per_microbatch=1024"]
    sampo("train", *said, "--output", str(run))


def measure(subject_name: str, held_out: Path, folder: Path) -> dict[str, Any]:
    """`sampo eval`'s numbers of an adapter on held-out pairs, and answers to their prompts; texts go to a file."""
    from sampo_cli.eval_subject import Wanted, evaluate
    from sampo_cli.generate import Decoding, complete
    from sampo_cli.subject import find_subject, load_subject
    from sampo_cli.template import load_tokenizer

    subject = find_subject(subject_name, data=[str(held_out)], quantization="none")
    found: dict[str, Any] = {}
    if subject.adapter:
        done = evaluate(subject, Wanted(), str(folder / "eval"), lambda text: None)
        found["pairs"] = done.to_dict()["pairs"]
    policy = load_subject(subject)
    if subject.adapter:
        policy.model.merge_adapter()  # into 16 bits, as sampo merge does
    pairs = tokenized(subject.recipe.model.name, held_out)
    prompts = list({tuple(pair.prompt.tolist()): pair.prompt for pair in pairs}.values())[: SETTING.prompts]
    tokenizer = load_tokenizer(subject.recipe.model, subject.recipe.data)
    decoding = Decoding(SETTING.max_new_tokens, SETTING.temperature, seed=0)
    answers = complete(policy, tokenizer, prompts, decoding, batch=SETTING.prompts)
    write_text(folder / "answers.json", json.dumps([asdict(one) for one in answers], indent=1, ensure_ascii=False))
    found["answers"] = {
        "tokens": [one.tokens for one in answers],
        "ended": [one.ended for one in answers],
        "repetition": [round(one.repetition, 4) for one in answers],
    }
    return found


def trained_facts(run: Path) -> dict[str, Any]:
    """What the run itself says: steps, pairs, and means over its last four steps."""
    rows = [row for row in metrics.read(run / "metrics.jsonl") if row["kind"] == "train"]
    means = {f"train_{key}": float(np.mean([row[key] for row in rows[-4:]])) for key in ("margin", "accuracy", "loss")}
    return {"step": rows[-1]["step"], "train_pairs": sum(row["pairs"] for row in rows), **means}


def finish_cell(model: str, cell: Cell | None, folder: Path) -> None:
    """One run with its measurements (or those of the base), as a line of the results; in a process of its own."""
    started = time.process_time()
    run = folder / (cell.name if cell else BASE)
    run.mkdir(parents=True, exist_ok=True)
    row: dict[str, Any] = asdict(cell) if cell else {"method": BASE, "step": 0}
    if cell:
        train(model, cell, folder / "data" / f"{cell.part}-{cell.seed}.jsonl", run / "run")
        row |= trained_facts(run / "run")
    row |= measure(str(run / "run") if cell else model, folder / "data" / "held-out.jsonl", run)
    row["cpu_seconds"] = round(time.process_time() - started + _children_seconds())
    metrics.append(RESULTS, row)


def _children_seconds() -> float:
    import resource

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def pending() -> list[Cell | None]:
    """The base, then the cells, without those that have their line."""
    known = {(row.get("seed"), row.get("part"), row["method"]) for row in metrics.read(RESULTS)}
    todo: list[Cell | None] = [] if (None, None, BASE) in known else [None]
    return todo + [cell for cell in all_cells() if (cell.seed, cell.part, cell.method) not in known]


def run_cell(arguments: Sequence[str], cell: Cell | None) -> None:
    of_cell = ["--cell", f"{cell.seed},{cell.part},{cell.method}" if cell else BASE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "scripts.length_experiment", *arguments, *of_cell]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    print(f"done: {cell.name if cell else BASE}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder or a name on the Hub")
    parser.add_argument("--train", type=Path, required=True, help="the pairs to train on, a .jsonl file")
    parser.add_argument("--held-out", type=Path, required=True, help="the pairs to measure on, a .jsonl file")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "length", help="of the runs")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.cell:
        seed, _, rest = given.cell.partition(",")
        finish_cell(given.model, None if given.cell == BASE else Cell(int(seed), *rest.split(",")), given.folder)
        return
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    write_pairs(given.model, given.train, given.held_out, given.folder / "data")
    passed_on = ["--model", given.model, "--train", str(given.train), "--held-out", str(given.held_out)]
    passed_on += ["--folder", str(given.folder)]
    with ThreadPoolExecutor(given.workers) as pool:
        for _ in pool.map(lambda cell: run_cell(passed_on, cell), pending()):
            pass


if __name__ == "__main__":
    main()
