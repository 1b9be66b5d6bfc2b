"""The merged weights: against PEFT's own merge, against numbers worked out by hand, and in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, Gemma3Config, LlamaConfig

from sampo_cli.adapter import LoraLayer
from sampo_cli.fingerprint import read_header
from sampo_cli.merging import merge
from tests.merge_models import largest_difference, loaded, peft_merged, save_adapter, save_base
from tests.tiny import CONFIGS, SIZES

LINEAR_LAYERS = {
    "llama": 14,
    "gemma2": 14,
    "qwen2": 14,
    "mistral": 14,
    "gpt2": 8,
    "gpt_neox": 8,
    "gemma3": 14,
    "qwen3": 14,
    "phi3": 8,
}
"""Two blocks of q k v o gate up down; GPT-2 and NeoX: qkv, o, two of the MLP; Phi-3: qkv, o, gate_up, down."""


def merge_only(source: Path, **options: Any) -> Path:
    return merge(source, check_pairs=0, **{"dtype": "float32", **options}).output


def test_lora_update_by_hand() -> None:
    # B A = [[0.5], [1]] [[1, 0]] = [[0.5, 0], [1, 0]]; alpha / r = 2, so W + [[1, 0], [2, 0]].
    layer = LoraLayer(a=torch.tensor([[1.0, 0.0]]), b=torch.tensor([[0.5], [1.0]]), scaling=2.0)
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert layer.merged(weight, transposed=False).tolist() == [[2, 2], [5, 4]]
    # Stored as [inputs, outputs], the update is [[1, 2], [0, 0]].
    assert layer.merged(weight, transposed=True).tolist() == [[2, 4], [3, 4]]
    assert weight.tolist() == [[1, 2], [3, 4]]


def test_dora_update_by_hand() -> None:
    # W + update = [[3, 4], [0, 2]], its rows have norms 5 and 2; magnitudes 10 and 1 scale them by 2 and 1/2.
    layer = LoraLayer(
        a=torch.tensor([[1.0, 0.0]]), b=torch.tensor([[1.0], [0.0]]), scaling=3.0, magnitude=torch.tensor([10.0, 1.0])
    )
    weight = torch.tensor([[0.0, 4.0], [0.0, 2.0]])
    assert layer.merged(weight, transposed=False).tolist() == [[6, 8], [0, 1]]
    assert layer.merged(weight.T, transposed=True).T.tolist() == [[6, 8], [0, 1]]


@pytest.mark.parametrize("kind", LINEAR_LAYERS)
def test_equals_pefts_merge(tmp_path: Path, kind: str) -> None:
    base = save_base(tmp_path / "base", CONFIGS[kind]())
    adapter = save_adapter(tmp_path / "adapter", base)
    result = merge(adapter, dtype="float32", check_pairs=0)
    assert result.merged_layers == LINEAR_LAYERS[kind]
    assert (result.shards, result.output) == (1, tmp_path / "adapter-merged")
    expected = peft_merged(base, adapter)
    assert largest_difference(loaded(result.output), expected) <= 1e-6
    assert largest_difference(loaded(base), expected) > 0.05  # the adapter does something


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2, "c_attn": 2}, "alpha_pattern": {"down_proj": 3, "layers.0.mlp.up_proj": 5}},
        {"use_dora": True, "use_rslora": True, "r": 3},
    ],
    ids=["rslora", "dora", "patterns", "rsdora"],
)
def test_variants_equal_pefts_merge(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    base = save_base(tmp_path / "base", CONFIGS[kind]())
    adapter = save_adapter(tmp_path / "adapter", base, **settings)
    assert largest_difference(loaded(merge_only(adapter)), peft_merged(base, adapter)) <= 1e-6


def test_untied_embeddings_and_head(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", CONFIGS["llama"]())
    for dora in (False, True):
        targets = ["embed_tokens", "lm_head", "q_proj"]
        adapter = save_adapter(tmp_path / f"adapter{dora}", base, target_modules=targets, use_dora=dora)
        result = merge(adapter, dtype="float32", check_pairs=0)
        assert result.merged_layers == 4
        assert largest_difference(loaded(result.output), peft_merged(base, adapter)) <= 1e-6


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", CONFIGS["llama"](), dtype="bfloat16")
    adapter = save_adapter(tmp_path / "adapter", base)
    merged = loaded(merge_only(adapter, dtype="bfloat16"))
    exact = peft_merged(base, adapter)
    in_bfloat16 = peft_merged(base, adapter, dtype="bfloat16")
    for name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16
        # bfloat16 has 8 significant bits: rounding is off by at most 2^-8 of the number. PEFT rounds the update too.
        assert torch.all((tensor.float() - exact[name]).abs() <= exact[name].abs() * 2**-8 + 1e-7), name
        assert torch.all((tensor.float() - in_bfloat16[name].float()).abs() <= exact[name].abs() * 2**-7 + 1e-3), name


def test_names_in_old_checkpoints(tmp_path: Path) -> None:
    """GPT-2's original files have no `transformer.` before the names; NeoX's head is `embed_out` in the files."""
    base = save_base(tmp_path / "base", CONFIGS["gpt2"]())
    adapter = save_adapter(tmp_path / "adapter", base)
    expected = peft_merged(base, adapter)
    stored = load_file(base / "model.safetensors")
    save_file({name.removeprefix("transformer."): t for name, t in stored.items()}, base / "model.safetensors")
    merged = merge_only(adapter)
    assert "h.0.attn.c_attn.weight" in load_file(merged / "model.safetensors")
    assert largest_difference(loaded(merged), expected) <= 1e-6

    base = save_base(tmp_path / "neox", CONFIGS["gpt_neox"]())
    adapter = save_adapter(tmp_path / "neox_adapter", base, target_modules=["lm_head"])
    merged = merge_only(adapter)
    assert "embed_out.weight" in load_file(merged / "model.safetensors")
    assert largest_difference(loaded(merged), peft_merged(base, adapter)) <= 1e-6


def test_text_part_of_a_vision_model(tmp_path: Path) -> None:
    """Its files say language_model.model.layers, its modules are model.language_model.layers."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=SIZES, vision_config=vision, mm_tokens_per_image=4)
    base = save_base(tmp_path / "base", config)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=r".*language_model.*\.(q_proj|down_proj)")
    result = merge(adapter, dtype="float32", check_pairs=0)
    assert result.merged_layers == 4
    assert "language_model.model.layers.0.mlp.down_proj.weight" in load_file(result.output / "model.safetensors")
    assert largest_difference(loaded(result.output), peft_merged(base, adapter)) <= 1e-6


def test_experts_stay_and_float32_stays(tmp_path: Path) -> None:
    """Attention of a mixture of experts can be merged; what the architecture keeps in float32 keeps it."""
    config = DeepseekV3Config(
        **{key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size")},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 16},
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    )
    base = save_base(tmp_path / "base", config)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["o_proj", "q_b_proj"])
    assert largest_difference(loaded(merge_only(adapter)), peft_merged(base, adapter)) <= 1e-6
    rounded = load_file(merge_only(adapter, dtype="bfloat16", output=tmp_path / "bf16") / "model.safetensors")
    kept = {name for name, tensor in rounded.items() if tensor.dtype == torch.float32}
    assert kept == {"model.layers.1.mlp.gate.e_score_correction_bias"}


def test_stacked_adapters_are_merged_in_order(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", CONFIGS["llama"]())
    parent = save_adapter(tmp_path / "sft", base)
    between = merge_only(parent, output=tmp_path / "between")
    child = save_adapter(tmp_path / "dpo", between, seed=5, use_dora=True)
    settings = json.loads((child / "adapter_config.json").read_text())
    (child / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(parent)}))
    expected = peft_merged(base, parent, child)
    assert largest_difference(loaded(merge_only(child)), expected) <= 1e-6
    # The base may be named, and so may the parent where it has moved.
    moved = (tmp_path / "sft").rename(tmp_path / "moved")
    assert largest_difference(loaded(merge_only(child, base=str(moved), output=tmp_path / "again")), expected) <= 1e-6


def test_shards_keep_their_names(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", CONFIGS["llama"](), max_shard_size="40KB")
    adapter = save_adapter(tmp_path / "adapter", base)
    result = merge(adapter, dtype="bfloat16", check_pairs=0)
    names = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(names) == result.shards > 2
    assert sorted(path.name for path in result.output.glob("*.safetensors")) == names
    old, new = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (base, result.output))
    assert new["weight_map"] == old["weight_map"]
    assert new["metadata"]["total_size"] * 2 == old["metadata"]["total_size"]
    assert largest_difference(loaded(result.output), peft_merged(base, adapter)) < 0.01


PEAK = """
import sys, peft, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from sampo_cli.merging import merge
from sampo_cli.template import load_tokenizer

def memory(kind):
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[kind].split()[0]) * 1024

def peak(action):
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    action()
    return memory("VmHWM") - before

torch.set_num_threads(1)
base, warm_up, adapter = map(Path, sys.argv[1:])
merge(warm_up, check_pairs=0)
merging = peak(lambda: merge(adapter, check_pairs=0))
loading = peak(lambda: AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16"))
print("peak", merging, loading)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of resident memory")
def test_memory_is_bounded_by_a_shard(tmp_path: Path) -> None:
    """A shard and the adapter, not the model; in a process that has merged one layer before, so that libraries and
    their buffers do not count."""
    sizes = {**SIZES, "hidden_size": 512, "intermediate_size": 2048, "num_key_value_heads": 4, "num_hidden_layers": 1}
    small = save_base(tmp_path / "small", LlamaConfig(**sizes))
    warm_up = save_adapter(tmp_path / "warm_up", small)
    base = save_base(tmp_path / "base", LlamaConfig(**{**sizes, "num_hidden_layers": 10}), max_shard_size="18MB")
    adapter = save_adapter(tmp_path / "adapter", base)
    command = [sys.executable, "-c", PEAK, str(base), str(warm_up), str(adapter)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    merging, loading = map(int, run.stdout.split("peak")[-1].split())
    shards = [path.stat().st_size for path in base.glob("*.safetensors")]
    room = max(shards) + (adapter / "adapter_model.safetensors").stat().st_size + 16 * 2**20
    assert len(shards) >= 8
    assert sum(shards) > 3 * room
    assert merging < room
    assert loading > 3 * room


FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=4, do_sample=False)
print("result", json.dumps({
    "modules": [name for name in ("peft", "bitsandbytes") if type(model).__module__.startswith(name)],
    "meta": [name for name, tensor in model.state_dict().items() if tensor.is_meta],
    "dtypes": sorted({str(tensor.dtype) for tensor in model.state_dict().values()}),
    "quantized": hasattr(model.config, "quantization_config"),
    "new": ids.shape[1] - 3,
}))
"""


def test_loads_in_a_fresh_process(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", CONFIGS["gemma3"](), dtype="bfloat16")
    config = json.loads((base / "config.json").read_text())
    leftover = {"quantization_config": None, "torch_dtype": "float32"}
    (base / "config.json").write_text(json.dumps({**config, **leftover}))
    merged = merge_only(save_adapter(tmp_path / "adapter", base), dtype="bfloat16")
    written = json.loads((merged / "config.json").read_text())
    assert (written["dtype"], written["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert "quantization_config" not in written
    run = subprocess.run([sys.executable, "-c", FRESH, str(merged)], capture_output=True, text=True, check=True)
    facts = json.loads(run.stdout.split("result", 1)[1])
    assert facts == {"modules": [], "meta": [], "dtypes": ["torch.bfloat16"], "quantized": False, "new": 4}


def test_tokenizer_template_and_generation_config_come_along(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", CONFIGS["llama"]())
    adapter = save_adapter(tmp_path / "adapter", base)
    (base / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.6}')
    (base / "tokenizer.json").write_text('{"of": "base"}')
    (base / "tokenizer.model").write_bytes(b"\x00sentencepiece")
    (base / "special_tokens_map.json").write_text("{}")
    (base / "LICENSE.txt").write_text("terms")
    (base / "consolidated.safetensors").write_bytes(b"not read, not copied")
    first = merge_only(adapter)
    assert (first / "tokenizer.json").read_text() == '{"of": "base"}'
    assert (first / "LICENSE.txt").read_text() == "terms"
    assert not (first / "consolidated.safetensors").exists()

    (adapter / "tokenizer.json").write_text('{"of":   "adapter"}')
    (adapter / "chat_template.jinja").write_text("{{ messages }}\n")
    (adapter / "sampo.json").write_text("{}")
    second = merge_only(adapter, output=tmp_path / "second")
    assert (second / "tokenizer.json").read_text() == '{"of":   "adapter"}'
    assert (second / "chat_template.jinja").read_text() == "{{ messages }}\n"
    assert (second / "tokenizer.model").read_bytes() == b"\x00sentencepiece"
    assert json.loads((second / "generation_config.json").read_text())["temperature"] == 0.6
    written = {path.name for path in second.iterdir()}
    assert written.isdisjoint({"special_tokens_map.json", "adapter_config.json", "README.md"})
    assert set(json.loads((second / "sampo.json").read_text())) == {"adapter_sha256"}


def test_header_of_written_files_is_what_the_library_writes(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", CONFIGS["llama"]())
    merged = merge_only(save_adapter(tmp_path / "adapter", base))
    AutoModelForCausalLM.from_pretrained(merged).save_pretrained(tmp_path / "again")
    ours, theirs = (read_header(folder / "model.safetensors") for folder in (merged, tmp_path / "again"))
    assert [(t.name, t.dtype, t.shape, t.end - t.begin) for t in ours] == [
        (t.name, t.dtype, t.shape, t.end - t.begin) for t in theirs
    ]
    assert all(tensor.begin % 8 == 0 for tensor in ours)
