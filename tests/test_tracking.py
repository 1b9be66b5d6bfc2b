"""Trackers, each real and read back by its own reader: the recipe, every row, the tables of the end."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sampo_cli import metrics
from sampo_cli.config import validate
from sampo_cli.run_tables import RunTable, final_tables
from sampo_cli.tracking import settings_of
from tests.warm import Outcome, Warm

STEPS = 3


@pytest.fixture
def run(warm: Warm, tiny_llama: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Train a few steps with a tracker and say how that ended. What it writes lies in `tmp_path`."""
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_PROJECT": "mine",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_HUB_OFFLINE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)  # where MLflow keeps what it is given

    def train(tracker: str, *more: object, **fault: Any) -> Outcome:
        if find_spec(tracker) is None:
            pytest.skip(f"{tracker} is not installed")
        flags = ("--data", pairs_file, "--output", tmp_path / "run", "--batch-pairs", 4, "--max-steps", STEPS)
        answers = ("--set", "train.generate.prompts=1", "--set", "train.generate.max_new_tokens=2")
        outcome = warm.run(
            "train", "--model", tiny_llama, *flags, *answers, "--eval-fraction", 0.2, "--beta", 0.3, "--json",
            "--report-to", tracker, *more, **fault,
        )  # fmt: skip
        if outcome.code == 0:
            assert json.loads(outcome.stdout)["state"] == "finished", "stdout is one document, whatever a tracker says"
        return outcome

    return train


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in metrics.read(folder / "run" / "metrics.jsonl") if row["kind"] == "train"]


def test_tensorboard(run: Any, tmp_path: Path) -> None:
    assert run("tensorboard").code == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in (tmp_path / "run").rglob("events.out.*") if path.parent.name == "sampo"}
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(tmp_path))
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "beta: 0.3" in texts["recipe/text_summary"]
    held_out = texts["tables/held_out/text_summary"]
    loss = metrics.read(tmp_path / "run" / "metrics.jsonl")
    (evaluation,) = [row for row in loss if row["kind"] == "eval"]
    assert f"| loss | {evaluation['loss']:.6g} |" in held_out
    assert "| chosen is | pairs | accuracy | as DPO's sum |" in texts["tables/accuracy_by_length/text_summary"]
    assert "| prompt | base | answer |" in texts["tables/answers/text_summary"]


def leveldb_log(data: bytes) -> Iterator[bytes]:
    """The records of a log file in LevelDB's format behind W&B's header of 7 bytes.

    Blocks of 32 KiB hold pieces: checksum (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last).
    """
    block, header = 2**15, struct.Struct("<IHB")
    place, record = 7, b""
    while place + header.size <= len(data):
        if block - place % block < header.size:  # a header is never split
            place += block - place % block
            continue
        _, length, kind = header.unpack_from(data, place)
        record += data[place + header.size : place + header.size + length]
        place += header.size + length
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb_offline(run: Any, tmp_path: Path) -> None:
    """The file that `wandb sync` would send, in W&B's own messages."""
    outcome = run("wandb")
    assert outcome.code == 0, outcome.stderr
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    records = [Record.FromString(data) for data in leveldb_log(file.read_bytes())]
    started = next(record.run for record in records if record.HasField("run"))
    assert (started.project, started.display_name) == ("mine", "run")
    config = {item.key: json.loads(item.value_json) for r in records for item in r.config.update}
    config |= {item.key: json.loads(item.value_json) for r in records for item in r.run.config.update}
    assert config["method.beta"] == 0.3
    assert config["train.generate.max_new_tokens"] == 2
    logged: dict[str, list[Any]] = {}
    for record in records:
        for item in record.history.item:
            logged.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    assert logged["train/loss"] == pytest.approx(losses(tmp_path))
    assert logged["tables/held_out/_type"] == ["table-file"]
    (written,) = (file.parent / "files" / "media" / "table" / "tables").glob("held_out*.table.json")
    rows = dict(json.loads(written.read_text())["data"])
    assert rows["step"] == STEPS
    (ended,) = [record.exit.exit_code for record in records if record.HasField("exit")]
    assert ended == 0


def test_mlflow(run: Any, tmp_path: Path) -> None:
    outcome = run("mlflow")
    assert outcome.code == 0, outcome.stderr
    import mlflow

    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("sampo")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params["method.beta"] == "0.3"
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == list(enumerate(losses(tmp_path), 1))
    folder = Path(client.download_artifacts(found.info.run_id, ".", str(tmp_path)))
    assert "beta: 0.3" in (folder / "recipe.yaml").read_text()
    table = json.loads((folder / "tables" / "held_out.json").read_text())
    assert dict(table["data"])["step"] == STEPS


def test_trackio(run: Any, tmp_path: Path) -> None:
    outcome = run("trackio")
    assert outcome.code == 0, outcome.stderr
    with sqlite3.connect(tmp_path / "trackio" / "sampo.db") as database:
        rows = [json.loads(text) for (text,) in database.execute("SELECT metrics FROM metrics ORDER BY id")]
        (config,) = [json.loads(text) for (text,) in database.execute("SELECT config FROM configs")]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == pytest.approx(losses(tmp_path))
    assert config["method.beta"] == 0.3
    (table,) = [row["tables/pairs"] for row in rows if "tables/pairs" in row]
    assert {"pairs": "kept", "number": 24} in table["_value"]


def test_a_run_that_failed_is_shown_as_that(run: Any) -> None:
    """Weights that are not finite after the first step: exit code 6."""
    outcome = run("mlflow", "--learning-rate", 1e30)
    assert outcome.code == 6, outcome.stderr
    import mlflow

    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (found,) = client.search_runs([client.get_experiment_by_name("sampo").experiment_id])
    assert found.info.status == "FAILED"


def test_a_tracker_that_does_not_start(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://")
    outcome = run("mlflow")
    assert outcome.code == 2
    assert "error: --report-to mlflow: " in outcome.stderr
    assert "hint: check MLFLOW_TRACKING_URI, or train without it" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_settings_are_plain_and_by_name() -> None:
    """Nested keys by dots, lists as text, numbers as numbers; what is empty is left out."""
    recipe = validate({"model": {"name": "m"}, "data": {"sources": ["a", "b"], "columns": {"prompt": "question"}}})
    settings = settings_of(recipe)
    assert settings["data.sources"] == "a, b"
    assert settings["data.columns.prompt"] == "question"
    assert settings["train.early_stopping.patience"] == 3
    assert settings["model.trust_remote_code"] is False
    assert not {"method.beta", "train.early_stopping.metric"} & set(settings)
    assert {type(value) for value in settings.values()} == {str, int, float, bool}


def test_tables_of_a_run(tmp_path: Path) -> None:
    """Two rounds of which the second is the evaluation; the newest answer to a prompt; cells that stay cells."""
    bucket = {"name": "as long", "pairs": 4, "accuracy": 0.75}
    evaluation = {
        "kind": "eval", "step": 8, "loss": 0.5, "accuracy": 0.75, "margin": 1.0,
        "length_bias": {"spearman": None, "buckets": [bucket]},
        "sum_length_bias": {"spearman": 0.1, "buckets": [bucket | {"accuracy": 0.5}]},
    }  # fmt: skip
    answers = [{"prompt": "a|b", "base": "x\ny", "answer": text, "base_tokens": 2, "tokens": 1} for text in "no"]
    (tmp_path / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    first = {"loss": 0.6, "accuracy": 0.5, "margin": 0.5}
    summary = {"evaluation": evaluation, "rounds": [first], "pairs": {"rows": 9, "dropped": {"empty": 1}}}
    tables = {table.name: table for table in final_tables(summary, tmp_path)}
    assert ("loss", 0.5) in tables["held_out"].rows
    assert tables["accuracy_by_length"].rows == [("as long", 4, 0.75, 0.5)]
    assert tables["rounds"].rows == [(1, 0.6, 0.5, 0.5), (2, 0.5, 0.75, 1.0)]
    assert tables["pairs"].rows == [("rows", 9), ("dropped.empty", 1)]
    assert tables["answers"].rows == [("a|b", "x\ny", "o", 2, 1)]
    assert tables["answers"].markdown().splitlines()[2] == r"| a\|b | x y | o | 2 | 1 |"
    assert final_tables({"evaluation": None, "rounds": [], "pairs": {}}, tmp_path / "none") == []


def test_a_table_by_column_and_by_row() -> None:
    table = RunTable("t", ("a", "b"), [(1, "x"), (2, None)])
    assert table.by_column() == {"a": [1, 2], "b": ["x", None]}
    assert table.by_row() == [{"a": 1, "b": "x"}, {"a": 2, "b": None}]
