"""What only a CUDA device can show. Run with: make test PYTEST_FLAGS='-m gpu'"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from sampo_cli.batch import Draw, Pair, PairBatch, collate
from sampo_cli.config import LoraSection, ModelConfig
from sampo_cli.logprobs import Head, chunk_rows, token_logps
from sampo_cli.model import load_policy
from sampo_cli.policy import Policy, reference
from sampo_cli.scores import by_response
from tests import tiny
from tests.test_attention import FLEXIBLE, traced
from tests.test_cli import succeeds, train_flags
from tests.test_layout import ATTENTION, make_pairs
from tests.test_logprobs import plain
from tests.test_lora_linear import peft_again

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOLERANCES = {"float32": (2e-5, 2e-3), "bfloat16": (0.3, 0.1)}
"""Nats of one token, and share of a gradient's norm, by which two ways to compute the same may differ."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """torch compiles a function for a handful of models only, and each test brings another."""
    torch._dynamo.reset()


def random_batch(lengths: list[tuple[int, int, int]]) -> PairBatch:
    generator = np.random.default_rng(0)
    pairs = [Pair(i, *(generator.integers(3, 300, n, dtype=np.int32) for n in row)) for i, row in enumerate(lengths)]
    return collate(pairs, Draw("sum", 0, 0)).to("cuda")


def outcome(policy: Policy, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and the gradient of all adapter weights, of an adapter that is not zero."""
    generator = torch.Generator("cuda").manual_seed(1)
    trained = [(name, weight) for name, weight in policy.named_parameters() if weight.requires_grad]
    for name, weight in trained:
        weight.grad = None
        if "lora_B" in name:
            weight.data.normal_(0, 0.05, generator=generator)
    logps = policy(batch)
    (logps * torch.linspace(-1, 1, len(logps), device="cuda")).sum().backward()
    return logps.detach(), torch.cat([weight.grad.flatten() for _, weight in trained])


def load(folder: Path, checkpointing: str = "all", offload: bool = False, **model: object) -> tuple:
    config = ModelConfig(name=str(folder), **model)
    return load_policy(config, LoraSection(r=4), seed=0, checkpointing=checkpointing, offload=offload)


def assert_alike(one: tuple, other: tuple, dtype: str) -> None:
    nats, share = TOLERANCES[dtype]
    torch.testing.assert_close(one[0], other[0], atol=nats, rtol=0)
    assert (one[1] - other[1]).norm() < share * other[1].norm()


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("name", FLEXIBLE)
def test_flex_gives_log_probs_and_gradients_of_sdpa(name: str, dtype: str, tmp_path: Path) -> None:
    folder = tiny.save_model(tiny.CONFIGS[name](), tmp_path / name)
    batch = random_batch([(120, 50, 140), (200, 170, 30), (3, 9, 9)])
    settings = {"quantization": "none", "dtype": dtype, "kernels": "none"}
    flex, facts = load(folder, attention="flex", **settings)
    assert facts.attention == "flex"
    assert flex.inputs(batch)["input_ids"].shape == (1, 1280)  # three rows of 400
    assert_alike(outcome(flex, batch), outcome(load(folder, attention="sdpa", **settings)[0], batch), dtype)


@pytest.mark.parametrize(("name", "expected"), [("llama", "flex"), ("gpt2", "sdpa"), ("gemma2", "eager")])
def test_auto_takes_flex_where_the_architecture_has_it(name: str, expected: str, tmp_path: Path) -> None:
    facts = load(tiny.save_model(tiny.CONFIGS[name](), tmp_path / name), quantization="none")[1]
    assert facts.attention.split(" ")[0] == expected
    assert ("cannot use flex attention" in facts.attention) == (expected != "flex")


def test_flex_is_compiled_a_few_times_for_any_lengths_and_numbers_of_pairs(tiny_llama: Path) -> None:
    policy, _ = load(tiny_llama, quantization="none")
    assert policy.flex
    before, generator = traced(), np.random.default_rng(1)
    for pairs in (1, 1, 2, 3, 5, 8, 1, 4, 6, 2, 7, 1, 3):
        batch = random_batch(generator.integers(1, 160, (pairs, 3)).tolist())
        with reference(policy):
            policy(batch)
        outcome(policy, batch)
    assert traced() - before <= 3


@pytest.mark.parametrize(("checkpointing", "offload"), [("none", False), ("selective", False), ("all", True)])
def test_whatever_is_kept_for_backward_flex_gives_the_same(tiny_llama: Path, checkpointing: str, offload: bool) -> None:
    batch, settings = random_batch([(120, 50, 140), (200, 170, 30)]), {"quantization": "none", "attention": "flex"}
    expected = outcome(load(tiny_llama, **settings)[0], batch)
    policy, _ = load(tiny_llama, checkpointing, offload, **settings)
    assert_alike(outcome(policy, batch), expected, "bfloat16")


def test_flex_keeps_no_mask_of_a_long_row(tiny_llama: Path) -> None:
    peaks, batch = {}, random_batch([(4000, 2000, 2000)] * 2)
    for attention in ("flex", "sdpa"):
        policy, _ = load(tiny_llama, quantization="none", attention=attention)
        policy.pieces_from = None
        outcome(policy, batch)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outcome(policy, batch)
        peaks[attention] = torch.cuda.max_memory_allocated() - before
    assert peaks["flex"] < peaks["sdpa"] - 2 * 8000 * 8000  # at the least its boolean mask


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "qwen2", "qwen3", "phi3"])
def test_kernels_give_the_same_log_probs_and_gradients(name: str, dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel")
    folder = tiny.save_model(tiny.CONFIGS[name](), tmp_path / name)
    batch = random_batch([(120, 50, 140), (200, 170, 30), (3, 9, 9)])
    fused, facts = load(folder, quantization="none", dtype=dtype)
    assert facts.kernels.startswith("liger (")
    assert "RMSNorm" in facts.kernels
    assert "rotary" in facts.kernels
    without, facts = load(folder, quantization="none", dtype=dtype, kernels="none")
    assert facts.kernels == "none"
    assert_alike(outcome(fused, batch), outcome(without, batch), dtype)
    with reference(fused), reference(without):
        torch.testing.assert_close(fused(batch), without(batch), atol=TOLERANCES[dtype][0], rtol=0)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_chunked_log_probs_and_gradients(softcap: float | None) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(128_256, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(3000, 64, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()
    assert len(hidden) > chunk_rows(128_256, hidden.device)
    exact = hidden.detach().float().requires_grad_()
    targets = torch.randint(0, 128_256, (3000,), generator=generator, device="cuda")
    value = token_logps(hidden, targets, Head(weight, softcap=softcap))
    expected = plain(exact, targets, Head(weight.float(), softcap=softcap))
    torch.testing.assert_close(value, expected, atol=0.2, rtol=0)  # logits of 30 and more, rounded to bfloat16
    value.sum().backward()
    expected.sum().backward()
    assert (hidden.grad - exact.grad).norm() < 0.02 * exact.grad.norm()


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


def test_sums_over_long_responses_are_the_same_every_time() -> None:
    """What a GPU adds up in any order, in numbers so large that float32 would show it."""
    batch = random_batch([(20, 4000, 3000)] * 4)
    logps = -20 * torch.rand(len(batch.targets), generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    first, again = (torch.stack(by_response(batch, logps)) for _ in range(2))
    assert torch.equal(first, again)
    exact = torch.stack(by_response(batch.to("cpu"), logps.cpu()))
    torch.testing.assert_close(first.cpu(), exact, rtol=2e-7, atol=0)


def test_a_first_loss_is_that_of_no_difference(tmp_path: Path) -> None:
    """Policy and reference through flex attention, Liger's kernels and 4-bit products, of a width that people train."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = LlamaConfig(**(tiny.SIZES | sizes | {"head_dim": 128, "num_hidden_layers": 4}))
    policy, _ = load(tiny.save_model(config, tmp_path / "wide"), quantization="nf4")
    batch = random_batch([(384, 640, 420), (384, 400, 640), (300, 500, 500)])
    with reference(policy):
        before = policy(batch)
    assert torch.equal(policy(batch), before)


def test_joined_adapters_are_those_of_peft(tmp_path: Path) -> None:
    folder = tiny.save_model(tiny.CONFIGS["qwen2"](), tmp_path / "qwen2")
    batch = random_batch([(120, 50, 140), (200, 170, 30)])
    for dtype in TOLERANCES:
        policy, _ = load(folder, quantization="nf4", dtype=dtype, attention="sdpa", kernels="none")
        joined = outcome(policy, batch)
        peft_again(policy)
        assert_alike(joined, outcome(policy, batch), dtype)


def test_a_run_with_the_paged_optimizer_and_its_resume(tiny_llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeeds(*train_flags(tiny_llama, pairs_file, run, "--save-every", 1))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    succeeds("train", "--resume", run / "checkpoints" / "step-000002")
    again = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in again] == [row["step"] for row in rows]
    succeeds("merge", run)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("config", ["ddp", "fsdp-qlora", "deepspeed-zero2", "deepspeed-zero3"])
def test_two_gpus_do_what_one_does(tiny_llama: Path, pairs_file: Path, tmp_path: Path, config: str) -> None:
    """Over NF4, ZeRO-3 over bfloat16, through the launcher and NCCL; losses of products in batches of other shapes."""
    losses = []
    if config.startswith("deepspeed"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed (the extra 'deepspeed')")
    base = ("--quantization", "none" if config == "deepspeed-zero3" else "nf4")
    for name, more in (("one", ()), ("two", ("--num-processes", 2, "--accelerate-config", config))):
        succeeds(*train_flags(tiny_llama, pairs_file, tmp_path / name, *base, *more))
        rows = (json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in rows])
    assert losses[1] == pytest.approx(losses[0], abs=2e-2)
