"""Identical and nearly identical pairs, by their tokens."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from sampo_cli import repeats
from sampo_cli.config import DataConfig
from sampo_cli.dataset import PairDataset, prepare
from sampo_cli.pair_builder import INDEX, Counts
from sampo_cli.repeats import Repeats, find_repeats, similarity
from tests import tiny


def dataset(folder: Path, rows: list[tuple[str, str, str]], context: int = 400) -> PairDataset:
    lines = [json.dumps(dict(zip(("prompt", "chosen", "rejected"), row, strict=True))) for row in rows]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    return prepare(DataConfig(sources=[str(folder / "a.jsonl")]), tiny.make_tokenizer(), context=context)


def stored(folder: Path, pairs: list[tuple[list[int], list[int], list[int]]]) -> PairDataset:
    """A data set of exactly these tokens: prompt, chosen, rejected."""
    index = np.zeros(len(pairs), INDEX)
    for part, ids in zip(("prompt", "chosen", "rejected"), zip(*pairs, strict=True), strict=True):
        index[part] = [len(one) for one in ids]
    sizes = [sum(map(len, pair)) for pair in pairs]
    index["pair_id"], index["start"] = np.arange(len(pairs)), np.cumsum(sizes) - sizes
    index.tofile(folder / "index.bin")
    np.array([token for pair in pairs for ids in pair for token in ids], np.int32).tofile(folder / "tokens.bin")
    counts = Counts(len(pairs), len(pairs), {}, {})
    (folder / "meta.json").write_text(json.dumps({"counts": asdict(counts)}))
    return PairDataset(folder, [], [], 100, cached=True)


PAIRS = [
    ([1], [2, 3], [4]),
    ([1], [2, 3], [4]),  # the pair again
    ([1], [2], [3, 4]),  # the prompt again, and the same tokens with another cut
    ([1, 2], [3], [4]),  # another cut still: another prompt
    ([5], [6], [6]),  # as similar as can be
    ([1], [2, 3], [4]),  # and again
    ([7], [1, 2, 3, 4], [1, 2, 3, 5]),  # three shingles of five: 0.6
    ([8], [1, 2, 3, 4], [1, 2, 5, 4]),  # two of six
]


def test_counts(tmp_path: Path) -> None:
    """Prompts: [1] three times more."""
    found = find_repeats(stored(tmp_path, PAIRS))
    assert found == Repeats(identical_pairs=2, identical_prompts=3, near_identical=2)


class Watched(PairDataset):
    """Remembers which ranges of pairs were read."""

    read: list[tuple[int, int]]

    def tokens(self, first: int, last: int) -> np.ndarray:
        self.read.append((first, last))
        return super().tokens(first, last)


@pytest.mark.parametrize("size", [1, 10, 25, 1000])
def test_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """The same numbers whatever the blocks are, and blocks as large as they may be."""
    whole = find_repeats(stored(tmp_path, PAIRS * 3))
    assert whole.near_identical == 6
    monkeypatch.setattr(repeats, "BLOCK_TOKENS", size)
    dataset = Watched(tmp_path, [], [], 100, cached=True)
    dataset.read = []
    assert find_repeats(dataset) == whole
    sizes = [sum(map(len, pair)) for pair in PAIRS * 3]
    ends = [last for _, last in dataset.read]
    assert [first for first, _ in dataset.read] == [0, *ends[:-1]]
    assert ends[-1] == len(sizes)
    for first, last in dataset.read:
        assert sum(sizes[first:last]) <= size or last == first + 1
        assert last == len(sizes) or sum(sizes[first : last + 1]) > size


def test_what_is_behind_the_cut_does_not_count(tmp_path: Path) -> None:
    """A context of 40: prompts are cut from their left, and what is left of these two is the same."""
    rows = [("a" + "p" * 60, "x", "q"), ("b" + "p" * 60, "x", "q")]
    assert find_repeats(dataset(tmp_path, rows)).identical_pairs == 0
    assert find_repeats(dataset(tmp_path, rows, context=40)).identical_pairs == 1


def _ids(text: str) -> np.ndarray:
    return np.array([ord(letter) for letter in text], np.int32)


def test_similarity_by_hand() -> None:
    """Shingles of "abc": ^^a, ^ab, abc."""
    pairs = [
        ("abc", "abc", 1.0),
        ("abc", "abd", 2 / 4),  # ^^a and ^ab of four different ones
        ("abc", "bca", 0.0),
        ("aaaa", "aaa", 3 / 4),  # bags: aaa is there twice and once
        ("a", "b", 0.0),
    ]
    found = similarity([_ids(one) for one, _, _ in pairs], [_ids(other) for _, other, _ in pairs])
    assert found.tolist() == pytest.approx([expected for _, _, expected in pairs])


def test_similarity_of_random_pairs_against_counters() -> None:
    generator = np.random.default_rng(0)
    pairs = [
        [generator.integers(0, 3, generator.integers(1, 40)).astype(np.int32) for _ in range(2)] for _ in range(50)
    ]

    def bag(ids: np.ndarray) -> Counter[tuple[int, ...]]:
        padded = [-1, -1, *ids.tolist()]
        return Counter(tuple(padded[i : i + 3]) for i in range(len(ids)))

    expected = [(bag(a) & bag(b)).total() / (bag(a) | bag(b)).total() for a, b in pairs]
    assert similarity([a for a, _ in pairs], [b for _, b in pairs]).tolist() == pytest.approx(expected)
    assert max(expected) > 0.3
