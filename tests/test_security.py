"""Nothing that somebody else wrote is run: weights and code, each attack for real, with a marker that it would leave.

Settings are in test_security_settings.py, paths and links in test_security_paths.py, tokens in test_secrets.py.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sampo_cli import checkpoint, hub
from sampo_cli.cli import main
from sampo_cli.config import ModelConfig
from sampo_cli.errors import ExitCode, ModelError
from sampo_cli.fingerprint import read_header
from sampo_cli.model import load_config
from sampo_cli.remote import fetch_model
from tests.hostile_files import (
    Bomb,
    Refuses,
    adapter,
    change,
    code,
    copy_of,
    good_adapter,
    good_run,
    marker,
    model,
    pickled,
    refuses,
    run,
    succeeds,
)
from tests.test_cli import train_flags

__all__ = ["adapter", "good_adapter", "good_run", "marker", "model", "refuses", "run"]  # fixtures

# Weights: safetensors, and nothing else ------------------------------------------------------------------------------


def test_the_bomb_goes_off_where_it_is_opened(marker: Path) -> None:
    """What the tests below rely on: the marker is absent because nothing was unpickled."""
    pickle.loads(pickled(marker))  # noqa: S301 - to see that it does
    assert marker.read_text() == "code of the pickle was run"


def pickle_the_weights(model: Path, marker: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickled(marker))


def pickle_the_shards(model: Path, marker: Path) -> None:
    pickle_the_weights(model, marker)
    names = dict.fromkeys(("model.norm.weight", "lm_head.weight"), "pytorch_model.bin")
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))


def pickle_by_another_name(model: Path, marker: Path) -> None:
    (model / "model.safetensors").write_bytes(pickled(marker))


def pickle_in_the_index(model: Path, marker: Path) -> None:
    pickle_the_shards(model, marker)
    (model / "pytorch_model.bin.index.json").rename(model / "model.safetensors.index.json")


def pickle_named_by_the_config(model: Path, marker: Path) -> None:
    (model / "adapter_model.bin").write_bytes(pickled(marker))
    change(model / "config.json", transformers_weights="adapter_model.bin")


def pickle_in_an_adapter_beside_it(model: Path, marker: Path) -> None:
    (model / "adapter_model.bin").write_bytes(pickled(marker))
    settings = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": str(model)}
    (model / "adapter_config.json").write_text(json.dumps(settings))


PICKLES: dict[Callable[[Path, Path], None], str] = {
    pickle_the_weights: "no model.safetensors",
    pickle_the_shards: "no model.safetensors",
    pickle_by_another_name: "not a whole safetensors file",
    pickle_in_the_index: "'pytorch_model.bin' is no safetensors file beside it",
    pickle_named_by_the_config: "its config.json names other weights, 'adapter_model.bin'",
    pickle_in_an_adapter_beside_it: "an adapter_config.json lies beside its config.json",
}


@pytest.mark.parametrize("spoil", PICKLES, ids=lambda spoil: spoil.__name__)
def test_a_pickled_model_is_refused(
    spoil: Callable[[Path, Path], None],
    model: Path,
    marker: Path,
    pairs_file: Path,
    good_adapter: Path,
    tmp_path: Path,
    refuses: Refuses,
) -> None:
    spoil(model, marker)
    assert PICKLES[spoil] in refuses(ExitCode.MODEL, *train_flags(model, pairs_file, tmp_path / "run"))
    assert PICKLES[spoil] in refuses(ExitCode.MODEL, "merge", good_adapter, "--base", model) or (
        spoil is pickle_in_an_adapter_beside_it  # there it is taken for an adapter, which has no safetensors
    )
    if spoil is not pickle_named_by_the_config:  # nothing reads that file when the model is published, nor is it sent
        refuses(ExitCode.MODEL, "push-to-hub", model, "--repo", "tester/tiny")
    assert not (tmp_path / "run").exists()
    assert not marker.exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors", "adapter_model.pt"])
def test_a_pickled_adapter_is_refused(
    name: str, tiny_llama: Path, adapter: Path, marker: Path, pairs_file: Path, tmp_path: Path, refuses: Refuses
) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / name).write_bytes(pickled(marker))
    flags = train_flags(tiny_llama, pairs_file, tmp_path / "run", "--adapter", adapter)
    for text in (
        refuses(ExitCode.MODEL, *flags),
        refuses(ExitCode.MODEL, "merge", adapter),
        refuses(ExitCode.MODEL, "push-to-hub", adapter, "--repo", "tester/tiny"),
    ):
        assert "adapter_model.safetensors" in text
    assert not marker.exists()


def test_a_pickle_beside_safetensors_is_never_opened(
    tiny_llama: Path, model: Path, adapter: Path, marker: Path, pairs_file: Path, tmp_path: Path
) -> None:
    for folder, name in ((model, "pytorch_model.bin"), (adapter, "adapter_model.bin"), (adapter, "state.pt")):
        (folder / name).write_bytes(pickled(marker))
    succeeds(*train_flags(model, pairs_file, tmp_path / "run", "--adapter", adapter, "--quiet", "--max-steps", 1))
    succeeds("merge", tmp_path / "run", "--quiet")
    plan = hub.plan(adapter, repo="tester/tiny")
    assert not {"adapter_model.bin", "state.pt"} & {file.path for file in plan.files}
    assert not marker.exists()


def test_no_flag_allows_a_pickle() -> None:
    for command in ("train", "merge", "push-to-hub"):
        with pytest.raises(SystemExit) as end:
            main([command, "x", "--allow-pickle"])
        assert end.value.code == ExitCode.USAGE


@pytest.mark.parametrize("form", ["pickle", "torch", "zip"])
def test_a_checkpoint_with_a_bomb_is_not_resumed(form: str, run: Path, marker: Path, refuses: Refuses) -> None:
    """Its seal is right: who can write the bomb can seal it."""
    for folder in checkpoint.all_checkpoints(run):
        state = folder / "state.pt"
        if form == "pickle":
            state.write_bytes(pickled(marker))
        else:
            torch.save({"progress": Bomb(marker)}, state, _use_new_zipfile_serialization=form == "zip")
        sealed = checkpoint.read_seal(folder)
        (folder / checkpoint.SEAL).unlink()
        checkpoint.seal(folder, {key: value for key, value in sealed.items() if key not in ("files", "format")})
    text = refuses(ExitCode.USAGE, "train", "--resume", run, "--max-steps", 3)
    assert "state.pt" in text
    assert not marker.exists()


def test_a_checkpoints_adapter_is_safetensors_too(run: Path, marker: Path, refuses: Refuses) -> None:
    for folder in checkpoint.all_checkpoints(run):
        (folder / "adapter_model.safetensors").write_bytes(pickled(marker))
        sealed = checkpoint.read_seal(folder)
        (folder / checkpoint.SEAL).unlink()
        checkpoint.seal(folder, {key: value for key, value in sealed.items() if key not in ("files", "format")})
    text = refuses(ExitCode.MODEL, "train", "--resume", run, "--max-steps", 3)
    assert "adapter_model.safetensors" in text
    assert not marker.exists()


def test_headers_that_lie_are_refused(tmp_path: Path) -> None:
    """Offsets before the file, beyond it or backwards, shapes and dtypes that are none, names that cannot be shown."""
    path = tmp_path / "model.safetensors"
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    lies: list[Any] = [
        *(
            {"w": {**good, "data_offsets": offsets}}
            for offsets in ([-8, 0], [8, 0], [0, 1 << 40], ["0", "8"], [0.0, 8.0])
        ),
        *({"w": {**good, "data_offsets": offsets}} for offsets in ([], [0], [0, 4, 8], None, [False, True])),
        *({"w": {**good, "shape": shape}} for shape in ([-1], "22", [[2]], [2.5], None)),
        *({"w": {**good, "dtype": dtype}} for dtype in (None, 4, ["F32"])),
        *({"w": entry} for entry in (None, [], "F32", {})),
        *({name: good} for name in ("a\nb", "\x1b[31m", "\ud800")),
        *([], None, 3, "x"),
    ]
    for header in [*lies, "[" * 5000]:
        text = header if header == "[" * 5000 else json.dumps(header)
        path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(8))
        with pytest.raises(ModelError, match="not a whole safetensors file"):
            read_header(path)
    text = json.dumps({"w": good})
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(8))
    assert [tensor.name for tensor in read_header(path)] == ["w"]


# Code that comes with a model ----------------------------------------------------------------------------------------


def give_the_model_code(model: Path, marker: Path) -> None:
    (model / "evil.py").write_text(code(marker))
    named = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilForCausalLM"}
    change(model / "config.json", model_type="evil", architectures=["EvilForCausalLM"], auto_map=named)


def give_the_tokenizer_code(model: Path, marker: Path) -> None:
    (model / "evil.py").write_text(code(marker))
    named = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
    change(model / "config.json", model_type="evil", architectures=None)
    change(model / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=named)


@pytest.mark.parametrize("spoil", [give_the_model_code, give_the_tokenizer_code])
def test_a_models_own_code_is_refused_with_the_risk(
    spoil: Callable[[Path, Path], None],
    model: Path,
    marker: Path,
    pairs_file: Path,
    good_adapter: Path,
    tmp_path: Path,
    refuses: Refuses,
) -> None:
    spoil(model, marker)
    name = (
        "evil.EvilConfig (config.json)"
        if spoil is give_the_model_code
        else "evil.EvilTokenizer (tokenizer_config.json)"
    )
    commands: list[list[object]] = [
        train_flags(model, pairs_file, tmp_path / "run"),
        [*train_flags(model, pairs_file, tmp_path / "run"), "--dry-run"],
        ["data", pairs_file, "--model", model],
    ]
    for command in commands:
        text = refuses(ExitCode.MODEL, *command)
        assert f"needs Python code of its own, {name}, which is not run" in text
        assert "runs with all your rights: read it first, then --set model.trust_remote_code=true" in text
    refuses(ExitCode.MODEL, "merge", good_adapter, "--base", model)
    assert not marker.exists()


def test_code_beside_a_model_that_transformers_knows_is_not_run(
    model: Path, marker: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """The model type is transformers' own, so the run needs no code; what lies there stays unread."""
    (model / "evil.py").write_text(code(marker))
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code(marker))
    named = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilForCausalLM"}
    change(model / "config.json", auto_map=named)
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.EvilTokenizer"]})
    succeeds(*train_flags(model, pairs_file, tmp_path / "run", "--quiet", "--max-steps", 1))
    succeeds("merge", tmp_path / "run", "--quiet")
    assert not marker.exists()


def test_only_the_flag_decides_whether_code_runs(
    model: Path, run: Path, marker: Path, pairs_file: Path, tmp_path: Path, refuses: Refuses
) -> None:
    """The same command, but for the flag; in a process of its own, as code stays imported where it was run."""
    give_the_model_code(model, marker)
    command = ["data", str(pairs_file), "--model", str(model), "--quiet"]
    refuses(ExitCode.MODEL, *command)
    refuses(ExitCode.MODEL, *command, "--set", "model.trust_remote_code=false")
    assert not marker.exists()
    flagged = [sys.executable, "-m", "sampo_cli", *command, "--set", "model.trust_remote_code=true"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(flagged, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert marker.read_text() == "code of the model was run"
    marker.unlink()
    # A recipe, a run or a checkpoint that somebody passes on cannot give the flag.
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"] |= {"trust_remote_code": True, "name": str(model)}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    said = "recipe.yaml: a file cannot switch on model.trust_remote_code"
    assert said in refuses(ExitCode.USAGE, "train", "--recipe", run / "recipe.yaml", "--output", tmp_path / "again")
    assert said in refuses(ExitCode.USAGE, "train", "--resume", run, "--max-steps", 3)
    text = refuses(ExitCode.USAGE, "merge", run)
    assert said in text
    assert "read it first, then --trust-remote-code" in text
    assert not marker.exists()


def test_a_config_that_names_a_kernel_of_the_hub_is_refused(
    model: Path, pairs_file: Path, tmp_path: Path, refuses: Refuses
) -> None:
    for values in ({"attn_implementation": "evil/kernel"}, {"_experts_implementation": {"": "evil/kernel:x"}}):
        spoiled = copy_of(model, tmp_path / next(iter(values)))
        change(spoiled / "config.json", **values)
        text = refuses(ExitCode.MODEL, *train_flags(spoiled, pairs_file, tmp_path / "run"))
        assert "in config.json names code on the Hub" in text


@pytest.mark.parametrize("value", [1e400, -1, "x", [], {}, None, True, 2**70, "\x1b[31m", [[[]]], {"": "a/b"}])
@pytest.mark.parametrize(
    "key", ["hidden_size", "rope_scaling", "quantization_config", "dtype", "auto_map", "architectures"]
)
def test_a_config_of_nonsense_ends_in_an_error_of_ours(key: str, value: object, model: Path) -> None:
    """Or is taken where it means nothing; never a traceback."""
    content = json.loads((model / "config.json").read_text()) | {key: value}
    (model / "config.json").write_text(json.dumps(content))
    said = ""
    try:
        load_config(ModelConfig(name=str(model)), fetch_model(str(model)))
    except ModelError as error:
        said = error.message
    assert "\n" not in said
    assert "\x1b" not in said
