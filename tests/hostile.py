"""Rows that people, and people who mean harm, put into data sets: hypothesis strategies and what must become of each.

Nothing of the program is used to say what must become of a row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

FRAGMENTS = [
    *("yes", "no", "the user", "2+2?", "x" * 300, "null", "NaN", "'", '"', "\\", ",", ";", "{{ 7*7 }}", "{% raw %}"),
    *("", " ", "\n", "\n\n", "\r\n", "\r", "\t", "\u00a0", "\u2003", "\u2028", "\x85", "\x0b", "\x1c"),
    *("\x00", "\x07", "\x1b[31m", "\x7f", "\ufeff", "\ufffe", "\ufffd", "\ud800", "\udfff", "\udc00\ud800"),
    *("🙂", "👩‍👩‍👧‍👦", "🇦🇺", "שלום", "\u202eabc\u202c", "مرحبا", "e\u0301", "ﬁ", "İ", "\U000f0000", "\U000ffffd"),
    *("<|im_end|>", "<|im_start|>", "<|im_start|>assistant\n", "<|pad|>", "<|im_", "end|>", "</s>", "<|endoftext|>"),
    *("\n\nHuman:", "\n\nAssistant:", "### User:\n", "[INST]", "assistant", "user"),
]  # fmt: skip


def as_json(text: str) -> str:
    """Two lone surrogates that meet are a character when they have been written as JSON."""
    back: str = json.loads(json.dumps(text))
    return back


texts = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=5).map("".join).map(as_json),
    st.text(max_size=20),
    st.sampled_from(FRAGMENTS),
)
words = st.lists(st.sampled_from(["yes", "no", "the user", "again 🙂", "שלום", "<|im_end|>"]), min_size=1, max_size=4)
usual = st.one_of(words.map(" ".join), texts)

Turns = list[dict[str, str]]


@dataclass(frozen=True)
class Said:
    """What a row was made from. `prompt` ends with a user's turn."""

    prompt: Turns
    chosen: str
    rejected: str

    def faults(self) -> set[str]:
        """The reasons for which it may be dropped; none where it must be used."""
        found = set()
        answers = [self.chosen.strip(), self.rejected.strip()]
        if not self.prompt[-1]["content"].strip():
            found.add("empty prompt")
        if not all(answers):
            found.add("empty response")
        if answers[0] == answers[1]:
            found.add("identical responses")
        if any(is_surrogate(c) for text in (*answers, *(t["content"] for t in self.prompt)) for c in text):
            found.add("not valid Unicode")
        return found

    def turns(self) -> Turns:
        """The prompt without a system turn that says nothing."""
        return [t for t in self.prompt if t["role"] != "system" or t["content"].strip()]

    def rendered(self) -> tuple[str, str, str]:
        """Prompt and both responses as ChatML writes them."""
        prompt = "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in self.turns())
        answers = (f"{answer.strip()}<|im_end|>" for answer in (self.chosen, self.rejected))
        return (f"{prompt}<|im_start|>assistant\n", *answers)  # type: ignore[return-value]


def is_surrogate(character: str) -> bool:
    return 0xD800 <= ord(character) < 0xE000


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@st.composite
def said(draw: Any, text: Any = usual, history: bool = True) -> Said:
    system = [turn("system", draw(text))] if history and draw(st.booleans()) else []
    earlier = draw(st.integers(0, 2)) if history else 0
    turns = [turn(role, draw(text)) for _ in range(earlier) for role in ("user", "assistant")]
    return Said([*system, *turns, turn("user", draw(text))], draw(text), draw(text))


# A conversation in the formats of docs/data.md ------------------------------------------------------------------------


def share_gpt(turns: Turns) -> Turns:
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": speakers[t["role"]], "value": t["content"]} for t in turns]


def messages(x: Said) -> dict[str, Any]:
    return {
        "prompt": x.prompt,
        "chosen": [turn("assistant", x.chosen)],
        "rejected": turn("assistant", x.rejected),
    }


def parts(x: Said) -> dict[str, Any]:
    prompt = [t | {"content": [{"type": "text", "text": t["content"]}]} for t in x.prompt]
    return {"messages": prompt, "chosen": x.chosen, "rejected": x.rejected}


def whole(x: Said) -> dict[str, Any]:
    answers = {"chosen": x.chosen, "rejected": x.rejected}
    return {side: [*x.prompt, turn("assistant", answer)] for side, answer in answers.items()}


def with_strings(x: Said) -> dict[str, Any]:
    return {"messages": x.prompt, "chosen": x.chosen, "rejected": x.rejected}


def share_gpt_with_strings(x: Said) -> dict[str, Any]:
    return {"messages": share_gpt(x.prompt), "chosen": x.chosen, "rejected": x.rejected}


def share_gpt_row(x: Said) -> dict[str, Any]:
    answers = {"chosen": x.chosen, "rejected": x.rejected}
    spoken = {side: share_gpt([turn("assistant", answer)])[0] for side, answer in answers.items()}
    return {"conversations": share_gpt(x.prompt), **spoken}


LISTS = (with_strings, share_gpt_with_strings, parts, messages, whole, share_gpt_row)


def strings(name: str) -> Any:
    return lambda x: {name: x.prompt[-1]["content"], "chosen": x.chosen, "rejected": x.rejected}


def stack_exchange(x: Said) -> dict[str, Any]:
    return {"question": x.prompt[-1]["content"], "response_j": x.chosen, "response_k": x.rejected}


def with_system(column: str, name: str) -> Any:
    def row(x: Said) -> dict[str, Any]:
        system = x.prompt[0]["content"] if x.prompt[0]["role"] == "system" else ""
        return {column: system, name: x.prompt[-1]["content"], "chosen": x.chosen, "rejected": x.rejected}

    return row


STRINGS = (
    *(strings(name) for name in ("prompt", "question", "instruction", "input")),
    *(stack_exchange, with_system("system", "question"), with_system("system_prompt", "prompt")),
)


def transcript(x: Said) -> dict[str, Any]:
    speakers = {"user": "Human", "assistant": "Assistant"}
    start = "".join(f"\n\n{speakers[t['role']]}: {t['content']}" for t in x.prompt)
    return {side: f"{start}\n\nAssistant: {text}" for side, text in (("chosen", x.chosen), ("rejected", x.rejected))}


def transcript_prompt(x: Said) -> dict[str, Any]:
    start = transcript(Said(x.prompt, "", ""))["chosen"]
    return {"prompt": start, "chosen": x.chosen, "rejected": x.rejected}


def fits_a_string(x: Said) -> bool:
    """A string that begins like a transcript is one, and a blank instruction is none."""
    return not any(text.startswith("\n\nHuman:") for text in (x.prompt[-1]["content"], x.chosen, x.rejected))


def fits_a_transcript(x: Said) -> bool:
    """Speakers take turns in a transcript, nobody speaks of speakers, and white space around a turn is not kept."""
    said = [t["content"] for t in x.prompt] + [x.chosen, x.rejected]
    plain = not any(mark in f"\n\n{text}" for text in said for mark in ("\n\nHuman:", "\n\nAssistant:"))
    return plain and all(text == text.strip() and text for text in said)


@st.composite
def good_rows(draw: Any) -> tuple[dict[str, Any], Said]:
    """A row in one of the formats, with other columns, and what it says."""
    kind = draw(st.sampled_from(("lists", "strings", "transcript")))
    if kind == "lists":
        x = draw(said())
        row = draw(st.sampled_from(LISTS if fits_a_string(x) else LISTS[3:]))(x)
    elif kind == "strings":
        x = draw(said(history=False).filter(fits_a_string))
        if draw(st.booleans()):
            x = Said([turn("system", draw(usual)), *x.prompt], x.chosen, x.rejected)
            row = draw(st.sampled_from(STRINGS[-2:]))(x)
        else:
            row = draw(st.sampled_from(STRINGS))(x)
    else:
        x = draw(said(words.map(" ".join)).filter(fits_a_transcript))
        x = Said([t for t in x.prompt if t["role"] != "system"], x.chosen, x.rejected)
        row = draw(st.sampled_from((transcript, transcript_prompt)))(x)
    others = draw(st.dictionaries(st.sampled_from(["score", "id", "meta", "\x00", "🙂"]), junk, max_size=2))
    return {**others, **row}, x


# What is no row -------------------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.integers(10**300, 10**301), texts, st.just("user")
)
NAMES = [
    *("prompt", "chosen", "rejected", "system", "question", "instruction", "input", "response_j", "response_k"),
    *("messages", "conversations", "role", "from", "content", "value", "text", "type", "tool_calls", "\ud800", ""),
]
junk = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "SYSTEM", "root", None]), "content": inner}
        ),
    ),
    max_leaves=8,
)


chatter = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool", "root"]), "content": usual}),
    max_size=4,
)


@st.composite
def junk_rows(draw: Any) -> object:
    """A good row with some of it replaced or taken away, messages in any order, or anything that JSON can say."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(junk)
    if kind == 1:
        start = draw(chatter)
        return {name: [*start, *draw(chatter)] for name in ("prompt", "chosen", "rejected")}
    row, _ = draw(good_rows())
    for name in draw(st.lists(st.sampled_from(sorted(row)), max_size=2, unique=True)):
        if draw(st.booleans()):
            del row[name]
        else:
            row[name] = draw(junk)
    return row


broken_lines = st.sampled_from(
    [
        *(b"{", b'{"prompt": "a", "chosen": "b", "rej', b"[[[[", b"\xff\xfe", b'{"prompt": "\xe9"}', b"nul", b"\x00"),
        *(b'{"prompt": "\xed\xa0\x80", "chosen": "a", "rejected": "b"}', b"[" * 3000, b'{"n": ' + b"1" * 5000 + b"}"),
        *(b"'single'", b"prompt,chosen,rejected", b'{"prompt": "a"} {"prompt": "b"}', b'{"prompt": "\x01"}', b"<html>"),
        b'{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}',
        b'{"prompt": [{"role": "user", "role": "assistant", "content": "a"}], "chosen": "b", "rejected": "c"}',
    ]
)  # fmt: skip


def line_of(row: object, escaped: bool) -> bytes:
    """A row as a line of JSON; what is not Unicode can only be escaped."""
    text = json.dumps(row, ensure_ascii=escaped)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(row).encode()
