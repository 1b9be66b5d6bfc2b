"""A long run takes no more at its end than at its beginning: memory, open files, threads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig

from sampo_cli import metrics
from tests import tiny
from tests.reliability import record
from tests.warm import Warm

GROWTH = 1.02


def observed(warm: Warm, home: Path, steps: int, save_every: int) -> np.ndarray:
    """(open files, threads, resident bytes) after each step, int64 [steps, 3], of a model of one small layer."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    model = tiny.save_model(LlamaConfig(**tiny.SIZES | sizes), home / "model")
    data = tiny.write_pairs(home / "pairs.jsonl", 40)
    flags = ("--batch-pairs", 2, "--max-steps", steps, "--save-every", save_every, "--eval-fraction", 0.1)
    outcome = warm.run(
        *("train", "--model", model, "--data", data, *flags, "--quantization", "none", "--lora-r", 2),
        *("--set", "model.dtype=float32", "--set", "train.checkpointing=none"),
        *("--output", home / "run", "--quiet"),
        watch=[home / "run" / "metrics.jsonl"],
        event="open",
        observe=str(home / "observed"),
    )
    assert outcome.code == 0, outcome.stderr
    rows = metrics.read(home / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, steps + 1))
    return np.loadtxt(home / "observed", np.int64)


def assert_constant(table: np.ndarray, after: int) -> str:
    """Nothing grows after so many observations; says how much there was of it."""
    files, threads, memory = table[after:].T
    assert files.max() <= table[:after, 0].max()
    assert threads.max() <= table[:after, 1].max()
    assert memory.max() < GROWTH * memory[0], f"{memory[0]:,} bytes became {memory.max():,}"
    growth = memory.max() / memory[0] - 1
    return f"{growth:+.2%} of {memory[0] / 1e6:,.0f} MB, {files[-1]} open files, {threads[-1]} threads"


def test_three_hundred_steps(warm: Warm, tmp_path: Path) -> None:
    assert_constant(observed(warm, tmp_path, steps=300, save_every=20), after=150)


@pytest.mark.long
def test_ten_thousand_steps(warm: Warm, tmp_path: Path) -> None:
    constant = assert_constant(observed(warm, tmp_path, steps=10_000, save_every=100), after=500)
    record(f"after 500 steps {constant}")
