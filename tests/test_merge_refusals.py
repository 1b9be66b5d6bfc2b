"""What is not merged, and why; and that nothing half-written stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sampo_cli.errors import ModelError, NumericsError, SampoError, UsageError
from sampo_cli.fingerprint import weights_fingerprint
from sampo_cli.merging import merge, resolve_adapter
from tests.merge_models import loaded, save_adapter, save_base
from tests.tiny import CONFIGS


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", CONFIGS["llama"]())


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base)


def refused(adapter: Path, kind: type[SampoError] = ModelError, **options: Any) -> SampoError:
    """The error of a merge, which must leave nothing beside the adapter."""
    before = sorted(adapter.parent.iterdir())
    with pytest.raises(kind) as info:
        merge(adapter, check_pairs=0, **options)
    assert info.type is kind
    assert info.value.hint
    assert sorted(adapter.parent.iterdir()) == before
    return info.value


def change(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **values}))


def test_resolve_adapter(tmp_path: Path, adapter: Path) -> None:
    assert resolve_adapter(adapter) == adapter
    run = tmp_path / "run"
    shutil.copytree(adapter, run / "adapter")
    assert resolve_adapter(run) == run / "adapter"
    (run / "recipe.yaml").write_text("model:\n  name: x\n")
    assert merge(run, check_pairs=0).output == run / "merged"

    shutil.rmtree(run / "adapter")
    with pytest.raises(ModelError, match="a run without adapter/") as info:
        resolve_adapter(run)
    assert info.value.hint == f"go on with: sampo train --resume {run}"
    with pytest.raises(ModelError, match="no such folder"):
        resolve_adapter(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="a whole model"):
        resolve_adapter(tmp_path / "base")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        resolve_adapter(tmp_path / "empty")


def test_another_parent_by_its_weights(tmp_path: Path, adapter: Path, base: Path) -> None:
    record = {"base_model": "the/base", "base_fingerprint": weights_fingerprint(base)}
    change(adapter, "sampo.json", **record)
    other = save_base(tmp_path / "other", CONFIGS["llama"](), seed=9)
    message = refused(adapter, base=str(other)).message
    assert "parent is another model" in message
    assert "'the/base'" in message
    assert f"'{other}'" in message
    assert merge(adapter, base=str(shutil.copytree(base, tmp_path / "copy")), check_pairs=0).merged_layers == 14


def test_trained_on_a_quantized_copy(tmp_path: Path, adapter: Path, base: Path) -> None:
    """A base in 4 bits on disk is refused; with --base the 16-bit one is taken, though its fingerprint is another."""
    quantized = shutil.copytree(base, tmp_path / "base-4bit")
    change(quantized, "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    change(adapter, "adapter_config.json", base_model_name_or_path=str(quantized))
    change(adapter, "sampo.json", base_model=str(quantized), base_fingerprint="0" * 32)
    error = refused(adapter)
    assert "is quantized" in error.message
    assert error.hint == "give the 16-bit base with --base"
    assert merge(adapter, base=str(base), check_pairs=0).merged_layers == 14


def test_packed_weights_without_a_quantization_config(adapter: Path, base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**weights, name: torch.zeros(512, 1, dtype=torch.uint8)}, base / "model.safetensors")
    assert "stores 'model.layers.0.self_attn.q_proj.weight' as U8" in refused(adapter).message


def test_another_parent_by_its_shapes_or_modules(tmp_path: Path, adapter: Path) -> None:
    config = CONFIGS["llama"]()
    config.intermediate_size = 80
    wider = save_base(tmp_path / "wider", config)
    message = refused(adapter, base=str(wider)).message
    assert "is for a weight of shape (" in message
    gpt2 = save_base(tmp_path / "gpt2", CONFIGS["gpt2"]())
    assert "no module 'model.layers." in refused(adapter, base=str(gpt2)).message


def test_missing_parents(tmp_path: Path, adapter: Path, base: Path) -> None:
    missing = tmp_path / "sft" / "adapter"
    change(adapter, "adapter_config.json", base_model_name_or_path=str(missing))
    error = refused(adapter)
    assert f"stands on '{missing}', which is missing" in error.message
    assert "--base" in str(error.hint)
    change(adapter, "adapter_config.json", base_model_name_or_path=None)
    assert "does not say what it was trained on" in refused(adapter).message
    change(adapter, "adapter_config.json", base_model_name_or_path=str(adapter))
    assert "stands on itself" in refused(adapter).message
    # With the base given, a parent out of reach is taken for it; without a fingerprint only shapes can tell.
    change(adapter, "adapter_config.json", base_model_name_or_path="/elsewhere/base")
    result = merge(adapter, base=str(base), check_pairs=0)
    assert result.merged_layers == 14
    assert [str(adapter) in warning for warning in result.warnings] == [True]
    change(adapter, "sampo.json", base_fingerprint=weights_fingerprint(base))
    assert merge(adapter, base=str(base), output=tmp_path / "again", check_pairs=0).warnings == ()


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("peft_type", "IA3", "'IA3'"),
        ("bias", "all", "bias='all'"),
        ("lora_bias", True, "lora_bias=True"),
        ("modules_to_save", ["lm_head"], "modules_to_save="),
        ("target_parameters", ["experts.down_proj"], "target_parameters="),
        ("layer_replication", [[0, 1]], "layer_replication="),
        ("init_lora_weights", "pissa", "init_lora_weights='pissa'"),
        ("r", 3, "has rank 4 in adapter_model.safetensors, 3 in adapter_config.json"),
        ("use_dora", True, "14 of 14 layers incomplete"),
        ("a_setting_of_tomorrow", 1, "a_setting_of_tomorrow=1"),
    ],
)
def test_settings_that_a_merge_would_lose(adapter: Path, setting: str, value: object, words: str) -> None:
    change(adapter, "adapter_config.json", **{setting: value})
    assert words in refused(adapter).message


def test_tensors_that_do_not_belong(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({**weights, "base_model.model.lm_head.weight": torch.zeros(320, 32)}, path)
    assert "1 tensors that are not LoRA's" in refused(adapter).message
    lost = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, path)
    assert "1 of 14 layers incomplete: model.layers.0.mlp.up_proj" in refused(adapter).message
    path.write_bytes(path.read_bytes()[:1000])
    assert str(path) in refused(adapter).message
    path.rename(adapter / "adapter_model.bin")
    assert "adapter_model.bin is pickled" in refused(adapter).message


def test_tied_embeddings(tmp_path: Path) -> None:
    base = save_base(tmp_path / "tied", CONFIGS["qwen2"]())
    for target in ("embed_tokens", "lm_head"):
        adapter = save_adapter(tmp_path / target, base, target_modules=[target, "q_proj"])
        assert "shares its weight" in refused(adapter).message


def test_an_embedding_trained_on_other_weights(tmp_path: Path, base: Path) -> None:
    adapter = save_adapter(tmp_path / "embedding", base, target_modules=["embed_tokens"])
    other = save_base(tmp_path / "other", CONFIGS["llama"](), seed=9)
    assert "trained on another 'model.embed_tokens.weight'" in refused(adapter, base=str(other)).message


def test_shards_that_are_missing_or_cut(tmp_path: Path) -> None:
    base = save_base(tmp_path / "sharded", CONFIGS["llama"](), max_shard_size="40KB")
    adapter = save_adapter(tmp_path / "adapter", base)
    shard = sorted(base.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    assert "not a whole safetensors file" in refused(adapter).message
    shard.unlink()
    assert f"shards are missing: {shard.name}" in refused(adapter).message


def test_output_and_dtype(tmp_path: Path, adapter: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    assert "already there" in refused(adapter, UsageError, output=taken).message
    assert "--dtype int4" in refused(adapter, UsageError, dtype="int4").message
    (tmp_path / "free").mkdir()
    assert merge(adapter, output=tmp_path / "free", check_pairs=0).shards == 1
    merge(adapter, output=tmp_path / "deep" / "er", check_pairs=0)
    assert loaded(tmp_path / "deep" / "er")


def test_numbers_that_overflow_leave_nothing(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    save_file({**weights, name: weights[name] * 1e6}, path)
    error = refused(adapter, NumericsError, dtype="float16")
    assert "'model.layers.1.self_attn.v_proj.weight' is not finite" in error.message
    assert merge(adapter, dtype="bfloat16", check_pairs=0).shards == 1


def test_what_a_killed_merge_left_is_cleared(tmp_path: Path, adapter: Path) -> None:
    left = tmp_path / ".adapter-merged.tmp"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    output = merge(adapter, check_pairs=0).output
    assert not left.exists()
    assert (output / "model.safetensors").stat().st_size > 1000
