"""LoRA layers computed as one operation against PEFT's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import Linear
from transformers import OlmoConfig

from sampo_cli.activations import Checkpointing
from sampo_cli.batch import Draw, collate
from sampo_cli.config import LoraSection, ModelConfig
from sampo_cli.lora import add_adapter
from sampo_cli.lora_linear import join_adapters
from sampo_cli.model import load_policy
from sampo_cli.policy import REFERENCE_ADAPTER, Policy, base, reference
from tests import tiny
from tests.test_layout import ATTENTION, make_pairs

ROUNDING = {"float32": (5e-5, 1e-5), "bfloat16": (0.3, 0.1)}
"""Nats of one token, and share of a gradient's norm, by which two orders of rounding may differ."""


def spread(model: torch.nn.Module) -> None:
    """Adapters that do something: B is zero at first."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.05, generator=generator)


def gradients(policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of a few pairs, and the gradient of all adapter weights."""
    policy.zero_grad()
    logps = policy(collate(make_pairs(), Draw("sum", 0, 0), policy.layout))
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return logps.detach(), torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])


def peft_again(model: torch.nn.Module) -> None:
    for module in model.modules():
        vars(module).pop("forward", None)


@pytest.mark.parametrize("checkpointing", ["all", "selective", "none"])
@pytest.mark.parametrize(
    ("name", "quantization", "dtype"),
    [
        *((name, "none", "float32") for name in ATTENTION),
        ("llama", "none", "bfloat16"),
        ("llama", "nf4", "float32"),
        ("qwen2", "nf4", "bfloat16"),
    ],
)
def test_log_probs_and_gradients_are_those_of_peft(
    name: str,
    quantization: str,
    dtype: str,
    checkpointing: Checkpointing,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tiny.save_model(tiny.CONFIGS[name](), tmp_path / name)
    config = ModelConfig(name=str(folder), quantization=quantization, dtype=dtype)
    policy, _ = load_policy(config, LoraSection(r=4, rslora=True), seed=0, checkpointing=checkpointing)
    spread(policy)
    with monkeypatch.context() as patch:
        if name != "gpt2":  # whose layers are Conv1D
            for layer in (Linear, Linear4bit):
                patch.setattr(layer, "forward", None)  # calling PEFT's raises
        join_adapters(policy, checkpointing)
        joined = gradients(policy)
    peft_again(policy)
    separate = gradients(policy)
    nats, share = ROUNDING[dtype]
    torch.testing.assert_close(joined[0], separate[0], atol=nats, rtol=0)
    assert separate[1].norm() > 0
    assert (joined[1] - separate[1]).norm() <= share * separate[1].norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_an_adapter_of_zeros_is_its_base_exactly(tiny_llama: Path, quantization: str, dtype: str) -> None:
    config = ModelConfig(name=str(tiny_llama), quantization=quantization, dtype=dtype)
    policy, _ = load_policy(config, LoraSection(r=4), seed=0)
    batch = collate(make_pairs(), Draw("sum", 0, 0), policy.layout)
    with base(policy), torch.no_grad():
        before = policy(batch)
    assert torch.equal(policy(batch), before)


def test_a_norm_that_autocast_computes_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA's does with `nn.LayerNorm`: a 4-bit layer then gives float32, and so must the one with an adapter."""
    folder = tiny.save_model(tiny.CONFIGS["gpt_neox"](), tmp_path / "neox")
    monkeypatch.setattr(torch.nn.LayerNorm, "forward", lambda norm, x: _normed(norm, x.float()))
    policy, _ = load_policy(ModelConfig(name=str(folder), dtype="bfloat16"), LoraSection(r=4), seed=0)
    batch = collate(make_pairs(), Draw("sum", 0, 0), policy.layout)
    with reference(policy):
        before = policy(batch)
    assert torch.equal(policy(batch), before)


def _normed(norm: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)


@pytest.mark.parametrize("checkpointing", ["all", "selective"])
@pytest.mark.parametrize("bias", [True, False])
def test_values_may_be_changed_in_place_afterwards(tmp_path: Path, bias: bool, checkpointing: Checkpointing) -> None:
    """OLMo clips queries, keys and values."""
    config = OlmoConfig(**tiny.SIZES, clip_qkv=0.5, attention_bias=bias)
    model = ModelConfig(name=str(tiny.save_model(config, tmp_path / "olmo")), quantization="none", dtype="float32")
    policy, _ = load_policy(model, LoraSection(r=4), seed=0, checkpointing=checkpointing)
    spread(policy)
    joined = gradients(policy)
    peft_again(policy)
    for ours, theirs in zip(joined, gradients(policy), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("activate", [True, False])
def test_a_frozen_adapter_that_is_the_reference(tiny_llama: Path, tmp_path: Path, activate: bool) -> None:
    """Two adapters in each layer, of which one is active: its numbers are PEFT's."""
    made = add_adapter(tiny.make_model(tiny.CONFIGS["llama"]()), LoraSection(r=4), seed=0)
    spread(made)
    made.save_pretrained(tmp_path / "adapter")
    config = ModelConfig(name=str(tiny_llama), quantization="none", dtype="float32")
    policy, _ = load_policy(config, LoraSection(r=4), seed=0)
    policy.model.load_adapter(str(tmp_path / "adapter"), adapter_name=REFERENCE_ADAPTER, is_trainable=False)
    batch = collate(make_pairs(), Draw("sum", 0, 0), policy.layout)
    found = []
    for joined in (True, False):
        if not joined:
            peft_again(policy)
        with reference(policy) if activate else torch.no_grad():
            found.append(policy(batch))
    torch.testing.assert_close(found[0], found[1], atol=5e-5, rtol=0)


@pytest.fixture
def adapted() -> PeftModel:
    model = tiny.make_model(tiny.CONFIGS["llama"]())
    return add_adapter(model, LoraSection(r=4, dropout=0.5), seed=0)


def test_which_layers_are_joined(adapted: PeftModel) -> None:
    layers = 7 * adapted.config.num_hidden_layers
    assert join_adapters(adapted) == layers
    gpt2 = add_adapter(tiny.make_model(tiny.CONFIGS["gpt2"]()), LoraSection(r=4), seed=0)
    assert join_adapters(gpt2) == 0  # all are Conv1D


def test_what_is_more_than_a_plain_adapter_stays_with_peft(adapted: PeftModel) -> None:
    """Dropout in training draws as PEFT draws; outside training the two agree."""
    spread(adapted)
    tokens = torch.arange(40)[None]

    def logits() -> torch.Tensor:
        torch.manual_seed(0)
        return adapted(tokens).logits.detach()

    adapted.train()
    dropped = logits()
    adapted.eval()
    kept = logits()
    assert not torch.allclose(dropped, kept)
    join_adapters(adapted)
    torch.testing.assert_close(logits(), kept, atol=1e-5, rtol=1e-5)
    adapted.train()
    assert torch.equal(logits(), dropped)


def test_a_dora_adapter_stays_with_peft(tiny_llama: Path) -> None:
    config = ModelConfig(name=str(tiny_llama), quantization="none", dtype="float32")
    policy, _ = load_policy(config, LoraSection(r=4, dora=True), seed=0)
    spread(policy)
    joined = gradients(policy)
    peft_again(policy)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(joined, gradients(policy), strict=True))


def test_the_base_inside_and_the_adapter_again_outside(tiny_llama: Path) -> None:
    """Also where something goes wrong inside."""
    config = ModelConfig(name=str(tiny_llama), quantization="none", dtype="float32")
    policy, _ = load_policy(config, LoraSection(r=4), seed=0)
    spread(policy)
    batch = collate(make_pairs(), Draw("sum", 0, 0), policy.layout)
    trained = policy(batch).detach()
    with policy.model.disable_adapter(), torch.no_grad():
        expected = policy(batch)
    with reference(policy):
        assert torch.equal(policy(batch), expected)
    with pytest.raises(KeyError), base(policy):
        raise KeyError
    assert torch.equal(policy(batch).detach(), trained)
    assert not torch.allclose(trained, expected)
    assert {p.requires_grad for name, p in policy.named_parameters() if "lora_" in name} == {True}
