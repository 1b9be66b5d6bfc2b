"""The comparison of a merged model with the live one: against transformers and PEFT on their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from sampo_cli.config import validate
from sampo_cli.dataset import prepare
from sampo_cli.fingerprint import weights_fingerprint
from sampo_cli.merging import merge
from sampo_cli.template import load_tokenizer
from tests.merge_models import save_adapter, save_base
from tests.tiny import CONFIGS, SIZES


def test_drift_is_that_of_transformers_and_peft(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", LlamaConfig(**{**SIZES, "hidden_size": 64}))
    adapter = save_adapter(tmp_path / "adapter", base)
    record = {"format": 1, "base_model": str(base), "dtype": "float32", "base_fingerprint": weights_fingerprint(base)}
    texts = [list(range(3, 40)), [7, 8, 9]]
    drifts = {}
    for quantization in ("none", "nf4"):
        (adapter / "sampo.json").write_text(json.dumps({**record, "quantization": quantization}))
        output = tmp_path / quantization
        drifts[quantization] = merge(adapter, output=output, dtype="float32", texts=texts).drift
    exact, rounded = drifts["none"], drifts["nf4"]
    assert exact is not None
    assert rounded is not None
    # 37 + 3 tokens; the first of each text has nothing before it.
    assert exact.tokens == rounded.tokens == 38
    assert exact.max_abs < 1e-4

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    live = AutoModelForCausalLM.from_pretrained(base, dtype="float32", quantization_config=nf4, device_map={"": "cpu"})
    for module in live.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    models = [PeftModel.from_pretrained(live, adapter), AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")]
    differences = []
    for text in texts:
        ids = torch.tensor([text])
        with torch.no_grad():
            one, other = (-cross_entropy(m(ids).logits[0, :-1], ids[0, 1:], reduction="none") for m in models)
        differences.append((one - other).abs())
    expected = torch.cat(differences)
    assert rounded.mean_abs == pytest.approx(expected.mean().item(), rel=1e-3)
    assert rounded.max_abs == pytest.approx(expected.max().item(), rel=1e-3)
    assert rounded.mean_abs > 100 * exact.mean_abs
    assert (rounded.quantization, rounded.texts) == ("nf4", "given texts")


def test_drift_on_the_pairs_of_the_run(tmp_path: Path, tiny_llama: Path, pairs_file: Path) -> None:
    run = tmp_path / "run"
    save_adapter(run / "adapter", tiny_llama)
    tree = {"model": {"name": str(tiny_llama)}, "data": {"sources": [str(pairs_file)]}}
    recipe = validate(tree)
    (run / "recipe.yaml").write_text(recipe.dump())
    result = merge(run, dtype="float32", check_pairs=3)
    assert result.output == run / "merged"
    dataset = prepare(recipe.data, load_tokenizer(recipe.model, recipe.data), context=512)
    assert dataset.cached
    assert result.drift is not None
    assert result.drift.texts == "pairs of the run"
    assert result.drift.tokens == sum(dataset.chosen_tokens[:3]) + sum(dataset.rejected_tokens[:3])
    assert list(result.facts()) == ["model", "weights", "drift", "vllm", "transformers"]
    assert result.facts()["weights"] == "float32, 1 file, 14 layers merged"
    assert json.loads(json.dumps(result.to_dict()))["drift"]["tokens"] == result.drift.tokens

    pairs_file.unlink()
    result = merge(run, output=tmp_path / "again", check_pairs=3)
    assert result.drift is not None
    assert result.drift.texts.startswith("sentences, since the run's pairs cannot be read: ")


def test_drift_on_sentences_without_a_run(tmp_path: Path, tiny_llama: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", tiny_llama)
    result = merge(adapter, dtype="float32", check_pairs=2)
    assert result.drift is not None
    assert result.drift.texts == "sentences"
    assert result.drift.tokens > 50
    bare = save_adapter(tmp_path / "bare", save_base(tmp_path / "base", CONFIGS["llama"]()))
    result = merge(bare, dtype="float32")
    assert (result.drift, result.note) == (None, "no tokenizer beside the adapter or the base")
