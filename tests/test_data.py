"""Pairs in the store, their truncation, the cache and the split."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from sampo_cli.config import DataConfig
from sampo_cli.dataset import PairDataset, cache_folder, prepare, split
from sampo_cli.errors import DataError, UsageError
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


EXPECTED = [f"yes {i}<|im_end|>" for i in range(5)]


def lines(rows: Iterable[object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(tokenizer: Any, *sources: object, **settings: Any) -> PairDataset:
    return prepare(DataConfig(sources=[str(source) for source in sources], **settings), tokenizer)


def answers(tokenizer: Any, dataset: PairDataset) -> list[str]:
    return [tokenizer.decode(dataset[i].chosen) for i in range(len(dataset))]


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
    rows = [
        {"prompt": "say", "chosen": "+yes", "rejected": "+no"},
        {"prompt": "the us", "chosen": "er", "rejected": "x"},
    ]
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
        (store / "index.bin").unlink,
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
from sampo_cli.dataset import prepare
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
