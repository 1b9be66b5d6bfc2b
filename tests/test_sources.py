"""Every kind of source, and every way in which one can be broken."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from sampo_cli.errors import DataError, HubError
from tests.test_data import EXPECTED, ROWS, answers, empty_cache, lines, read, tokenizer

__all__ = ["empty_cache", "tokenizer"]  # fixtures


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def pack(path: Path) -> Path:
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


def write(path: Path) -> None:
    {
        ".jsonl": lambda: path.write_text(lines(ROWS)),
        ".json": lambda: path.write_text(json.dumps(ROWS, indent=1)),
        ".csv": lambda: write_csv(path),
        ".parquet": lambda: write_parquet(path),
    }[path.suffix]()


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("name", "place"),
    [("a.jsonl", ":2"), ("a.json", " row 2"), ("a.csv", ":3"), ("a.parquet", " row 2")],
)
def test_file_formats(tmp_path: Path, tokenizer: Any, name: str, place: str, packed: bool) -> None:
    path = tmp_path / name
    write(path)
    path = pack(path) if packed else path
    dataset = read(tokenizer, path)
    assert answers(tokenizer, dataset) == EXPECTED
    assert dataset.location(1) == f"{path}{place}"
    assert dataset.pair_ids.tolist() == [0, 1, 2, 3, 4]


def test_json_lines_under_the_name_json(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.json").write_text("\n" + lines(ROWS))
    dataset = read(tokenizer, tmp_path / "a.json")
    assert answers(tokenizer, dataset) == EXPECTED
    assert dataset.location(0) == f"{tmp_path / 'a.json'}:2"


def test_array_larger_than_the_block_that_is_read(tmp_path: Path, tokenizer: Any) -> None:
    rows = [row | {"extra": "x" * 700_000} for row in ROWS]
    (tmp_path / "a.json").write_text(" " + json.dumps(rows))
    assert answers(tokenizer, read(tokenizer, tmp_path / "a.json")) == EXPECTED


def test_byte_order_mark_crlf_and_blank_lines(tmp_path: Path, tokenizer: Any) -> None:
    text = "\ufeff" + lines(ROWS).replace("\n", "\r\n\r\n")
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbfprompt,chosen,rejected\r\n\r\nquestion,yes,no\r\n")
    dataset = read(tokenizer, tmp_path / "a.jsonl", tmp_path / "b.csv")
    assert answers(tokenizer, dataset) == [*EXPECTED, "yes<|im_end|>"]
    assert [dataset.location(i).rpartition(":")[2] for i in (1, 5)] == ["3", "3"]


# -- folders and the Hub ------------------------------------------------------------------------------------------


def test_folder(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "data.set"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train-00000-of-00002.jsonl").write_text(lines(ROWS[:2]))
    (folder / "data" / "train-00001-of-00002.jsonl").write_text(lines(ROWS[2:]))
    (folder / "data" / "test-00000-of-00001.jsonl").write_text(lines(ROWS[:1]))
    dataset = read(tokenizer, folder)
    assert answers(tokenizer, dataset) == EXPECTED
    assert dataset.location(2) == f"{folder}/data/train-00001-of-00002.jsonl:1"
    assert answers(tokenizer, read(tokenizer, f"{folder}:test")) == EXPECTED[:1]
    with pytest.raises(DataError, match="no split 'dev'; it has test, train"):
        read(tokenizer, f"{folder}:dev")


def test_folder_whose_readme_lists_configs(tmp_path: Path, tokenizer: Any) -> None:
    for config in ("short", "long"):
        (tmp_path / config).mkdir()
    write_parquet(tmp_path / "short" / "a.parquet", ROWS[:2])
    write_parquet(tmp_path / "long" / "b.parquet", ROWS[2:])
    configs = [
        {"config_name": name, "data_files": [{"split": "train_prefs", "path": f"{name}/*.parquet"}]}
        for name in ("short", "long")
    ]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n# Pairs\n")
    assert answers(tokenizer, read(tokenizer, f"{tmp_path}:long:train_prefs")) == EXPECTED[2:]
    with pytest.raises(DataError, match=r"Config name is missing.*short.*long"):
        read(tokenizer, tmp_path)
    with pytest.raises(DataError, match="nothing"):
        read(tokenizer, f"{tmp_path}:nothing:train")
    configs = [{"config_name": "out", "data_files": "../*.parquet"}]
    inner = tmp_path / "inner"
    inner.mkdir()
    write_parquet(tmp_path / "secret.parquet")
    (inner / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    with pytest.raises(DataError, match="outside"):
        read(tokenizer, inner)


@pytest.mark.parametrize("content", [{}, {"notes.txt": "hello"}, {"README.md": "---\nconfigs: {{{\n---\n"}])
def test_folder_without_data(tmp_path: Path, tokenizer: Any, content: dict[str, str]) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_text(text)
    with pytest.raises(DataError, match="empty"):
        read(tokenizer, folder)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache with one data set in it, and no network."""
    from huggingface_hub import constants

    cache = tmp_path / "home" / ".cache" / "hub"
    repo = cache / "datasets--Intel--orca_dpo_pairs"
    commit = "0123456789abcdef0123456789abcdef01234567"
    for folder in ("refs", "blobs", f"snapshots/{commit}"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    rows = [
        {"system": "", "question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in ROWS
    ]
    (repo / "blobs" / "abc").write_text(lines(rows))
    (repo / "snapshots" / commit / "orca_rlhf.jsonl").symlink_to("../../blobs/abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


@pytest.mark.usefixtures("hub_cache")
def test_hub_offline_from_a_filled_cache(tokenizer: Any) -> None:
    dataset = read(tokenizer, "Intel/orca_dpo_pairs")
    assert answers(tokenizer, dataset) == EXPECTED
    assert dataset.location(4) == "Intel/orca_dpo_pairs row 5"
    assert answers(tokenizer, read(tokenizer, "Intel/orca_dpo_pairs:train")) == EXPECTED
    with pytest.raises(HubError, match="Intel/something_else"):
        read(tokenizer, "Intel/something_else")


# -- what is broken -------------------------------------------------------------------------------------------------


GOOD = json.dumps(ROWS[0]).encode()
BROKEN: list[Any] = [
    pytest.param(
        "a.jsonl", GOOD + b'\n{"prompt": "a", "ch', r":2:\d+: not JSON: Unterminated string", id="half-a-line"
    ),
    pytest.param("a.jsonl", GOOD + b"\n\n{]\n", r":3:2: not JSON", id="bad-line"),
    pytest.param("a.jsonl", GOOD + b'\n{"prompt": "\xff\xfe"}\n', r":2:13: not UTF-8", id="bad-bytes"),
    pytest.param("a.jsonl", GOOD + b"\n[1, 2]\n", r":2: not an object: it is list", id="not-an-object"),
    pytest.param("a.jsonl", b"[" * 100_000, r":1:1: maximum recursion", id="deep"),
    pytest.param("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}", r":1:1: Exceeds the limit", id="long-number"),
    pytest.param("a.csv", b"prompt,chosen,rejected\na,b,c\na,b\n", r":3: 2 fields, but the header has 3", id="ragged"),
    pytest.param("a.csv", b'prompt,chosen,rejected\na,b,"c\n', r":2: not CSV: unexpected end of data", id="open-quote"),
]
UNREADABLE: list[Any] = [
    pytest.param("a.jsonl", b"", "it is empty", id="empty"),
    pytest.param("a.json", b"", "it is empty", id="empty-json"),
    pytest.param("a.json", b"[]", "it is empty", id="empty-array"),
    pytest.param("a.csv", b"", "it is empty", id="empty-csv"),
    pytest.param("a.csv", b"prompt,chosen,rejected\n", "it is empty", id="header-only"),
    pytest.param("a.csv", b"prompt,prompt\na,b\n", "two columns have one name", id="two-columns"),
    pytest.param("a.csv", b"prompt,chosen,rejected\n\xff\xfe,b,c\n", "not UTF-8", id="csv-bytes"),
    pytest.param("a.json", b"[" + GOOD + b", {", "row 2: not JSON", id="half-an-array"),
    pytest.param("a.json", b"[" + GOOD, "row 2: not JSON", id="open-array"),
    pytest.param("a.json", b"[" + GOOD + b', {"a": "\xff"}]', "not UTF-8", id="array-bytes"),
    pytest.param("a.parquet", b"PAR1 no", "not Parquet", id="not-parquet"),
    pytest.param("a.parquet", b"", "not Parquet", id="empty-parquet"),
    pytest.param("a.jsonl.gz", gzip.compress(GOOD * 100)[:-20], "broken gzip", id="cut-gzip"),
    pytest.param("a.jsonl.gz", GOOD, "broken gzip", id="not-gzip"),
    pytest.param("a.parquet.gz", gzip.compress(b"x"), "not Parquet", id="packed-nonsense"),
    pytest.param("a.txt", GOOD, "not a format that is read", id="unknown-format"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_broken_row(tmp_path: Path, tokenizer: Any, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(tokenizer, path)
    assert error.value.message.startswith(str(path))
    (tmp_path / "good.jsonl").write_bytes(GOOD + b"\n")
    dataset = read(tokenizer, path, tmp_path / "good.jsonl", on_bad_row="drop")
    assert sum(dataset.counts.dropped.values()) == 1
    assert set(dataset.counts.dropped) <= {"cannot be parsed", "not an object"}
    assert not list((tmp_path / "cache" / "pairs").glob(".building*"))


@pytest.mark.parametrize(("name", "content", "message"), UNREADABLE)
def test_unreadable_file(tmp_path: Path, tokenizer: Any, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(tokenizer, path, on_bad_row="drop")
    assert name in error.value.message


@pytest.mark.parametrize(
    "source", ["./nowhere", "nowhere.jsonl", "/nowhere/at/all", "~/nowhere.csv", "a/b/c", "./nowhere:train"]
)
def test_a_path_is_not_looked_up_on_the_network(tokenizer: Any, source: str) -> None:
    with pytest.raises(DataError, match="there is no file or folder"):
        read(tokenizer, source)


def test_parquet_with_other_types(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": i, "chosen": b"x", "rejected": [1.5]} for i in range(3)]
    write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(DataError, match=r"no usable pair in 3 rows: 3 not text \(.*a.parquet row 1: bytes\)"):
        read(tokenizer, tmp_path / "a.parquet")


def test_unknown_columns(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"text": "a", "label": 1}]))
    with pytest.raises(DataError, match="no known format; its columns are text, label") as error:
        read(tokenizer, tmp_path / "a.jsonl")
    assert "prompt/chosen/rejected" in str(error.value.hint)
    (tmp_path / "b.jsonl").write_text(lines([{"q": "question 0", "good": "yes 0", "bad": "no"}]))
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert answers(tokenizer, read(tokenizer, tmp_path / "b.jsonl", columns=columns)) == EXPECTED[:1]
    with pytest.raises(DataError, match="its columns are q, good, bad"):
        read(tokenizer, tmp_path / "b.jsonl", columns=columns | {"prompt": "query"})
