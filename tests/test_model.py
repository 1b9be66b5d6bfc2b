"""Bases in 4 bits, adapters and the reference that they imply."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sampo_cli.batch import Draw, collate
from sampo_cli.checks import ROUNDED_TOLERANCE
from sampo_cli.config import LoraSection, ModelConfig
from sampo_cli.errors import ModelError
from sampo_cli.lora import load_adapter_weights, lora_section, save_adapter
from sampo_cli.model import load_policy, pick_dtype
from sampo_cli.policy import Policy, reference
from tests import tiny
from tests.test_layout import make_pairs


def load(folder: Path, quantization: str = "nf4", lora: LoraSection | None = None, **model: object) -> tuple:
    config = ModelConfig(name=str(folder), quantization=quantization, **model)
    return load_policy(config, lora or LoraSection(), seed=1)


def logps(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy(collate(make_pairs(), Draw("sum", 0, 0), policy.layout))


def scramble(policy: Policy, scale: float = 0.1) -> None:
    """Give the policy's adapter an effect, as training would."""
    torch.manual_seed(9)
    for name, parameter in policy.model.named_parameters():
        if "lora_B.default" in name:
            parameter.data.normal_(0, scale)


def test_nf4_is_really_4_bit_and_counted(tiny_llama: Path) -> None:
    _, facts = load(tiny_llama)
    # 2 layers of q, k, v, o, gate, up, down; the head stays as it is.
    assert (facts.quantized_layers, facts.linear_layers, facts.adapter_layers) == (14, 15, 14)
    weights_per_layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    assert facts.dtypes["nf4"] == 2 * weights_per_layer
    assert set(facts.dtypes) == {"nf4", facts.dtype, "float32"}


def test_layers_that_the_cpu_would_unpack_wrongly_are_left_unquantized(tmp_path: Path) -> None:
    """bitsandbytes 0.50.2: on the CPU, 4-bit rows that are no multiple of 64 come back with a neighbour's scale."""
    config = tiny.CONFIGS["llama"]()
    config.intermediate_size = 96
    policy, facts = load(tiny.save_model(config, tmp_path / "odd"))
    # down_proj of both layers has 96 inputs.
    assert facts.quantized_layers == 12
    exact = policy.causal_lm.model.layers[0].mlp.down_proj.base_layer.weight
    assert exact.shape == (64, 96)
    assert exact.is_floating_point()


def test_unquantized_has_no_4_bit_layer(tiny_llama: Path) -> None:
    _, facts = load(tiny_llama, "none", dtype="bfloat16")
    assert facts.quantized_layers == 0
    # No blanket upcast: only the adapter is float32. r = 16 on each of 14 layers: 16 * (inputs + outputs).
    adapter = 2 * 16 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 128))
    assert facts.dtypes["float32"] == facts.trainable_parameters == adapter


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "phi3", "mamba"])
def test_a_fresh_adapter_is_its_reference_exactly(name: str, quantization: str, tmp_path: Path) -> None:
    folder = tiny.save_model(tiny.CONFIGS[name](), tmp_path / name)
    policy, facts = load(folder, quantization)
    assert facts.layout == ("separate" if name == "mamba" else "shared")
    for training in (True, False):
        policy.train(training)
        with reference(policy):
            before = logps(policy)
        assert torch.equal(logps(policy), before)


def test_two_forwards_agree_although_the_config_has_dropout(tmp_path: Path) -> None:
    config = tiny.CONFIGS["gpt2"]()
    assert config.resid_pdrop == 0.1
    policy, _ = load(tiny.save_model(config, tmp_path / "gpt2"))
    assert policy.training
    assert torch.equal(logps(policy), logps(policy))


def test_the_reference_does_not_move_when_the_adapter_does(tiny_llama: Path) -> None:
    policy, _ = load(tiny_llama)
    with reference(policy):
        before = logps(policy)
    scramble(policy)
    assert (logps(policy) - before).abs().max() > 0.01
    with reference(policy):
        assert torch.equal(logps(policy), before)
    assert policy.model.active_adapter == "default"


def test_reference_restores_the_policy_after_an_error(tiny_llama: Path) -> None:
    policy, _ = load(tiny_llama)
    scramble(policy)
    before = logps(policy)
    with pytest.raises(RuntimeError, match="on purpose"), reference(policy):
        raise RuntimeError("on purpose")
    assert torch.equal(logps(policy), before)
    assert torch.is_grad_enabled()


def test_gradients_reach_every_adapter_through_checkpointing(tiny_llama: Path) -> None:
    policy, _ = load(tiny_llama)
    policy(collate(make_pairs(), Draw("sum", 0, 0))).sum().backward()
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            assert "lora_" in name
            # B starts at 0, so A's gradient is 0 in the first step and B's is not.
            assert (parameter.grad.abs().max() > 0) == ("lora_B" in name), name


def test_going_on_from_an_adapter_keeps_it_as_the_reference(tiny_llama: Path, tmp_path: Path) -> None:
    policy, _ = load(tiny_llama)
    with reference(policy):
        base = logps(policy)
    scramble(policy)
    after_sft = logps(policy)
    save_adapter(policy, tmp_path)
    second, _ = load(tiny_llama, adapter=str(tmp_path))
    with reference(second):
        assert torch.equal(logps(second), after_sft)
    assert torch.equal(logps(second), after_sft)
    assert (after_sft - base).abs().max() > 0.01
    trainable = [name for name, p in second.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".default." in name for name in trainable)
    scramble(second, 0.3)
    with reference(second):
        assert torch.equal(logps(second), after_sft)
    assert [name for name, p in second.named_parameters() if p.requires_grad] == trainable


def test_a_saved_adapter_is_plain_peft_and_comes_back(tiny_llama: Path, tmp_path: Path) -> None:
    policy, _ = load(tiny_llama)
    scramble(policy)
    expected = logps(policy)
    save_adapter(policy, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_llama)
    assert settings["peft_type"] == "LORA"
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "adapter_model.safetensors").values())
    again, _ = load(tiny_llama)
    load_adapter_weights(again, tmp_path)
    assert torch.equal(logps(again), expected)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisations_that_move_the_base_are_refused(tiny_llama: Path, init: str) -> None:
    with pytest.raises(ModelError, match="no longer be the reference"):
        load(tiny_llama, lora=LoraSection(init=init))


@pytest.mark.parametrize(
    ("key", "value"), [("bias", "all"), ("modules_to_save", ["lm_head"]), ("init_lora_weights", "pissa")]
)
def test_adapters_that_train_more_than_lora_are_refused(
    tiny_llama: Path, tmp_path: Path, key: str, value: object
) -> None:
    policy, _ = load(tiny_llama)
    save_adapter(policy, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ModelError, match=key):
        load(tiny_llama, adapter=str(tmp_path))


def test_an_adapter_of_another_base_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    policy, _ = load(tiny_llama)
    (tmp_path / "adapter").mkdir()
    save_adapter(policy, tmp_path / "adapter")
    config = tiny.CONFIGS["llama"]()
    config.hidden_size, config.head_dim = 128, 32
    other = tiny.save_model(config, tmp_path / "other")
    with pytest.raises(ModelError, match="does not fit"):
        load(other, adapter=str(tmp_path / "adapter"))


def test_an_adapter_trained_with_dropout_goes_on_without(tiny_llama: Path, tmp_path: Path) -> None:
    policy, _ = load(tiny_llama, lora=LoraSection(dropout=0.5, r=4))
    scramble(policy)
    save_adapter(policy, tmp_path)
    second, _ = load(tiny_llama, adapter=str(tmp_path))
    assert second.training
    with reference(second):
        before = logps(second)
    assert torch.equal(logps(second), before)
    assert lora_section(second.model).dropout == 0
    assert lora_section(second.model).r == 4


@pytest.mark.parametrize("targets", [".*q_proj", ["q_proj", "v_proj"], "all-linear"])
def test_however_targets_are_given_the_saved_adapter_loads(
    tiny_llama: Path, tmp_path: Path, targets: str | list[str]
) -> None:
    policy, facts = load(tiny_llama, lora=LoraSection(targets=targets))
    assert facts.adapter_layers == {".*q_proj": 2, "all-linear": 14}.get(str(targets), 4)
    scramble(policy)
    save_adapter(policy, tmp_path)
    assert torch.equal(logps(load(tiny_llama, adapter=str(tmp_path))[0]), logps(policy))


def test_a_state_space_models_adapter_loads(tmp_path: Path) -> None:
    folder = tiny.save_model(tiny.CONFIGS["mamba"](), tmp_path / "mamba")
    policy, _ = load(folder, "none")
    scramble(policy)
    (tmp_path / "adapter").mkdir()
    save_adapter(policy, tmp_path / "adapter")
    assert torch.equal(logps(load(folder, "none", adapter=str(tmp_path / "adapter"))[0]), logps(policy))


def test_an_adapter_of_other_weights_of_the_same_shape_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    policy, facts = load(tiny_llama)
    save_adapter(policy, tmp_path)
    record = {"base_model": "some/model", "base_fingerprint": facts.fingerprint}
    (tmp_path / "sampo.json").write_text(json.dumps(record))
    load(tiny_llama, adapter=str(tmp_path))
    (tmp_path / "sampo.json").write_text(json.dumps(record | {"base_fingerprint": "0" * 32}))
    with pytest.raises(ModelError, match="trained on 'some/model'"):
        load(tiny_llama, adapter=str(tmp_path))


def test_dora_and_rslora_start_at_the_reference(tiny_llama: Path) -> None:
    policy, _ = load(tiny_llama, lora=LoraSection(rslora=True, dora=True, r=4))
    with reference(policy):
        before = logps(policy)
    # Not exactly: DoRA multiplies by norm / norm, rounded in the compute dtype.
    assert (logps(policy) - before).abs().mean() < ROUNDED_TOLERANCE


def test_missing_and_pickled_models_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not found"):
        load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytest_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="safetensors"):
        load(tmp_path)


def test_compute_dtype() -> None:
    assert pick_dtype("float32", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cpu")) in (torch.bfloat16, torch.float32)
