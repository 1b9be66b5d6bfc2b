"""From a source's name to a store of token ids: every kind of source, every way in which one can be broken."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from sampo_cli.config import DataConfig
from sampo_cli.data import PairDataset, cache_folder, prepare, split
from sampo_cli.errors import DataError, HubError, UsageError
from sampo_cli.pair_builder import CHUNK_ROWS, truncate
from sampo_cli.template import Encoded
from tests import tiny

ROWS = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no, never {i}"} for i in range(5)]


@pytest.fixture
def tokenizer() -> Any:
    return tiny.make_tokenizer()


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: None) -> None:
    monkeypatch.setenv("SAMPO_CACHE", str(tmp_path / "cache"))


def lines(rows: Iterable[object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(tokenizer: Any, *sources: object, **settings: Any) -> PairDataset:
    return prepare(DataConfig(sources=[str(source) for source in sources], **settings), tokenizer)


def answers(tokenizer: Any, dataset: PairDataset) -> list[str]:
    return [tokenizer.decode(dataset[i].chosen) for i in range(len(dataset))]


EXPECTED = [f"yes {i}<|im_end|>" for i in range(5)]


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


def test_pairs_and_lengths(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    dataset = read(tokenizer, tmp_path / "a.jsonl")
    pair = dataset[4]
    prompt = "<|im_start|>user\nquestion 4<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(pair.prompt) == prompt
    assert tokenizer.decode(pair.rejected) == "no, never 4<|im_end|>"
    for part in ("prompt", "chosen", "rejected"):
        assert getattr(pair, part).dtype == np.int32
        assert getattr(dataset, f"{part}_tokens")[4] == len(getattr(pair, part))
    assert dataset.prompt_tokens.dtype == np.int32
    assert dataset.pair_ids.dtype == np.int64
    assert (len(dataset), dataset.max_length, [p.pair_id for p in dataset]) == (5, 2048, [0, 1, 2, 3, 4])


def test_pair_ids_do_not_depend_on_what_is_dropped(tmp_path: Path, tokenizer: Any) -> None:
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    (tmp_path / "a.jsonl").write_text(lines([ROWS[0], same, ROWS[1], {"prompt": "a"}]))
    (tmp_path / "b.jsonl").write_text(lines([same | {"chosen": ""}, ROWS[2]]))
    dataset = read(tokenizer, tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert dataset.pair_ids.tolist() == [0, 2, 5]
    assert (dataset.counts.rows, dataset.counts.kept) == (6, 3)
    assert dataset.counts.dropped == {"identical responses": 1, "missing field": 1, "empty response": 1}
    assert [dataset.location(i) for i in (1, 2)] == [f"{tmp_path / 'a.jsonl'}:3", f"{tmp_path / 'b.jsonl'}:2"]


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
    with pytest.raises(DataError, match="Config name is missing.*short.*long"):
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
    rows = [{"system": "", "question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in ROWS]
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
    pytest.param("a.jsonl", GOOD + b'\n{"prompt": "a", "ch', r":2:\d+: not JSON: Unterminated string", id="half-a-line"),
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


def test_no_usable_pair_says_why(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 2 + [{"prompt": "a", "chosen": "", "rejected": "b"}]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    place = tmp_path / "a.jsonl"
    with pytest.raises(DataError) as error:
        read(tokenizer, place)
    expected = f"no usable pair in 3 rows: 2 identical responses ({place}:1); 1 empty response ({place}:3)"
    assert error.value.message == expected


def test_prompt_that_is_not_a_prefix_stops_or_is_counted(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ messages[1]['content'] if messages | length > 1 }}"
    rows = [{"prompt": "say", "chosen": "+yes", "rejected": "+no"}, {"prompt": "the us", "chosen": "er", "rejected": "x"}]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    with pytest.raises(DataError, match=r"a.jsonl:2: prompt is not a prefix: where they part") as error:
        read(tokenizer, tmp_path / "a.jsonl")
    assert "on_bad_row=drop" in str(error.value.hint)
    assert read(tokenizer, tmp_path / "a.jsonl", on_bad_row="drop").counts.dropped == {"prompt is not a prefix": 1}


# -- length ---------------------------------------------------------------------------------------------------------


def test_truncation_takes_from_the_prompt_first() -> None:
    pair = Encoded(prompt=[1, *range(10, 19)], chosen=[21, 22, 23], rejected=[31, 32, 33, 34, 35, 36])  # 10, 3, 6
    # 16 fit; 12: the prompt gives 4 of its 10, the BOS stays; 8: it stops at 4, so 4 are left for responses.
    assert truncate(pair, 16, 4, bos=1) == (pair, [])
    assert truncate(pair, 12, 4, bos=1) == (Encoded([1, *range(14, 19)], pair.chosen, pair.rejected), ["prompt"])
    assert truncate(pair, 12, 4, bos=None)[0].prompt == list(range(13, 19))
    cut = Encoded([1, 16, 17, 18], [21, 22, 23], [31, 32, 33, 34])
    assert truncate(pair, 8, 4, bos=1) == (cut, ["prompt", "rejected"])
    # A minimum above half of the room is not held: 8 // 2 = 4 tokens of prompt.
    assert truncate(pair, 8, 100, bos=1) == (cut, ["prompt", "rejected"])
    assert truncate(pair, 3, 100, bos=1) == (Encoded([18], [21, 22], [31, 32]), ["prompt", "chosen", "rejected"])
    assert truncate(pair, 2, 100, bos=1)[0] == Encoded([18], [21], [31])
    # A prompt shorter than the minimum stays whole.
    assert truncate(pair, 12, 11, bos=1)[0] == Encoded([1, *range(14, 19)], pair.chosen, pair.rejected)
    assert truncate(Encoded([1, 2], [3] * 9, [4] * 5), 8, 4, bos=1) == (Encoded([1, 2], [3] * 6, [4] * 5), ["chosen"])


def test_truncated_pairs_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"prompt": "p" * 50, "chosen": "c", "rejected": "r"},
        {"prompt": "p", "chosen": "c" * 90, "rejected": "r" * 20},
        {"prompt": "p", "chosen": "c" * 90 + "1", "rejected": "c" * 90 + "2"},
    ]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    config = DataConfig(sources=[str(tmp_path / "a.jsonl")], min_prompt_tokens=4)
    dataset = prepare(config, tokenizer, context=40)
    assert dataset.max_length == 40
    assert dataset.counts.dropped == {"identical after truncation": 1}
    assert dataset.counts.truncated == {"prompt": 2, "chosen": 1, "rejected": 0}
    assert (dataset.prompt_tokens + np.maximum(dataset.chosen_tokens, dataset.rejected_tokens)).max() == 40
    assert (dataset.prompt_tokens[1], dataset.chosen_tokens[1], dataset.rejected_tokens[1]) == (4, 36, 21)
    with pytest.raises(UsageError, match="at least 2"):
        prepare(config, tokenizer, context=1)


# -- the cache ------------------------------------------------------------------------------------------------------


def test_the_second_call_reads_the_cache(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    seen: list[tuple[int, int | None]] = []
    config = DataConfig(sources=[str(tmp_path / "a.jsonl")])
    first = prepare(config, tokenizer, progress=lambda done, total: seen.append((done, total)))
    (store,) = (tmp_path / "cache" / "pairs").iterdir()
    written = (store / "tokens.bin").stat().st_mtime_ns
    second = prepare(config, tokenizer, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(5, 5)]
    assert (first.cached, second.cached) == (False, True)
    assert (store / "tokens.bin").stat().st_mtime_ns == written
    assert (first.fingerprint, first.counts) == (second.fingerprint, second.counts)
    assert answers(tokenizer, second) == EXPECTED

    moved = tmp_path / "moved.jsonl"
    (tmp_path / "a.jsonl").rename(moved)
    third = read(tokenizer, moved)
    assert third.cached
    assert third.location(0) == f"{moved}:1"


def test_the_fingerprint_changes_with_what_matters(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines(ROWS))
    base = read(tokenizer, path).fingerprint
    tokenizer("padding left on", padding="max_length", max_length=8, truncation=True)
    assert read(tokenizer, path).fingerprint == base

    others = [read(tokenizer, path, max_length=100).fingerprint, read(tokenizer, path, min_prompt_tokens=9).fingerprint]
    others.append(read(tokenizer, path, path).fingerprint)
    tokenizer.chat_template += "{# another #}"
    others.append(read(tokenizer, path).fingerprint)
    tokenizer.chat_template = tiny.CHATML
    tokenizer.add_tokens(["question"])
    others.append(read(tokenizer, path).fingerprint)
    path.write_text(lines(ROWS).replace("yes", "Yes"))
    others.append(read(tiny.make_tokenizer(), path).fingerprint)
    assert len({base, *others}) == 7


def test_a_damaged_store_is_built_again(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    read(tokenizer, tmp_path / "a.jsonl")
    (store,) = (tmp_path / "cache" / "pairs").iterdir()
    for damage in (
        lambda: (store / "tokens.bin").write_bytes(b"1234"),
        lambda: (store / "index.bin").unlink(),
        lambda: (store / "meta.json").write_text("{"),
    ):
        damage()
        dataset = read(tokenizer, tmp_path / "a.jsonl")
        assert not dataset.cached
        assert answers(tokenizer, dataset) == EXPECTED


def test_a_cache_that_cannot_be_written(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAMPO_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot write the cache") as error:
        read(tokenizer, tmp_path / "a.jsonl")
    assert "SAMPO_CACHE" in str(error.value.hint)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMPO_CACHE", "~/here")
    assert cache_folder() == Path.home() / "here"
    monkeypatch.delenv("SAMPO_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "sampo"


# -- the split ------------------------------------------------------------------------------------------------------


def test_split() -> None:
    train, held_out = split(200, 0.05, seed=42)
    assert (len(train), len(held_out)) == (190, 10)
    assert sorted([*train, *held_out]) == list(range(200))
    assert (np.diff(train) > 0).all()
    assert (np.diff(held_out) > 0).all()
    assert held_out.tolist() == split(200, 0.05, seed=42)[1].tolist()
    assert held_out.tolist() != split(200, 0.05, seed=43)[1].tolist()
    sizes = {(pairs, share): len(split(pairs, share, 0)[1]) for pairs in (1, 2, 3) for share in (0.0, 0.01, 0.99)}
    assert sizes == {
        **{(1, share): 0 for share in (0.0, 0.01, 0.99)},
        **{(2, 0.0): 0, (2, 0.01): 1, (2, 0.99): 1},
        **{(3, 0.0): 0, (3, 0.01): 1, (3, 0.99): 2},
    }


# -- real and large -------------------------------------------------------------------------------------------------


def test_real_pairs(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama3")
    sources = [shared / "data" / f"{name}.jsonl" for name in ("ultrafeedback_train_1000", "orca_dpo_pairs_284")]
    dataset = read(tokenizer, *sources, max_length=1024)
    assert (dataset.counts.rows, dataset.counts.kept) == (1284, 1278)
    assert dataset.counts.dropped == {"identical responses": 4, "empty response": 2}
    assert dataset.counts.truncated == {"prompt": 68, "chosen": 10, "rejected": 2}
    assert (dataset.prompt_tokens + np.maximum(dataset.chosen_tokens, dataset.rejected_tokens)).max() == 1024
    assert dataset.prompt_tokens.min() > 5
    assert dataset.location(len(dataset) - 1) == f"{sources[1]}:284"
    bos, end = tokenizer.convert_tokens_to_ids(["<|begin_of_text|>", "<|eot_id|>"])
    for pair in dataset:
        assert pair.prompt.tolist().count(bos) == 1
        assert pair.prompt[0] == bos
        for response in (pair.chosen, pair.rejected):
            ends = np.flatnonzero(response == end)
            assert ends.tolist() in ([len(response) - 1], [])  # cut responses have none


def test_chunks_do_not_show(tmp_path: Path, tokenizer: Any) -> None:
    count = 2 * CHUNK_ROWS + 1
    rows = [{"prompt": f"{i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(count)]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    seen: list[tuple[int, int | None]] = []
    config = DataConfig(sources=[str(tmp_path / "a.jsonl")])
    dataset = prepare(config, tokenizer, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == [1000, 2000, 2001]
    assert tokenizer.decode(dataset[2000].chosen) == "yes 2000<|im_end|>"
    assert tokenizer.decode(dataset[999].chosen) == "yes 999<|im_end|>"


PEAK = """
import resource, sys
from sampo_cli.config import DataConfig
from sampo_cli.data import prepare
from tests import tiny
tokenizer = tiny.make_tokenizer()
prepare(DataConfig(sources=[sys.argv[1]]), tokenizer)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(prepare(DataConfig(sources=[sys.argv[2]]), tokenizer)) == 100_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """100,000 rows are 12 MB of tokens and a multiple of that as Python objects; 20,000 rows have paid for a chunk."""
    for name, count in (("few", 20_000), ("many", 100_000)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for i in range(count):
                file.write(json.dumps({"prompt": f"{name} {i}?", "chosen": f"yes {i}", "rejected": f"no, {i}"}) + "\n")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "few.jsonl"), str(tmp_path / "many.jsonl")]
    environment = os.environ | {"SAMPO_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert int(done.stdout) < 15_000  # KiB
