"""`sampo merge --gguf` and `--adapter-only`: read back by gguf, transformers and PEFT, run by llama.cpp where it is."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from sampo_cli.errors import ExitCode, ModelError, NumericsError, SampoError
from sampo_cli.export import export_gguf
from sampo_cli.gguf_vocab import _split
from sampo_cli.gguf_write import _rope_factors, interleaved
from sampo_cli.llama_cpp_tools import quantize
from tests import tiny
from tests.conftest import Sampo
from tests.merge_models import save_adapter

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

WRITTEN = ("llama", "mistral", "qwen2", "qwen3")


def base_and_adapter(folder: Path, kind: str = "llama", **settings: Any) -> tuple[Path, Path]:
    config = tiny.CONFIGS[kind]()
    if kind == "qwen3":
        config.head_dim = 128  # as all of them have; transformers does not read it from GGUF
    base = tiny.save_model(config, folder / "base")
    return base, save_adapter(folder / "adapter", base, **settings)


def export(source: Path, kind: str, **options: Any) -> Any:
    return export_gguf(source, kind, check_pairs=0, **{"dtype": "float32", **options})


def logps(model: Any, length: int = 24) -> torch.Tensor:
    ids = torch.randint(3, tiny.VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(ids).logits.float().log_softmax(-1)


def read_back(file: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")


# The numbers ----------------------------------------------------------------------------------------------------------


def test_rows_are_interleaved_by_hand() -> None:
    # Two heads of four rows; transformers pairs row i with i + 2, llama.cpp neighbours: 0 2 1 3 within each head.
    weight = torch.arange(8.0)[:, None] * torch.ones(8, 3)
    assert interleaved(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleaved(torch.arange(8.0), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_rope_factors_are_those_of_transformers() -> None:
    """Its own frequencies without scaling, divided by ours, are its frequencies with it."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    config = LlamaConfig(**tiny._sizes("head_dim"), head_dim=128, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 5e5 ** (torch.arange(0, 128, 2) / 128)
    factors = _rope_factors(config)
    assert factors is not None
    assert torch.allclose(plain / torch.from_numpy(factors), scaled, rtol=1e-5)
    assert factors.min() == 1
    assert factors.max() == 8


@pytest.mark.parametrize("kind", WRITTEN)
def test_transformers_reads_what_was_written(tmp_path: Path, kind: str) -> None:
    """float16 holds these weights to 2^-11 of each; what it says is then what PEFT's live model says."""
    base, adapter = base_and_adapter(tmp_path, kind)
    result = export(adapter, "f16")
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), adapter)
    length = {"mistral": 8}.get(kind, 24)  # its window, which llama.cpp does not know of
    assert (logps(read_back(result.gguf.file), length) - logps(live, length)).abs().max() < 0.02
    assert (logps(AutoModelForCausalLM.from_pretrained(base), length) - logps(live, length)).abs().max() > 0.5
    fields = gguf.GGUFReader(result.gguf.file).fields
    context = next(field for name, field in fields.items() if name.endswith(".context_length"))
    assert context.contents() == {"mistral": 8}.get(kind, 512)


def test_bf16_holds_a_bfloat16_model_exactly(tmp_path: Path) -> None:
    _, adapter = base_and_adapter(tmp_path)
    result = export(adapter, "bf16", dtype="bfloat16")
    merged = AutoModelForCausalLM.from_pretrained(result.model, dtype="float32")
    assert torch.equal(logps(read_back(result.gguf.file)), logps(merged))


def test_q8_0_is_off_by_half_a_step_at_most(tmp_path: Path) -> None:
    """A block of 32 weights has the step max / 127, kept as float16 (2^-11), so each is off by half a step."""
    _, adapter = base_and_adapter(tmp_path)
    result = export(adapter, "q8_0")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(result.gguf.file).tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in stored.items()}
    assert kinds["blk.0.ffn_down.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    tensor = stored["blk.1.ffn_down.weight"]
    read = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1, 32)
    exact = load_file(result.model / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].numpy().reshape(-1, 32)
    step = np.abs(exact).max(axis=1, keepdims=True) / 127
    assert np.all(np.abs(read - exact) <= step * (0.5 + 127 * 2**-11))
    assert np.abs(read - exact).max() > step.max() * 0.4  # it is rounded


def test_a_weight_that_float16_cannot_hold(tmp_path: Path) -> None:
    base, _ = base_and_adapter(tmp_path)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    adapter = save_adapter(tmp_path / "adapter2", base)
    with pytest.raises(NumericsError, match=r"up_proj.*1e\+06"):
        export(adapter, "f16")
    assert not (tmp_path / "adapter2-gguf").exists()
    assert export(adapter, "bf16").gguf.file.is_file()  # the merged model is still there, and taken


# Tokenizers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "pre"), [("llama3", "llama-bpe"), ("qwen2_5", "qwen2")])
def test_how_text_is_cut_is_read_off_the_rules(shared: Path, name: str, pre: str) -> None:
    folder = shared / "tokenizers" / name
    rules = json.loads((folder / "tokenizer.json").read_text())
    assert _split(folder, rules) == pre
    rules["model"]["ignore_merges"] = not rules["model"].get("ignore_merges")
    with pytest.raises(ModelError, match="cuts text"):
        _split(folder, rules)


def test_a_byte_level_vocabulary(tmp_path: Path) -> None:
    _, adapter = base_and_adapter(tmp_path)
    result = export(adapter, "bf16")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(result.gguf.file).fields.items()}
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    assert fields["tokenizer.ggml.tokens"][: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert len(fields["tokenizer.ggml.tokens"]) == tiny.VOCABULARY
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["general.name"] == "adapter"
    assert fields["llama.rope.freq_base"] == 10_000


def test_pieces_are_merged_in_the_order_of_the_tokenizer(shared: Path, tmp_path: Path) -> None:
    """The first merge that makes a token gives its score: rank 0 the highest, 0."""
    base = shared / "models" / "stories260K"
    adapter = save_adapter(tmp_path / "adapter", base)
    result = export(adapter, "f16")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(result.gguf.file).fields.items()}
    merges = json.loads((base / "tokenizer.json").read_text())["model"]["merges"]
    first, last = ("".join(merges[place]) for place in (0, -1))
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    assert scores[first] == 0
    assert scores[last] <= -100
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    assert fields["tokenizer.ggml.token_type"][3] == gguf.TokenType.BYTE


# llama.cpp itself -----------------------------------------------------------------------------------------------------

RUN_IN_LLAMA_CPP = """
import json, sys
import llama_cpp.llama_cpp as library
import numpy as np
from llama_cpp import Llama

# Weights repacked for AMX end the process on some machines: github.com/ggml-org/llama.cpp/issues/20824
defaults = library.llama_model_default_params
def without_repacking():
    parameters = defaults()
    parameters.use_extra_bufts = False
    return parameters
library.llama_model_default_params = without_repacking

file, text, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = Llama(file, n_ctx=256, n_threads=1, logits_all=True, verbose=False)
found = {"tokens": model.tokenize(text.encode(), add_bos=True, special=True)}
model.eval(ids)
scores = np.array(model.scores[: len(ids)], dtype=np.float64)
scores -= scores.max(axis=1, keepdims=True)
found["logps"] = (scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))).tolist()
model.reset()
found["answer"] = [token for token, _ in zip(model.generate(ids, temp=0.0), range(8))]
print("FOUND" + json.dumps(found), flush=True)
"""


def in_llama_cpp(file: Path, text: str, ids: list[int]) -> dict[str, Any]:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    command = [sys.executable, "-c", RUN_IN_LLAMA_CPP, str(file), text, json.dumps(ids)]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "FOUND" in outcome.stdout, outcome.stderr[-2000:]
    return json.loads(outcome.stdout.partition("FOUND")[2].splitlines()[0])


TEXT = "Hello, it's 2026 and 3.14!\n\n  naïve 你好\t<b>yes</b>"


@pytest.mark.parametrize(("model", "kind"), [("tiny", "f16"), ("tiny", "q8_0"), ("pieces", "f16"), ("tiny", "q4_k_m")])
def test_it_answers_in_llama_cpp_as_in_transformers(
    tmp_path: Path, model: str, kind: str, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    if model == "tiny":
        _, adapter = base_and_adapter(tmp_path)
    else:
        base = request.getfixturevalue("shared") / "models" / "stories260K"
        adapter = save_adapter(tmp_path / "adapter", base)
    check_in_llama_cpp(export(adapter, kind, dtype="bfloat16"), {"f16": 1e-3, "q8_0": 0.02, "q4_k_m": 1.0}[kind])


def check_in_llama_cpp(result: Any, divergence: float) -> None:
    """The same tokens; KL(transformers || llama.cpp) below `divergence` everywhere; in 16 bits the same answer."""
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    merged = AutoModelForCausalLM.from_pretrained(result.model, dtype="float32")
    ids = tokenizer(TEXT).input_ids
    found = in_llama_cpp(result.gguf.file, TEXT, ids)
    assert found["tokens"] == ids
    with torch.no_grad():
        expected = merged(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    logps = torch.tensor(found["logps"], dtype=torch.float64)
    assert (expected.exp() * (expected - logps)).sum(-1).max() < divergence
    if result.gguf.kind == "f16":
        answer = merged.generate(torch.tensor([ids]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert found["answer"] == answer[0, len(ids) :].tolist()


def test_q8_0_is_byte_for_byte_that_of_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    _, adapter = base_and_adapter(tmp_path)
    ours, exact = (export(adapter, kind, dtype="bfloat16").gguf.file for kind in ("q8_0", "bf16"))
    quantize((sys.executable, "-m", "sampo_cli.llama_quantize"), exact, tmp_path / "theirs.gguf", "q8_0")
    left, right = (
        {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in gguf.GGUFReader(file).tensors}
        for file in (ours, tmp_path / "theirs.gguf")
    )
    assert left == right


@pytest.mark.real
def test_a_real_model_answers_in_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    base = Path(__file__).resolve().parents[1] / ".cache" / "demo" / "SmolLM2-135M-Instruct"
    if not base.is_dir():
        pytest.skip(f"no model in {base}: make demo")
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], r=1, lora_alpha=0.1)
    check_in_llama_cpp(export(adapter, "f16", dtype="bfloat16"), 1e-3)


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_merges_once(tmp_path: Path, sampo: Sampo) -> None:
    _, adapter = base_and_adapter(tmp_path)
    code, stdout, _ = sampo("merge", adapter, "--gguf", "q8_0", "--json")
    first = json.loads(stdout)
    assert code == 0
    assert first["merged_layers"] == 14
    assert Path(first["gguf"]["file"]) == tmp_path / "adapter-gguf" / "q8_0" / "adapter-Q8_0.gguf"
    assert first["commands"].keys() == {"vllm", "transformers", "ollama", "llama.cpp"}
    written = (tmp_path / "adapter-merged" / "model.safetensors").stat().st_mtime_ns
    code, stdout, stderr = sampo("merge", adapter, "--gguf", "f16")
    assert code == 0
    assert "was there, and is of this adapter" in stdout
    assert "merging" not in stderr
    assert (tmp_path / "adapter-merged" / "model.safetensors").stat().st_mtime_ns == written
    code, stdout, stderr = sampo("merge", adapter, "--gguf", "f16")
    assert (code, stdout) == (ExitCode.USAGE, "")
    assert "already there" in stderr
    code, _, stderr = sampo("merge", adapter, "--gguf", "bf16", "--dtype", "float32")
    assert code == ExitCode.USAGE
    assert "in bfloat16 and not float32" in stderr
    record = tmp_path / "adapter-merged" / "sampo.json"
    record.write_text(json.dumps({"adapter_sha256": "of another"}))
    code, _, stderr = sampo("merge", adapter, "--gguf", "bf16")
    assert code == ExitCode.USAGE
    assert f"{record.parent} is already there" in stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gguf", "q4_km"], "did you mean 'q4_k_m'"),
        (["--gguf", "q8_0", "--llama-cpp", "{folder}"], "no convert_hf_to_gguf.py"),
        (["--llama-cpp", "{folder}"], "--llama-cpp is for --gguf"),
        (["--adapter-only", "--gguf", "q8_0"], "--adapter-only merges nothing"),
    ],
)
def test_what_is_refused_before_merging(tmp_path: Path, sampo: Sampo, words: list[str], said: str) -> None:
    _, adapter = base_and_adapter(tmp_path)
    code, stdout, stderr = sampo("merge", adapter, *[word.format(folder=tmp_path) for word in words])
    assert (code, stdout) == (ExitCode.USAGE, "")
    assert said in stderr
    assert not (tmp_path / "adapter-merged").exists()


def test_another_architecture_wants_llama_cpp_and_keeps_the_model(tmp_path: Path) -> None:
    _, adapter = base_and_adapter(tmp_path, "gpt2")
    with pytest.raises(ModelError, match="GPT2LMHeadModel is none of Llama") as error:
        export(adapter, "q8_0")
    assert "--llama-cpp" in str(error.value.hint)
    assert (tmp_path / "adapter-merged" / "model.safetensors").is_file()
    assert not (tmp_path / "adapter-gguf").exists()


# llama.cpp's programs, or what stands for them: processes that take the same arguments --------------------------------

CONVERTER = """
import argparse, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
parser.add_argument("--outfile", type=pathlib.Path)
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0"])
parser.add_argument("--model-name")
asked = parser.parse_args()
assert (asked.model / "config.json").is_file()
asked.outfile.write_text(f"{asked.outtype} {asked.model_name}")
"""
QUANTIZER = '#!/bin/sh\necho "$3 of $(cat "$1")" > "$2"\n'


def llama_cpp_folder(folder: Path, converter: str = CONVERTER, quantizer: str = QUANTIZER) -> Path:
    (folder / "build" / "bin").mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").write_text(converter)
    program = folder / "build" / "bin" / "llama-quantize"
    program.write_text(quantizer)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


def test_converter_and_quantizer_of_a_folder(tmp_path: Path) -> None:
    _, adapter = base_and_adapter(tmp_path, "gpt2")
    result = export(adapter, "q4_k_m", dtype="bfloat16", llama_cpp=llama_cpp_folder(tmp_path / "llama.cpp"))
    assert result.gguf.file.read_text() == "Q4_K_M of bf16 adapter\n"
    assert {path.name for path in result.gguf.file.parent.iterdir()} == {"adapter-Q4_K_M.gguf", "Modelfile"}
    assert result.gguf.converter == "llama.cpp's converter"


def test_programs_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = llama_cpp_folder(tmp_path / "llama.cpp", f"#!{sys.executable}\n{CONVERTER}")
    (folder / "convert_hf_to_gguf.py").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), str(folder / "build" / "bin"), os.environ["PATH"]]))
    _, adapter = base_and_adapter(tmp_path)
    assert export(adapter, "q6_k").gguf.file.read_text() == "Q6_K of f32 adapter\n"


def test_a_tool_that_fails_leaves_nothing_but_its_reason(tmp_path: Path) -> None:
    _, adapter = base_and_adapter(tmp_path)
    folder = llama_cpp_folder(tmp_path / "llama.cpp", quantizer="#!/bin/sh\necho went wrong here >&2\nexit 3\n")
    with pytest.raises(SampoError, match=r"llama-quantize .*exit code 3.*went wrong here"):
        export(adapter, "q4_k_m", llama_cpp=folder)
    assert not (tmp_path / "adapter-gguf").exists()
    assert (tmp_path / "adapter-merged" / "config.json").is_file()


# --adapter-only -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}],
    ids=["plain", "rslora", "patterns"],
)
def test_the_exported_adapter_does_the_same(tmp_path: Path, sampo: Sampo, settings: dict[str, Any]) -> None:
    """Also read as vLLM reads it: one rank and one scale for all layers, the scale by the settings alone."""
    base, adapter = base_and_adapter(tmp_path, **settings)
    code, stdout, _ = sampo("merge", adapter, "--adapter-only", "--dtype", "float32", "--json")
    result = json.loads(stdout)
    assert code == 0
    output = Path(result["output"])
    assert output == tmp_path / "adapter-only"
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    expected = logps(PeftModel.from_pretrained(model, adapter))
    again = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    assert (logps(PeftModel.from_pretrained(again, output)) - expected).abs().max() < 1e-4
    config = json.loads((output / "adapter_config.json").read_text())
    tensors = load_file(output / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {config["r"]}
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    plain = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    for name, weight in plain.named_parameters():
        a = tensors.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        if a is not None:
            b = tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
            weight.data += scale * b @ a
    assert (logps(plain) - expected).abs().max() < 1e-4


def test_the_exported_adapter_is_in_bfloat16_and_has_the_template(tmp_path: Path) -> None:
    from sampo_cli.adapter_export import export_adapter

    base, adapter = base_and_adapter(tmp_path)
    AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
    result = export_adapter(adapter, output=tmp_path / "for vllm")
    assert {tensor.dtype for tensor in load_file(result.output / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }
    assert AutoTokenizer.from_pretrained(result.output).chat_template == tiny.CHATML
    assert result.commands["vllm"] == (
        f"vllm serve {base} --enable-lora --lora-modules 'for vllm={result.output}' --max-lora-rank 8 "
        f"--chat-template '{result.output / 'chat_template.jinja'}'"
    )


def test_an_adapter_that_float16_cannot_hold(tmp_path: Path) -> None:
    """65504 is the largest float16."""
    from sampo_cli.adapter_export import export_adapter

    _, adapter = base_and_adapter(tmp_path)
    weights = load_file(adapter / "adapter_model.safetensors")
    next(tensor for name, tensor in weights.items() if "q_proj.lora_B" in name)[0, 0] = 7e4
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"q_proj.lora_B.weight' is not finite in float16"):
        export_adapter(adapter, dtype="float16")
    assert not (tmp_path / "adapter-only").exists()
    assert export_adapter(adapter).output.is_dir()  # bfloat16 can


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "adapts an embedding"),
        ({"r": 600, "target_modules": ["q_proj"]}, "rank 600"),
    ],
)
def test_what_vllm_does_not_load_is_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    from sampo_cli.adapter_export import export_adapter

    _, adapter = base_and_adapter(tmp_path, **settings)
    with pytest.raises(ModelError, match=said) as error:
        export_adapter(adapter)
    assert "without --adapter-only" in str(error.value.hint)


@pytest.mark.slow
def test_the_commands_that_are_shown_run(tmp_path: Path, sampo: Sampo) -> None:
    """In fresh processes: transformers answers with the merged model, PEFT loads the adapter."""
    base, adapter = base_and_adapter(tmp_path)
    AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
    _, merged, _ = sampo("merge", adapter, "--json")
    _, alone, _ = sampo("merge", adapter, "--adapter-only", "--json")
    python = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    for document, program in ((merged, "transformers"), (alone, "peft")):
        command = json.loads(document)["commands"][program]
        outcome = subprocess.run(command, shell=True, capture_output=True, text=True, env=os.environ | python)
        assert outcome.returncode == 0, outcome.stderr
        assert outcome.stdout.strip()
