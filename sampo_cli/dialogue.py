"""A conversation with a model and its adapter: turns in, answers out as they come. Prints and reads nothing itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TextStreamer

from sampo_cli.disk import write_text
from sampo_cli.errors import UsageError
from sampo_cli.formats import Message, Unusable
from sampo_cli.generate import Decoding, choice_of, completion_of, end_tokens
from sampo_cli.policy import Policy, base
from sampo_cli.template import PairEncoder

Side = Literal["adapter", "base"]
Write = Callable[[str], object]


def _unheard(piece: str) -> None:
    """Takes an answer that is read when it is whole."""


@dataclass(frozen=True)
class Reply:
    """An answer. `tokens` counts the end-of-turn token if the model reached it (`ended`)."""

    side: Side
    text: str
    tokens: int
    ended: bool


@dataclass
class Chat:
    """A conversation. What was said is kept until `reset`.

    Args:
        encoder: turns conversations into token ids.
        context: positions that the model was made for, None where unknown.
        has_adapter: the policy is a base with an adapter; without, there is only the base to talk to.
        system: a system turn before everything.
        name: of what is talked with.

    Attributes:
        sides: who answers; the adapter if there is one.
        turns: what was said.
    """

    policy: Policy = field(repr=False)
    encoder: PairEncoder = field(repr=False)
    decoding: Decoding
    context: int | None
    has_adapter: bool
    system: str | None = None
    name: str = ""
    sides: tuple[Side, ...] = field(init=False)
    turns: list[Message] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.sides = ("adapter",) if self.has_adapter else ("base",)

    def ask(
        self, text: str, sides: Sequence[Side] | None = None, write: Callable[[Side], Write] = lambda side: _unheard
    ) -> list[Reply]:
        """The answers to one more question. The first side's goes into the conversation.

        Args:
            sides: who answers, if not `self.sides`.
            write: gives for a side what takes its answer, piece by piece.

        Raises:
            UsageError: no such side, a template that refuses these turns, or no room left for an answer.
        """
        sides = self.sides if sides is None else sides
        if "adapter" in sides and not self.has_adapter:
            raise UsageError("there is no adapter: this is a base alone", hint="give a run, or MODEL --adapter ADAPTER")
        before: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        asked: list[Message] = [*self.turns, {"role": "user", "content": text}]
        try:
            ids = self.encoder.prompt([*before, *asked])
        except Unusable as problem:
            raise UsageError(f"the chat template does not take these turns: {problem}", hint="/reset") from problem
        replies = [self._reply(ids, side, write(side)) for side in sides]
        self.turns = [*asked, {"role": "assistant", "content": replies[0].text}]
        return replies

    def reset(self) -> None:
        """Forget what was said; the system turn stays."""
        self.turns = []

    def save(self, path: Path) -> None:
        """Write the conversation as JSON: a list of turns.

        Raises:
            UsageError: the file is there.
            SampoError: the disk is full.
        """
        if path.exists():
            raise UsageError(f"{path} is already there", hint="give another name")
        before = [{"role": "system", "content": self.system}] if self.system else []
        write_text(path, json.dumps([*before, *self.turns], indent=2, ensure_ascii=False) + "\n")

    @torch.no_grad()
    def _reply(self, ids: list[int], side: Side, write: Write) -> Reply:
        causal_lm, tokenizer = self.policy.causal_lm, self.encoder.tokenizer
        room = self.decoding.max_new_tokens if self.context is None else self.context - len(ids)
        if room < 1:
            raise UsageError(f"the conversation has {len(ids)} tokens, the model takes {self.context}", hint="/reset")
        ends = end_tokens(causal_lm, tokenizer)
        given = torch.tensor([ids], device=causal_lm.device)
        torch.manual_seed(self.decoding.seed + len(self.turns))
        with (
            self._speaking(side),
            torch.autocast(given.device.type, dtype=self.policy.dtype, enabled=self.policy.dtype != torch.float32),
        ):
            row = causal_lm.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                streamer=_Pieces(tokenizer, write),
                pad_token_id=(ends or [0])[0],
                eos_token_id=ends or None,
                **choice_of(self.decoding, room),
            )[0, len(ids) :].tolist()
        said = completion_of(row, ends, tokenizer)
        return Reply(side, said.text, said.tokens, said.ended)

    @contextmanager
    def _speaking(self, side: Side) -> Iterator[None]:
        """Inside, the model is that side."""
        if side == "base" and self.has_adapter:
            with base(self.policy):
                yield
        else:
            yield


class _Pieces(TextStreamer):
    """Hands on text as soon as it is whole words."""

    def __init__(self, tokenizer: Any, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.write(text)


def to_dict(prompt: str, replies: Sequence[Reply]) -> dict[str, Any]:
    """A question and its answers, as JSON can hold them."""
    return {"prompt": prompt, "answers": [asdict(reply) for reply in replies]}
