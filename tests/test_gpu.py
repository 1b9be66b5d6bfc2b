"""What only a CUDA device can show. Run with: make test PYTEST_FLAGS='-m gpu'"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sampo_cli.batch import Draw, collate
from sampo_cli.config import LoraSection, ModelConfig
from sampo_cli.model import load_policy
from sampo_cli.policy import reference
from tests import tiny
from tests.test_cli import succeeds, train_flags
from tests.test_layout import ATTENTION, make_pairs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ATTENTION)
def test_a_fresh_adapter_is_its_reference_exactly(name: str, dtype: str, tmp_path: Path) -> None:
    folder = tiny.save_model(tiny.CONFIGS[name](), tmp_path / name)
    policy, facts = load_policy(ModelConfig(name=str(folder), dtype=dtype), LoraSection(), seed=0)
    assert facts.device.startswith("cuda")
    assert facts.layout == "shared"
    batch = collate(make_pairs(), Draw("sum", 0, 0)).to(facts.device)
    with reference(policy):
        before = policy(batch)
    assert torch.equal(policy(batch), before)


def test_a_run_with_the_paged_optimizer_and_its_resume(tiny_llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeeds(*train_flags(tiny_llama, pairs_file, run, "--save-every", 1))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    succeeds("train", "--resume", run / "checkpoints" / "step-000002")
    again = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in again] == [row["step"] for row in rows]
    succeeds("merge", run)
