"""A subset whose gaps mirror each other, written as rows that give the same pairs again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampo_cli.balance import check_target, mirrored, write_balanced
from sampo_cli.config import DataConfig
from sampo_cli.dataset import PairDataset, prepare
from sampo_cli.errors import DataError, UsageError
from tests import tiny


def test_mirrored_by_hand() -> None:
    """Up to 5 each gap is its own bin; 6 has 5's neighbour 7 in another one. 0 stays."""
    gaps = [1, 1, -1, 4, -5, 0, 3, -3, -3, -3]
    keep = mirrored(gaps, seed=0)
    kept = np.array(gaps)[keep]
    assert sorted(kept.tolist()) == [-3, -1, 0, 1, 3]
    assert keep[5]


@given(st.lists(st.integers(-3000, 3000), min_size=1, max_size=200), st.integers(0, 5))
def test_mirrored(gaps: list[int], seed: int) -> None:
    """Gaps of one bin differ by a quarter at most; each has as many on either side, and all of the rarer side."""
    gap = np.array(gaps)
    keep = mirrored(gap, seed)
    assert np.array_equal(keep, mirrored(gap, seed))
    assert keep[gap == 0].all()
    for sign in (1, -1):
        assert np.array_equal(mirrored(sign * gap, seed), keep)
    larger, smaller = np.sort(gap[keep & (gap > 0)]), np.sort(-gap[keep & (gap < 0)])
    assert len(larger) == len(smaller)
    assert (np.maximum(larger, smaller) <= 1.25 * np.minimum(larger, smaller)).all()
    left = gap[~keep]
    assert not set(left[left > 0]) & set(-left[left < 0])  # two that mirror each other could both have stayed


def test_another_seed_draws_others_as_many() -> None:
    gaps = np.array([5] * 50 + [-5] * 10)
    first, second = mirrored(gaps, 1), mirrored(gaps, 2)
    assert first.sum() == second.sum() == 20
    assert not np.array_equal(first, second)


ROWS: list[dict[str, Any]] = [
    {"prompt": "one?", "chosen": "yes yes  yes", "rejected": "no"},
    {"chosen": "\n\nHuman: a?\n\nAssistant: b", "rejected": "\n\nHuman: a?\n\nAssistant: b b b b b"},
    {"prompt": "same", "chosen": "x", "rejected": "x"},
    {"system": "Be brief.", "question": "two?", "chosen": "no " * 9, "rejected": " yes\n"},
    {
        "conversations": [
            {"from": "human", "value": "three?"},
            {"from": "gpt", "value": "?"},
            {"from": "human", "value": "3?"},
        ],
        "chosen": {"from": "gpt", "value": "é\u2028 </s> <|im_end|>"},
        "rejected": {"from": "gpt", "value": "a long answer that has many words"},
    },
    {"instruction": "add", "input": "1 1", "chosen": "2", "rejected": "3"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(*paths: Path, **settings: Any) -> PairDataset:
    return prepare(DataConfig(sources=[str(path) for path in paths], **settings), tiny.make_tokenizer())


def tokens(dataset: PairDataset) -> list[list[list[int]]]:
    pairs = [dataset[index] for index in range(len(dataset))]
    return [[part.tolist() for part in (pair.prompt, pair.chosen, pair.rejected)] for pair in pairs]


def test_what_is_written_gives_the_same_pairs(tmp_path: Path) -> None:
    """Rows of several formats in two files, each with its mirror image: every usable pair is kept."""
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    dataset = read(write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", swapped))
    report = write_balanced(dataset, tmp_path / "balanced.jsonl", seed=0, columns={})
    assert (report.pairs, report.kept) == (10, 10)
    again = read(tmp_path / "balanced.jsonl")
    assert tokens(again) == tokens(dataset)
    assert again.counts.rows == 10


def test_numbers_and_the_order(tmp_path: Path) -> None:
    """Gaps +2, -1, +1, +1, +1: of the last three one stays, and it is where it was."""
    answers = [("xyz", "q"), ("x", "qp"), ("xy", "q"), ("xz", "q"), ("zy", "q")]
    rows = [{"question": str(i), "good": good, "bad": bad} for i, (good, bad) in enumerate(answers)]
    columns = {"chosen": "good", "rejected": "bad"}
    dataset = read(write(tmp_path / "a.jsonl", rows), columns=columns)
    report = write_balanced(dataset, tmp_path / "b.jsonl", seed=0, columns=columns)
    written = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert written[0] == {
        "prompt": [{"role": "user", "content": "1"}],
        "chosen": [{"role": "assistant", "content": "x"}],
        "rejected": [{"role": "assistant", "content": "qp"}],
    }
    assert written[1]["prompt"][0]["content"] in ("2", "3", "4")
    assert (report.pairs, report.kept, len(written)) == (5, 2, 2)
    assert (report.before.longer_wins, report.before.mean_gap) == (0.8, 0.8)
    assert (report.after.longer_wins, report.after.mean_gap, report.after.model.slope) == (0.5, 0.0, 0.0)
    assert json.loads(json.dumps(report.to_dict()))["after"]["model"]["accuracy"] == 0.5


def test_real_pairs_come_back(shared: Path, tmp_path: Path) -> None:
    """Of transcripts, and of conversations with literal special tokens; the labels know nothing of length then."""
    for name in ("hh_helpful_base_1400", "ultrafeedback_train_1000", "orca_dpo_pairs_284"):
        dataset = read(shared / "data" / f"{name}.jsonl")
        path = tmp_path / f"{name}.jsonl"
        report = write_balanced(dataset, path, seed=0, columns={})
        again = read(path)
        assert len(again) == report.kept
        assert not Counter(map(repr, tokens(again))) - Counter(map(repr, tokens(dataset)))
        assert report.after.longer_wins == 0.5
        assert abs(report.after.mean_gap) < 0.1 * abs(report.before.mean_gap)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    dataset = read(write(tmp_path / "a.jsonl", ROWS))
    mine = tmp_path / "mine.jsonl"
    mine.write_text("mine")
    with pytest.raises(UsageError, match="already there"):
        write_balanced(dataset, mine, seed=0, columns={})
    assert mine.read_text() == "mine"
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nowhere")
    for path, problem in ((tmp_path / "link.jsonl", "already there"), (tmp_path / "a.json", "JSON lines")):
        with pytest.raises(UsageError, match=problem):
            check_target(path)
    with pytest.raises(UsageError, match="no folder that can be written"):
        check_target(tmp_path / "none" / "a.jsonl")


def test_labels_that_all_lean_one_way(tmp_path: Path) -> None:
    dataset = read(write(tmp_path / "a.jsonl", [ROWS[0], ROWS[0]]))
    with pytest.raises(DataError, match="none of the 2 pairs has a counterpart"):
        write_balanced(dataset, tmp_path / "b.jsonl", seed=0, columns={})
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_source_that_changed_leaves_nothing(tmp_path: Path) -> None:
    """Other rows than those that were tokenised would be written: fewer, more, or broken ones."""
    source = tmp_path / "a.jsonl"
    for rows in (ROWS[:2], ROWS * 2, [{"text": "x"}] * 6):
        dataset = read(write(source, ROWS))
        write(source, rows)
        with pytest.raises(DataError, match="written to while it was read"):
            write_balanced(dataset, tmp_path / "b.jsonl", seed=0, columns={})
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_source_that_changes_meanwhile(tmp_path: Path) -> None:
    """Its rows are still read up to the number that was tokenised, then it is refused."""
    source = write(tmp_path / "a.jsonl", ROWS)
    rows = read(source).source_rows({"prompt", "chosen", "rejected"})
    next(rows)
    with source.open("a") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(DataError, match="written to while it was read"):
        list(rows)
