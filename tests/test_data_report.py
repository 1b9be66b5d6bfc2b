"""The numbers that `sampo data` shows, by hand, and one pair token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from sampo_cli.batch import Pair
from sampo_cli.config import DataConfig
from sampo_cli.data_report import Lengths, summarise, token_view
from sampo_cli.dataset import PairDataset, prepare
from sampo_cli.repeats import Repeats
from sampo_cli.template import PLAIN_TEMPLATE
from tests import tiny


@pytest.fixture
def dataset(tmp_path: Path) -> PairDataset:
    """Response lengths with the end token, one token a letter: chosen 2, 4, 5, 25; rejected 3, 4, 2, 13."""
    answers = [("x", "yz"), ("xyz", "qqq"), ("xyzq", "j"), ("x" * 30, "q" * 12), ("x", "x")]
    rows = [
        {"prompt": "p" * 5 * i, "chosen": chosen, "rejected": rejected}
        for i, (chosen, rejected) in enumerate(answers, 1)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(sources=[str(tmp_path / "a.jsonl")], min_prompt_tokens=15)
    return prepare(config, tiny.make_tokenizer(), context=40)


def test_summary(dataset: PairDataset) -> None:
    assert dataset.chosen_tokens.tolist() == [2, 4, 5, 25]  # the last: 31, with a prompt of 15 at most 25 are left
    assert dataset.rejected_tokens.tolist() == [3, 4, 2, 13]
    summary = summarise(dataset)
    assert (summary.counts.rows, summary.counts.kept, summary.counts.dropped) == (5, 4, {"identical responses": 1})
    # sorted 2 4 5 25: mean 36 / 4, median 4.5, 90th percentile at 0.9 * 3 = 2.7 between 5 and 25: 5 + 0.7 * 20
    assert summary.lengths["chosen"] == Lengths(mean=9.0, median=4.5, p90=pytest.approx(19.0), max=25)
    assert summary.lengths["rejected"] == Lengths(mean=5.5, median=3.5, p90=pytest.approx(4 + 0.7 * 9), max=13)
    # gaps -1, 0, 3, 12
    assert (summary.labels.chosen_longer, summary.labels.equal_length) == (0.5, 0.25)
    assert (summary.labels.mean_gap, summary.labels.median_gap) == (3.5, 1.5)
    assert summary.repeats == Repeats(0, 0, 0)
    assert "prefer neither length" in summary.advice  # four pairs show nothing
    # shorter 2, 4, 2, 13 = 21 of 36 + 22 = 58
    assert summary.kept_share == pytest.approx(42 / 58)
    assert summary.truncated_share == {"prompt": 0.25, "chosen": 0.25, "rejected": 0.0}
    assert summary.max_length == 40


def test_histogram(dataset: PairDataset) -> None:
    """The longest has 25 tokens: 12 bins at most, so they are ceil(25 / 12) = 3 wide, and 9 are enough."""
    histogram = summarise(dataset).histogram
    assert histogram.edges == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    assert histogram.chosen == [1, 2, 0, 0, 0, 0, 0, 0, 1]  # 2 | 4, 5 | 25
    assert histogram.rejected == [1, 2, 0, 0, 1, 0, 0, 0, 0]  # 2 | 3, 4 | 13


def test_summary_is_json(dataset: PairDataset) -> None:
    summary = summarise(dataset)
    loaded = json.loads(json.dumps(summary.to_dict()))
    assert loaded["counts"]["dropped"] == {"identical responses": 1}
    assert loaded["lengths"]["chosen"]["max"] == 25
    assert sum(loaded["histogram"]["chosen"]) == 4
    assert sum(loaded["gap_histogram"]["pairs"]) == 4
    assert loaded["labels"]["longer_wins"] == 0.625
    assert loaded["labels"]["model"]["slope"] > 0
    assert sum(step["pairs"] for step in loaded["longer_wins_by_gap"]) == 3


def test_token_view() -> None:
    tokenizer = tiny.make_tokenizer()

    def ids(text: str) -> Any:
        return np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int32)

    pair = Pair(0, ids("the user"), ids("xé<|im_end|>"), ids("q<|im_end|>"))
    view = token_view(pair, tokenizer)
    assert view == [
        ("the", "prompt", False),
        (" user", "prompt", False),
        ("x", "chosen", True),
        ("", "chosen", True),  # the first of the two bytes of é
        ("é", "chosen", True),
        ("<|im_end|>", "chosen", True),
        ("q", "rejected", True),
        ("<|im_end|>", "rejected", True),
    ]
    weights = (np.array([0.0, 0.5, 0.0, 1.0]), np.array([False, True]))
    scored = [mark for _, _, mark in token_view(pair, tokenizer, weights)]
    assert scored == [False, False, False, True, False, True, False, True]


def test_token_view_of_broken_characters() -> None:
    """A response cut inside a character, and one that holds half characters in a row."""
    tokenizer = tiny.make_tokenizer()
    smile = tokenizer("🙂", add_special_tokens=False).input_ids
    assert len(smile) == 4
    pair = Pair(0, np.array(smile), np.array(smile[:3]), np.array(smile[:1] * 6))
    view = token_view(pair, tokenizer)
    assert [text for text, kind, _ in view if kind == "prompt"] == ["", "", "", "🙂"]
    for kind, ids in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        assert "".join(text for text, part, _ in view if part == kind) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "gemma3", "mistral_v0.1"])
def test_token_view_of_real_pairs(shared: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    tokenizer.chat_template = tokenizer.chat_template or "{{ bos_token }}" + PLAIN_TEMPLATE
    config = DataConfig(sources=[str(shared / "data" / "ultrafeedback_eval_200.jsonl")], max_length=300)
    dataset = prepare(config, tokenizer)
    for index in range(0, len(dataset), 20):
        pair = dataset[index]
        view = token_view(pair, tokenizer)
        for kind, ids in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
            whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            assert "".join(text for text, part, _ in view if part == kind) == whole
