"""Files made to do harm where they are opened, good ones to put them into, and a marker that their code would write.

Fixtures are taken by importing their names.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sampo_cli.cli import main
from sampo_cli.errors import ExitCode
from tests import tiny
from tests.merge_models import save_adapter
from tests.test_cli import refuses, train_flags

Refuses = Callable[..., str]

__all__ = ["adapter", "good_adapter", "good_run", "marker", "model", "refuses", "run"]  # fixtures


class Bomb:
    """Writes `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Path, str]]:
        return Path.write_text, (self.marker, "code of the pickle was run")


def pickled(marker: Path) -> bytes:
    """A checkpoint as torch saved it before safetensors, with a bomb among its tensors."""
    return pickle.dumps({"model.norm.weight": Bomb(marker)})


def code(marker: Path) -> str:
    """A Python module that writes `marker` when it is imported, with everything that a model's own code may define."""
    return (
        f"open({str(marker)!r}, 'w').write('code of the model was run')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class EvilConfig(LlamaConfig): model_type = 'evil'\n"
        "class EvilForCausalLM(LlamaForCausalLM): config_class = EvilConfig\n"
        "class EvilTokenizer(PreTrainedTokenizerFast): pass\n"
        "def generate(model, *args, **kwargs): return None\n"
    )


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; a value of None takes the key away."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    content = {key: value for key, value in {**content, **values}.items() if value is not None}
    path.write_text(json.dumps(content))


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything below a folder: what a hostile file could have changed."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that every attack here would write."""
    return tmp_path / "pwned"


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be spoiled."""
    return copy_of(tiny_llama, tmp_path / "model")


@pytest.fixture(scope="module")
def good_adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("good") / "adapter", tiny_llama)


@pytest.fixture
def adapter(good_adapter: Path, tmp_path: Path) -> Path:
    """A copy of an adapter on the tiny model, to be spoiled."""
    return copy_of(good_adapter, tmp_path / "adapter")


@pytest.fixture(scope="module")
def good_run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("good")
    data = tiny.write_pairs(folder / "pairs.jsonl", 24)
    flags = train_flags(tiny_llama, data, folder / "run", "--quiet", "--max-steps", 2, "--save-every", 1)
    with pytest.raises(SystemExit) as end:
        main([str(flag) for flag in flags])
    assert end.value.code == ExitCode.OK
    return folder / "run"


@pytest.fixture
def run(good_run: Path, tmp_path: Path) -> Path:
    """A copy of a run, to be spoiled."""
    return copy_of(good_run, tmp_path / "run")


def succeeds(*arguments: object) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == ExitCode.OK
