"""A row of a data set, in any of the usual preference formats, to one `Conversation`.

Recognition is by row, so a file may mix formats. Nothing here reads files, renders templates or counts; a row that
cannot be used raises `Unusable` with a short, stable reason that others count. The conversation helpers of trl were
tried and not taken: they need every row to have one known shape, and change it in place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["prompt", "chosen", "rejected", "system"]
Message = dict[str, str]

ACCEPTED = (
    "prompt/chosen/rejected (strings or message lists), system+question, instruction(+input), HH-RLHF transcripts or "
    "whole conversations in chosen/rejected, ShareGPT conversations+chosen/rejected, question/response_j/response_k"
)

NOT_RECOGNISED = "missing field"
NOT_AN_OBJECT = "not an object"

_RESPONSES = (("chosen", "rejected"), ("response_j", "response_k"))
_PROMPTS = ("prompt", "conversations", "messages", "question", "instruction", "input")
_SYSTEMS = ("system", "system_prompt")

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}

_TRANSCRIPT_START = "\n\nHuman:"
_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")


class Unusable(Exception):
    """A row that is dropped.

    Attributes:
        reason: a short stable string, what is counted.
        detail: more about this row, for an error message; may be empty. Printable, whatever the row had in it.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = printable(detail)
        super().__init__(f"{reason}: {self.detail}" if detail else reason)


def printable(text: str) -> str:
    """A text that a stranger wrote, fit for a message: one line, nothing that a terminal obeys."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclass(frozen=True)
class Conversation:
    """A prompt, which ends with a user (or tool) turn, and the two answers to it.

    Answers are stripped of white space at both ends: most templates do so, and with the others a leading newline
    would merge with the one that ends the prompt.
    """

    prompt: list[Message]
    chosen: str
    rejected: str


def read_row(row: object, columns: Mapping[Role, str] | None = None) -> Conversation:
    """The conversation of one row.

    Args:
        row: a mapping from column to value, as JSON, CSV or parquet give it. It is not changed.
        columns: "prompt", "chosen", "rejected", "system" to the column that holds it, where it is not recognised.

    Raises:
        Unusable: the row holds no usable pair; `NOT_RECOGNISED` where its columns are those of no known format.
    """
    if not isinstance(row, Mapping):
        raise Unusable(NOT_AN_OBJECT, f"it is {type(row).__name__}")
    fields = _renamed(row, columns or {})
    chosen, rejected = _responses(fields)
    if _is_transcript(chosen) and _is_transcript(rejected):
        chosen, rejected = _transcript(chosen), _transcript(rejected)
    chosen_turns, rejected_turns = _turns(chosen, "assistant"), _turns(rejected, "assistant")
    if _is_whole(chosen_turns) and _is_whole(rejected_turns):
        shared, chosen_turns, rejected_turns = _split_common(chosen_turns, rejected_turns)
    else:
        shared = _prompt(fields)
        chosen_turns, rejected_turns = _without(shared, chosen_turns), _without(shared, rejected_turns)
    prompt = _with_system(shared, _system(fields))
    answers = [_answer(turns) for turns in (chosen_turns, rejected_turns)]
    return _checked(prompt, answers[0], answers[1])


def known_columns(columns: Mapping[Role, str]) -> frozenset[str]:
    """Every column that `read_row` looks at; what is in the others does not matter."""
    return frozenset((*_PROMPTS, *_SYSTEMS, *(name for names in _RESPONSES for name in names), *columns.values()))


def _renamed(row: Mapping[Any, Any], columns: Mapping[Role, str]) -> dict[str, Any]:
    fields = {str(key): value for key, value in row.items()}
    for column in columns.values():
        if column not in row:
            raise Unusable(NOT_RECOGNISED, f"no column '{column}'")
    renamed: dict[str, Any] = {role: row[column] for role, column in columns.items()}
    if "prompt" in renamed:
        fields = {key: value for key, value in fields.items() if key not in _PROMPTS}
    if "system" in renamed:
        fields = {key: value for key, value in fields.items() if key not in _SYSTEMS}
    return fields | renamed


def _responses(fields: Mapping[str, Any]) -> tuple[Any, Any]:
    there = [(fields[a], fields[b]) for a, b in _RESPONSES if a in fields and b in fields]
    if not there:
        raise Unusable(NOT_RECOGNISED)
    filled = (pair for pair in there if pair != (None, None))  # in a table of mixed rows, every row has all columns
    return next(filled, there[0])


def _is_transcript(value: object) -> bool:
    return isinstance(value, str) and value.startswith(_TRANSCRIPT_START)


def _transcript(text: str) -> list[Message]:
    """An HH-RLHF transcript as messages; what a speaker says in several turns in a row is one."""
    _, *parts = _TRANSCRIPT_TURN.split(text)
    turns: list[tuple[str, list[str]]] = []
    for speaker, part in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if not turns or turns[-1][0] != role:
            turns.append((role, []))
        turns[-1][1].append(part.strip())
    return [{"role": role, "content": "\n\n".join(said)} for role, said in turns]


def _turns(value: object, speaker: str) -> list[Message]:
    """A string, a message or a list of messages as messages; a string is said by `speaker`."""
    if value is None:
        raise Unusable("empty response")
    if isinstance(value, str):
        return [{"role": speaker, "content": value}]
    if isinstance(value, Mapping):
        return [_message(value)]
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_message(part) for part in value]
    raise Unusable("not text", type(value).__name__)


def _message(value: object) -> Message:
    if not isinstance(value, Mapping):
        raise Unusable("not text", f"a message is {type(value).__name__}")
    speaker = _either(value, "role", "from")
    role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise Unusable("unknown role", speaker[:40] if isinstance(speaker, str) else type(speaker).__name__)
    if value.get("tool_calls"):
        raise Unusable("not text", "a message with tool calls")
    return {"role": role, "content": _text(_either(value, "content", "value"))}


def _either(value: Mapping[str, Any], name: str, other: str) -> Any:
    """The field of the one name or the other; a null is none, as Parquet fills up what other rows have."""
    return value.get(other) if value.get(name) is None else value[name]


def _text(content: object) -> str:
    """The text of a message: a string, or a list of text parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(isinstance(part, Mapping) for part in content):
        texts = [part.get("text") if part.get("type") in (None, "text") else None for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    raise Unusable("not text", type(content).__name__)


def _is_whole(turns: Sequence[Message]) -> bool:
    """True for a conversation from its beginning, False for an answer alone."""
    return len(turns) > 1 and any(turn["role"] == "user" for turn in turns)


def _split_common(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """The common beginning of two conversations and what is left of each, at least one turn."""
    most = min(len(chosen), len(rejected)) - 1
    common = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    return chosen[:common], chosen[common:], rejected[common:]


def _prompt(fields: Mapping[str, Any]) -> list[Message]:
    name = next((name for name in _PROMPTS if fields.get(name) is not None), None)
    if name is None:
        raise Unusable(NOT_RECOGNISED)
    value = fields[name]
    if name == "instruction" and fields.get("input") is not None:
        value = "\n\n".join(text for text in (_text(value), _text(fields["input"])) if text.strip())
    if _is_transcript(value):
        return _transcript(value.rstrip().removesuffix("\n\nAssistant:"))
    return _turns(value, "user")


def _without(prompt: list[Message], turns: list[Message]) -> list[Message]:
    """A response without the prompt, if it repeats it."""
    repeats = len(turns) > len(prompt) and turns[: len(prompt)] == prompt
    return turns[len(prompt) :] if repeats else turns


def _system(fields: Mapping[str, Any]) -> str | None:
    value = next((fields[name] for name in _SYSTEMS if fields.get(name) is not None), None)
    if value is None or isinstance(value, str):
        return value if value and value.strip() else None
    raise Unusable("not text", f"system is {type(value).__name__}")


def _with_system(prompt: list[Message], system: str | None) -> list[Message]:
    """The prompt with its system turn first; an empty one is none, and the conversation's own wins."""
    turns = [turn for turn in prompt if turn["role"] != "system" or turn["content"].strip()]
    if system is None or any(turn["role"] == "system" for turn in turns):
        return turns
    return [{"role": "system", "content": system}, *turns]


def _answer(turns: Sequence[Message]) -> str:
    if not turns:
        raise Unusable("empty response")
    if len(turns) > 1 or turns[0]["role"] != "assistant":
        raise Unusable("not one answer", "expected a single assistant turn after the common beginning")
    return turns[0]["content"].strip()


def _checked(prompt: list[Message], chosen: str, rejected: str) -> Conversation:
    if not prompt or not prompt[-1]["content"].strip():
        raise Unusable("empty prompt")
    if prompt[-1]["role"] not in ("user", "tool"):
        raise Unusable("prompt does not end with a question", prompt[-1]["role"])
    if not chosen or not rejected:
        raise Unusable("empty response")
    if chosen == rejected:
        raise Unusable("identical responses")
    try:
        for text in (chosen, rejected, *(turn["content"] for turn in prompt)):
            text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unusable("not valid Unicode", "a lone surrogate") from error
    return Conversation(prompt, chosen, rejected)
