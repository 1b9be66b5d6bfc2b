"""Rows of every known format, and rows that are none."""

from __future__ import annotations

import copy
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sampo_cli.formats import Conversation, Unusable, read_row

USER = {"role": "user", "content": "2+2?"}
SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
EXPECTED = Conversation([USER], "4", "5")
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: 2+2?\n\nAssistant:"


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def shared_gpt(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": text} for speaker, text in turns]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, EXPECTED, id="strings"),
        pytest.param({"prompt": [USER], "chosen": "4", "rejected": "5"}, EXPECTED, id="prompt-list"),
        pytest.param({"prompt": [USER], "chosen": [says("4")], "rejected": [says("5")]}, EXPECTED, id="answer-lists"),
        pytest.param(
            {"prompt": "2+2?", "chosen": [USER, says("4")], "rejected": [USER, says("5")]},
            EXPECTED,
            id="whole-and-prompt",
        ),
        pytest.param(
            {"chosen": [SYSTEM, *HELLO, USER, says("4")], "rejected": [SYSTEM, *HELLO, USER, says("5")]},
            Conversation([SYSTEM, *HELLO, USER], "4", "5"),
            id="whole-only",
        ),
        pytest.param(
            {"prompt": [USER], "chosen": [USER, says("4")], "rejected": [says("5")]}, EXPECTED, id="one-side-whole"
        ),
        pytest.param(
            {"system": "Be brief.", "question": "2+2?", "chosen": "4", "rejected": "5"},
            Conversation([SYSTEM, USER], "4", "5"),
            id="orca",
        ),
        pytest.param({"system": "", "question": "2+2?", "chosen": "4", "rejected": "5"}, EXPECTED, id="orca-no-system"),
        pytest.param({"system": None, "prompt": "2+2?", "chosen": "4", "rejected": "5"}, EXPECTED, id="system-null"),
        pytest.param(
            {"system": "Be brief.", "prompt": [USER], "chosen": "4", "rejected": "5"},
            Conversation([SYSTEM, USER], "4", "5"),
            id="system-and-list",
        ),
        pytest.param(
            {"system": "other", "prompt": [SYSTEM, USER], "chosen": "4", "rejected": "5"},
            Conversation([SYSTEM, USER], "4", "5"),
            id="own-system-wins",
        ),
        pytest.param({"instruction": "2+2?", "chosen": "4", "rejected": "5"}, EXPECTED, id="instruction"),
        pytest.param({"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"}, EXPECTED, id="empty-input"),
        pytest.param(
            {"instruction": "Add.", "input": "2, 2", "chosen": "4", "rejected": "5"},
            Conversation([{"role": "user", "content": "Add.\n\n2, 2"}], "4", "5"),
            id="instruction-input",
        ),
        pytest.param({"input": "2+2?", "chosen": "4", "rejected": "5"}, EXPECTED, id="input"),
        pytest.param({"question": "2+2?", "response_j": "4", "response_k": "5"}, EXPECTED, id="stack-exchange"),
        pytest.param(
            {"chosen": TRANSCRIPT + " 4", "rejected": TRANSCRIPT + " 5"},
            Conversation([*HELLO, USER], "4", "5"),
            id="hh",
        ),
        pytest.param(
            {"prompt": TRANSCRIPT, "chosen": " 4", "rejected": " 5"},
            Conversation([*HELLO, USER], "4", "5"),
            id="hh-prompt",
        ),
        pytest.param(
            {
                "chosen": "\n\nHuman: 2+2?\n\nAssistant: 4\n\nAssistant: Sure.",
                "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5",
            },
            Conversation([USER], "4\n\nSure.", "5"),
            id="hh-speaks-twice",
        ),
        pytest.param(
            {
                "conversations": shared_gpt(
                    ("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello!"), ("human", "2+2?")
                ),
                "chosen": {"from": "gpt", "value": "4"},
                "rejected": {"from": "gpt", "value": "5"},
            },
            Conversation([SYSTEM, *HELLO, USER], "4", "5"),
            id="sharegpt-messages",
        ),
        pytest.param(
            {"conversations": shared_gpt(("human", "2+2?")), "chosen": "4", "rejected": "5"},
            EXPECTED,
            id="sharegpt-strings",
        ),
        pytest.param(
            {
                "conversations": shared_gpt(("human", "2+2?")),
                "chosen": shared_gpt(("gpt", "4")),
                "rejected": shared_gpt(("gpt", "5")),
            },
            EXPECTED,
            id="sharegpt-lists",
        ),
        pytest.param(
            {
                "prompt": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}],
                "chosen": "4",
                "rejected": "5",
            },
            EXPECTED,
            id="text-parts",
        ),
        pytest.param(
            {
                "prompt": [{"role": None, "content": None, "from": "human", "value": "2+2?"}],
                "chosen": "4",
                "rejected": "5",
            },
            EXPECTED,
            id="nulls-of-other-rows",
        ),
        pytest.param(
            {"prompt": [{"role": "user", "content": [{"type": None, "text": "2+2?"}]}], "chosen": "4", "rejected": "5"},
            EXPECTED,
            id="part-without-type",
        ),
        pytest.param(
            {"question": "2+2?", "chosen": None, "rejected": None, "response_j": "4", "response_k": "5"},
            EXPECTED,
            id="answers-of-other-rows",
        ),
        pytest.param({"prompt": "2+2?", "chosen": "\n 4 ", "rejected": "5\n", "score": 1.5}, EXPECTED, id="stripped"),
        pytest.param(
            {"prompt": [USER, says("tool?"), {"role": "tool", "content": "4"}], "chosen": "4", "rejected": "5"},
            Conversation([USER, says("tool?"), {"role": "tool", "content": "4"}], "4", "5"),
            id="ends-with-a-tool",
        ),
    ],
)
def test_formats(row: dict[str, Any], expected: Conversation) -> None:
    before = copy.deepcopy(row)
    assert read_row(row) == expected
    assert row == before


def test_named_columns() -> None:
    row = {"q": "2+2?", "good": "4", "bad": "5", "rules": "Be brief.", "prompt": "not this", "question": "nor this"}
    columns: Any = {"prompt": "q", "chosen": "good", "rejected": "bad", "system": "rules"}
    assert read_row(row, columns) == Conversation([SYSTEM, USER], "4", "5")
    with pytest.raises(Unusable) as missing:
        read_row({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, {"prompt": "q"})
    assert (missing.value.reason, missing.value.detail) == ("missing field", "no column 'q'")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1, 2], "not an object"),
        (None, "not an object"),
        ({}, "missing field"),
        ({"prompt": "a", "chosen": "b"}, "missing field"),
        ({"chosen": "b", "rejected": "c"}, "missing field"),
        ({"prompt": None, "chosen": "b", "rejected": "c"}, "missing field"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "empty prompt"),
        ({"prompt": " \n\t", "chosen": "b", "rejected": "c"}, "empty prompt"),
        ({"prompt": [], "chosen": "b", "rejected": "c"}, "empty prompt"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "empty response"),
        ({"prompt": "a", "chosen": "b", "rejected": " \u2003\n"}, "empty response"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "empty response"),
        ({"prompt": "a", "chosen": [], "rejected": "c"}, "empty response"),
        ({"prompt": "a", "chosen": "b", "rejected": "b\n"}, "identical responses"),
        ({"chosen": [USER, says("4")], "rejected": [USER, says("4")]}, "identical responses"),
        ({"prompt": 1, "chosen": "b", "rejected": "c"}, "not text"),
        ({"prompt": "a", "chosen": 1.5, "rejected": "c"}, "not text"),
        ({"prompt": "a", "chosen": b"b", "rejected": "c"}, "not text"),
        ({"prompt": "a", "chosen": ["b"], "rejected": ["c"]}, "not text"),
        ({"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"}, "not text"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "b", "rejected": "c"}, "not text"),
        ({"system": 3, "prompt": "a", "chosen": "b", "rejected": "c"}, "not text"),
        ({"instruction": 3, "input": "x", "chosen": "b", "rejected": "c"}, "not text"),
        ({"prompt": [{"role": ["user"], "content": "a"}], "chosen": "b", "rejected": "c"}, "unknown role"),
        ({"prompt": [{"content": "a"}], "chosen": "b", "rejected": "c"}, "unknown role"),
        ({"prompt": "a", "chosen": {"role": "user", "content": "b"}, "rejected": "c"}, "not one answer"),
        ({"chosen": [USER, says("4"), USER, says("4")], "rejected": [USER, says("5")]}, "not one answer"),
        ({"chosen": [USER, says("4")], "rejected": [SYSTEM, USER, says("5")]}, "not one answer"),
        ({"prompt": [USER, says("4")], "chosen": "b", "rejected": "c"}, "prompt does not end with a question"),
        ({"prompt": "a\ud800", "chosen": "b", "rejected": "c"}, "not valid Unicode"),
    ],
)
def test_unusable(row: object, reason: str) -> None:
    with pytest.raises(Unusable) as problem:
        read_row(row)
    assert problem.value.reason == reason


@pytest.mark.parametrize(
    ("role", "shown"),
    [
        ("root\x1b[31m\n\ud800\u202e", r"root\x1b[31m\n\ud800\u202e"),
        ("x" * 400, "x" * 40),
        ([[[["deep"] * 50]]], "list"),
        (None, "NoneType"),
    ],
)
def test_what_a_stranger_wrote_is_shown_on_one_line(role: object, shown: str) -> None:
    with pytest.raises(Unusable) as problem:
        read_row({"prompt": [{"role": role, "content": "a"}], "chosen": "b", "rejected": "c"})
    assert problem.value.detail == shown
    assert str(problem.value) == f"unknown role: {shown}"


def test_a_speaker_who_never_stops_is_not_joined_turn_by_turn() -> None:
    """4 MB took 4.8 seconds, and four times as much sixteen times as long."""
    start = "\n\nHuman: " + "a" * 10
    seconds = time.process_time()
    conversation = read_row({"prompt": start * 200_000, "chosen": "b", "rejected": "c"})
    assert time.process_time() - seconds < 2
    assert conversation.prompt == [{"role": "user", "content": "\n\n".join(["a" * 10] * 200_000)}]


def test_many_turns_and_long_texts() -> None:
    turns = [turn for _ in range(5000) for turn in HELLO]
    row = {"chosen": [*turns, USER, says("x" * 1_000_000)], "rejected": [*turns, USER, says("\x00🙂 שלום")]}
    conversation = read_row(row)
    assert len(conversation.prompt) == 10_001
    assert (len(conversation.chosen), conversation.rejected) == (1_000_000, "\x00🙂 שלום")


@pytest.mark.parametrize(
    ("name", "usable", "dropped"),
    [
        ("ultrafeedback_train_1000", 994, {"identical responses": 4, "empty response": 2}),
        ("ultrafeedback_eval_200", 199, {"identical responses": 1}),
        ("orca_dpo_pairs_284", 284, {}),
        ("hh_helpful_base_1400", 1396, {"empty response": 3, "identical responses": 1}),
    ],
)
def test_real_files(shared: Path, name: str, usable: int, dropped: dict[str, int]) -> None:
    reasons: Counter[str] = Counter()
    conversations = []
    for line in (shared / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            conversations.append(read_row(json.loads(line)))
        except Unusable as problem:
            reasons[problem.reason] += 1
    assert (len(conversations), reasons) == (usable, dropped)
    assert all(conversation.prompt[-1]["role"] == "user" for conversation in conversations)


def test_common_beginning_is_that_of_trl() -> None:
    from trl.data_utils import extract_prompt

    row = {"chosen": [*HELLO, USER, says("4")], "rejected": [*HELLO, USER, says("5")]}
    theirs, ours = extract_prompt(row), read_row(row)
    assert theirs == {"prompt": ours.prompt, "chosen": [says(ours.chosen)], "rejected": [says(ours.rejected)]}
