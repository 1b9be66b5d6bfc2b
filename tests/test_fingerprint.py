"""The fingerprint of a base: the same for the same weights, another for every other model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sampo_cli.errors import ModelError
from sampo_cli.fingerprint import read_header, weight_files, weights_fingerprint
from tests.merge_models import save_base
from tests.tiny import CONFIGS


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", CONFIGS["llama"]())


def test_equal_wherever_and_however_it_lies(tmp_path: Path, base: Path) -> None:
    expected = weights_fingerprint(base)
    assert len(expected) == 32
    assert int(expected, 16) >= 0
    assert weights_fingerprint(shutil.copytree(base, tmp_path / "copy")) == expected
    assert weights_fingerprint(save_base(tmp_path / "cut", CONFIGS["llama"](), max_shard_size="40KB")) == expected
    (base / "consolidated.safetensors").write_bytes(b"another layout of the same weights")
    assert weights_fingerprint(base) == expected


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "model.norm.weight"])
def test_one_changed_layer_is_another_model(base: Path, name: str) -> None:
    before = weights_fingerprint(base)
    weights = load_file(base / "model.safetensors")
    save_file({**weights, name: weights[name] + 1e-3}, base / "model.safetensors")
    assert weights_fingerprint(base) != before


def test_large_tensors_are_sampled_at_both_ends_and_in_the_middle(base: Path) -> None:
    # 40,000 bytes: samples of 4096 at 0, 17952 and 35904. Element 9000 (byte 36000) is seen, element 3000 is not.
    def fingerprint(changed: int | None) -> str:
        tensor = torch.zeros(10_000)
        if changed is not None:
            tensor[changed] = 1
        save_file({"w": tensor}, base / "model.safetensors")
        return weights_fingerprint(base)

    assert fingerprint(9000) != fingerprint(None)
    assert fingerprint(5000) != fingerprint(None)
    assert fingerprint(3000) == fingerprint(None)


def test_dtype_and_architecture_count(base: Path) -> None:
    before = weights_fingerprint(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    assert weights_fingerprint(base) != before
    (base / "config.json").write_text(json.dumps({**config, "use_cache": False}))
    assert weights_fingerprint(base) == before
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, base / "model.safetensors")
    assert weights_fingerprint(base) != before


def test_header(base: Path) -> None:
    save_file({"b": torch.zeros(2, 3, dtype=torch.bfloat16), "a": torch.ones(5)}, base / "model.safetensors")
    first, second = read_header(weight_files(base)[0])
    # float32 comes before bfloat16 in the file: 20 bytes, then 12.
    assert (first.name, first.dtype, first.shape, first.end - first.begin) == ("a", "F32", (5,), 20)
    assert (second.name, second.dtype, second.elements, second.end - second.begin) == ("b", "BF16", 6, 12)
    assert second.end == (base / "model.safetensors").stat().st_size


def test_what_is_missing_or_broken(base: Path) -> None:
    path = base / "model.safetensors"
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:5], b"\xff" * 100, b"\x02" + b"\0" * 7 + b"[]"):
        path.write_bytes(broken)
        with pytest.raises(ModelError, match="not a whole safetensors file"):
            weights_fingerprint(base)
    path.unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors and no"):
        weights_fingerprint(base)
    (base / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        weights_fingerprint(base)
