"""Checkpoints: there whole or not at all, damage is found, and what is resumed is the same run or none."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sampo_cli import checkpoint, metrics
from sampo_cli.disk import folder_bytes
from sampo_cli.errors import ExitCode, UsageError
from sampo_cli.plan import is_free
from sampo_cli.signals import StopRequest
from sampo_cli.state import checkpoint_bytes, load_state
from tests import tiny
from tests.reliability import record
from tests.test_trainer import make_recipe, make_trainer
from tests.warm import Outcome, Warm


def make_checkpoint(run: Path, step: int) -> Path:
    """A folder with the names of a checkpoint's files and a seal; contents of no meaning."""
    folder = checkpoint.step_folder(run, step)
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(bytes(range(200)))
    (folder / "adapter_model.safetensors").write_bytes(b"weights" * 10)
    (folder / "best").mkdir()
    (folder / "best" / "adapter_model.safetensors").write_bytes(b"better")
    checkpoint.seal(folder, {"step": step})
    return folder


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    """Half-written folders go; the old one of a replacement that broke off between its two renames comes back."""
    run = tmp_path / "run"
    one, two = make_checkpoint(run, 1), make_checkpoint(run, 2)
    two.rename(two.with_name(".step-000002.old"))
    for name in (".step-000002.tmp", ".step-000003.tmp", ".step-000001.old"):
        (one.parent / name).mkdir()
        (one.parent / name / "state.pt").write_bytes(b"half")
    (run / ".best.tmp").mkdir()
    (run / ".summary.json.tmp").write_text('{"sta')
    (run / "notes.tmp").write_text("somebody's own")
    checkpoint.tidy_run(run)
    assert sorted(path.name for path in one.parent.iterdir()) == ["step-000001", "step-000002"]
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "notes.tmp"]
    assert checkpoint.damage(two) is None
    assert checkpoint.damage(one) is None


def test_a_folder_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    target = tmp_path / "best"
    with checkpoint.whole_folder(target) as aside:
        (aside / "a").write_text("first")
    with pytest.raises(IsADirectoryError), checkpoint.whole_folder(target) as aside:
        aside.write_text("second")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert (target / "a").read_text() == "first"
    with checkpoint.whole_folder(target) as aside:
        (aside / "b").write_text("third")
    assert [path.name for path in target.iterdir()] == ["b"]


def truncate(folder: Path) -> None:
    with (folder / "state.pt").open("r+b") as file:
        file.truncate(100)


def flip(folder: Path) -> None:
    with (folder / "state.pt").open("r+b") as file:
        file.seek(77)
        file.write(b"\xff")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated state": (truncate, "state.pt has 100 bytes, and had 200 when it was written"),
    "empty weights": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
        "adapter_model.safetensors has 0 bytes",
    ),
    "missing file": (lambda folder: (folder / "state.pt").unlink(), "state.pt is missing"),
    "missing best": (lambda folder: shutil.rmtree(folder / "best"), "best/adapter_model.safetensors is missing"),
    "one byte": (flip, "state.pt is not what was written"),
    "no seal": (lambda folder: (folder / "checkpoint.json").unlink(), "no checkpoint.json"),
    "half a seal": (lambda folder: (folder / "checkpoint.json").write_text('{"form'), "cannot be read"),
    "empty seal": (lambda folder: (folder / "checkpoint.json").write_text(""), "cannot be read"),
    "another seal": (lambda folder: (folder / "checkpoint.json").write_text("[1]"), "not a checkpoint's seal"),
    "a seal of nothing": (
        lambda folder: (folder / "checkpoint.json").write_text('{"format": 2, "files": 3}'),
        "not a checkpoint's seal",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_never_picked(tmp_path: Path, kind: str) -> None:
    damage, words = DAMAGES[kind]
    older, newest = (make_checkpoint(tmp_path, step) for step in (1, 2))
    assert checkpoint.find(tmp_path) == (tmp_path, newest)
    damage(newest)
    assert words in (checkpoint.damage(newest) or "")
    assert checkpoint.find(tmp_path) == (tmp_path, older)
    with pytest.raises(UsageError, match="is damaged"):
        checkpoint.find(newest)
    damage(older)
    with pytest.raises(UsageError, match="no whole checkpoint") as caught:
        checkpoint.find(tmp_path)
    assert caught.value.message.count(words) == 2


def test_only_what_a_run_without_checkpoint_left_is_free(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert not is_free(run)
    run.mkdir()
    assert is_free(run)
    (run / ".lock").touch()
    (run / "recipe.yaml").touch()
    assert is_free(run)
    (run / "thesis.txt").touch()
    assert not is_free(run)
    (run / "thesis.txt").unlink()
    make_checkpoint(run, 1)
    assert not is_free(run)
    own = tmp_path / "own"
    own.mkdir()
    (own / "recipe.yaml").touch()
    assert not is_free(own)


def test_a_checkpoint_is_adapter_and_optimizer(tiny_llama: Path, tmp_path: Path) -> None:
    """Small enough for a preemption notice of seconds; what is planned for is what it takes, and not less."""
    trainer = make_trainer(make_recipe(tiny_llama, train={"max_steps": 1}), tmp_path / "run")
    trainer.fit(StopRequest())
    taken = folder_bytes(checkpoint.find(tmp_path / "run")[1])
    parameters = sum(parameter.numel() for parameter in trainer.parameters)
    assert 12 * parameters < taken < checkpoint_bytes(trainer.machinery) < 12 * parameters + 2**17


@pytest.mark.long
def test_a_checkpoint_of_an_8b_models_adapter_takes_seconds(tiny_llama: Path, tmp_path: Path) -> None:
    """As many trainable parameters as rank 16 on all layers of Llama-3-8B has, on the disk for certain."""
    trainer = make_trainer(make_recipe(tiny_llama, train={"max_steps": 1}, lora={"r": 20_480}), tmp_path / "run")
    trainer.fit(StopRequest())
    parameters = sum(parameter.numel() for parameter in trainer.parameters)
    assert parameters == 41_943_040
    began = time.monotonic()
    trainer.save()
    seconds = time.monotonic() - began
    taken = folder_bytes(checkpoint.find(tmp_path / "run")[1])
    assert seconds < 30
    record(f"{parameters:,} parameters, {taken / 1e6:,.0f} MB: {seconds:.1f} s until it is on the disk")


# Through the command line ---------------------------------------------------------------------------------------------

FLAGS = (
    *("--batch-pairs", 4, "--max-steps", 4, "--save-every", 1, "--eval-fraction", 0.2, "--quantization", "none"),
    *("--set", "train.keep_checkpoints=4", "--set", "train.eval_every=2", "--set", "model.dtype=float32"),
)


@pytest.fixture(scope="module")
def parts(warm: Warm, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, pairs, and a run of four steps on them that has all its checkpoints."""
    home = tmp_path_factory.mktemp("parts")
    shutil.copytree(tiny_llama, home / "model")
    data = tiny.write_pairs(home / "pairs.jsonl", 24)
    outcome = warm.run("train", "--model", home / "model", "--data", data, *FLAGS, "--output", home / "run")
    assert outcome.code == 0, outcome.stderr
    return home


@pytest.fixture
def home(parts: Path, tmp_path: Path) -> Path:
    """The same again, to be spoilt: everything lies where it lay, as a recipe has whole paths."""
    kept = tmp_path / "kept"
    shutil.copytree(parts, kept)
    yield parts
    shutil.rmtree(parts)
    kept.rename(parts)


def resume(warm: Warm, run: Path, *more: object) -> Outcome:
    return warm.run("train", "--resume", run, *more)


def refused(outcome: Outcome, code: ExitCode = ExitCode.USAGE) -> str:
    assert outcome.code == code, outcome.stderr
    assert "Traceback" not in outcome.stderr
    return outcome.stderr


def result(run: Path) -> tuple[bytes, list[float]]:
    losses = [row["loss"] for row in metrics.read(run / "metrics.jsonl")]
    return (run / "adapter" / "adapter_model.safetensors").read_bytes(), losses


@pytest.mark.parametrize("kind", ["truncated state", "empty weights", "missing file"])
def test_the_one_before_a_damaged_one_is_used_with_a_warning(warm: Warm, home: Path, kind: str) -> None:
    before = result(home / "run")
    DAMAGES[kind][0](home / "run" / "checkpoints" / "step-000004")
    outcome = resume(warm, home / "run")
    assert outcome.code == 0, outcome.stderr
    assert "warning: the checkpoint step-000004 is damaged, and step-000003 is used: " in outcome.stderr
    assert "resuming after step 3" in outcome.stderr
    assert result(home / "run") == before
    assert "is damaged" in (home / "run" / "run.log").read_text()
    record(f"{kind}: the one before, bitwise")


@pytest.mark.parametrize("number", [1, 99])
def test_another_format_is_refused_by_name(warm: Warm, home: Path, number: int) -> None:
    seal = home / "run" / "checkpoints" / "step-000004" / "checkpoint.json"
    seal.write_text(json.dumps(json.loads(seal.read_text()) | {"format": number}))
    text = refused(resume(warm, home / "run"))
    assert f"a checkpoint of format {number}, and this sampo reads 2" in text


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/sampo-was-here"),))


def test_a_state_that_would_run_code_is_refused(warm: Warm, home: Path) -> None:
    """Even with a seal that fits: nothing of it is run."""
    folder = home / "run" / "checkpoints" / "step-000004"
    facts = json.loads((folder / "checkpoint.json").read_text())
    mark = Path("/tmp/sampo-was-here")
    mark.unlink(missing_ok=True)
    torch.save({"progress": {}, "optimizer": Hostile()}, folder / "state.pt")
    (folder / "checkpoint.json").unlink()
    checkpoint.seal(folder, {key: facts[key] for key in ("step", "identity", "recipe")})
    assert checkpoint.damage(folder) is None
    text = refused(resume(warm, home / "run"))
    assert "state.pt: not the state of a run: it holds more than numbers, texts and tensors" in text
    assert "step-000003" not in text
    assert not mark.exists()
    record("a pickle with code: refused, not run")


def test_a_state_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 1)
    with pytest.raises(UsageError, match="not the state of a run"):
        load_state(folder, {})
    torch.save({"progress": {"stepp": 1}}, folder / "state.pt")
    with pytest.raises(UsageError, match=r"not the state of a run: .*stepp"):
        load_state(folder, {})


# Another run ----------------------------------------------------------------------------------------------------------


def test_another_recipe_is_refused_with_the_differences(warm: Warm, home: Path) -> None:
    run = home / "run"
    text = refused(resume(warm, run, "--beta", 0.5, "--batch-pairs", 8, "--epochs", 9))
    assert "  method.beta: 0.1 → 0.5\n" in text
    assert "  train.batch_pairs: 4 → 8\n" in text
    assert "  train.epochs" not in text
    assert "allowed: " in text
    assert "train.save_every" in text
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["train"]["seed"] = 7
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "  train.seed: 42 → 7\n" in refused(resume(warm, run))
    record("another recipe, by flags or by hand: each key with old and new value")


def other_weights(home: Path) -> None:
    path = home / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(weights, path, {"format": "pt"})


def other_tokenizer(home: Path) -> None:
    path = home / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"][0]["content"] = "<|nothing|>"
    tokenizer["model"]["merges"].pop()
    path.write_text(json.dumps(tokenizer))


def other_template(home: Path) -> None:
    path = home / "model" / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>\n", "<|im_end|>\n\n"))


def other_data(home: Path) -> None:
    tiny.write_pairs(home / "pairs.jsonl", 25)


OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights": (other_weights, "cannot resume: the base changed since step-000004:"),
    "tokenizer": (other_tokenizer, "  the tokenizer: "),
    "template": (other_template, "  the chat template: "),
    "data": (other_data, "  the data: 24 pairs, "),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_parts_are_refused_with_the_differences(warm: Warm, home: Path, what: str) -> None:
    change, words = OTHERS[what]
    before = {path: path.stat().st_mtime_ns for path in (home / "run").rglob("*") if path.is_file()}
    change(home)
    text = refused(resume(warm, home / "run"))
    assert words in text
    assert " → " in text
    assert "put back what was there" in text
    after = {path: path.stat().st_mtime_ns for path in (home / "run").rglob("*") if path.is_file()}
    assert after == before
    record(f"another {what}: refused, nothing written")


def test_another_adapter_to_go_on_from_is_refused(warm: Warm, home: Path) -> None:
    """It is the reference: a run that goes on with another one would compare with something else."""
    parts = ("--model", home / "model", "--data", home / "pairs.jsonl", "--adapter", home / "run" / "adapter")
    outcome = warm.run("train", *parts, *FLAGS, "--output", home / "second")
    assert outcome.code == 0, outcome.stderr
    path = home / "run" / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path)
    assert "the adapter that it goes on from changed" in refused(resume(warm, home / "second"))


def test_harmless_changes_are_allowed_and_recorded(warm: Warm, home: Path) -> None:
    run = home / "run"
    outcome = resume(warm, run, "--max-steps", 6, "--save-every", 3)
    assert outcome.code == 0, outcome.stderr
    outcome = resume(warm, run, "--set", "train.on_nonfinite=skip")
    assert outcome.code == 0, outcome.stderr
    assert json.loads((run / "summary.json").read_text())["resumed"] == [
        {"step": 4, "changed": {"train.max_steps": [4, 6], "train.save_every": [1, 3]}},
        {"step": 6, "changed": {"train.on_nonfinite": ["stop", "skip"]}},
    ]
    assert "  changed: train.max_steps: 4 → 6\n" in (run / "run.log").read_text()
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["save_every"] == 3


def test_a_lost_round_is_found(warm: Warm, home: Path) -> None:
    """The reference of the second round lies in rounds/; without it the run would compare with another model."""
    parts = ("--model", home / "model", "--data", home / "pairs.jsonl", "--iterations", 2)
    outcome = warm.run("train", *parts, *FLAGS, "--max-steps", 2, "--output", home / "second")
    assert outcome.code == 0, outcome.stderr
    path = home / "second" / "rounds" / "round-1" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert "the reference of this round is damaged" in refused(resume(warm, home / "second"))


def test_rounds_keep_their_length_once_the_second_has_begun(warm: Warm, home: Path) -> None:
    parts = ("--model", home / "model", "--data", home / "pairs.jsonl", "--iterations", 2)
    outcome = warm.run("train", *parts, *FLAGS, "--max-steps", 2, "--output", home / "second")
    assert outcome.code == 0, outcome.stderr
    text = refused(resume(warm, home / "second", "--max-steps", 5))
    assert "after step 4 the run was in round 2, which would now be steps 6 to 10" in text
    outcome = resume(warm, home / "second" / "checkpoints" / "step-000002", "--max-steps", 3)
    assert outcome.code == 0, outcome.stderr
    assert metrics.read(home / "second" / "metrics.jsonl")[-1]["step"] == 6
