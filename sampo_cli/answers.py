"""The same prompts answered again and again while a run trains: by its adapter, and once by the base.

Numbers go into a row of kind generate, texts into generations.jsonl. How answers are generated is `generate.py`'s.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sampo_cli import metrics
from sampo_cli.batch import Pair, Pairs, TokenIds
from sampo_cli.config import GenerateConfig
from sampo_cli.errors import DataError, UsageError
from sampo_cli.formats import Conversation, Unusable
from sampo_cli.generate import Completion, Decoding, complete
from sampo_cli.journal import TEXTS_FILE
from sampo_cli.policy import REFERENCE_ADAPTER, Policy, base
from sampo_cli.template import PairEncoder

Granted = Callable[[], object]
"""Called again and again; what it raises ends the work."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as a person reads it, and as the model does."""

    text: str
    ids: TokenIds = field(repr=False)


def find_prompts(
    settings: GenerateConfig,
    pairs: Pairs,
    held_out: Sequence[int],
    encoder: PairEncoder,
    context: int | None,
    texts: Callable[[list[int]], Mapping[int, str]],
) -> list[Prompt]:
    """The prompts that a run answers; none where the recipe asks for none.

    Args:
        held_out: indices into `pairs`.
        texts: gives the prompts of pair ids as people read them.
        context: most tokens of prompt and answer that the model takes, if that is known.

    Raises:
        UsageError, DataError: there are none; see `prompts_of_file`.
    """
    if not settings.prompts:
        return []
    room = None if context is None else context - settings.max_new_tokens
    if isinstance(settings.prompts, str):
        return prompts_of_file(Path(settings.prompts), encoder, room)
    found = held_out_prompts(pairs, held_out, settings.prompts, room)
    if not found:
        why = "no pairs are held out" if not held_out else f"no held-out prompt has at most {room:,} tokens"
        raise UsageError(f"train.generate.prompts: {why}", hint="--eval-fraction, a file of prompts, or prompts=0")
    said = texts([pair.pair_id for pair in found])
    return [Prompt(said[pair.pair_id], pair.prompt) for pair in found]


def held_out_prompts(pairs: Pairs, held_out: Sequence[int], count: int, room: int | None) -> list[Pair]:
    """The first `count` held-out pairs whose prompts differ.

    Args:
        room: most tokens of a prompt, so that an answer fits into the model's context; None for any.
    """
    found: dict[tuple[int, ...], Pair] = {}
    for index in held_out:
        if len(found) == count:
            break
        pair = pairs[index]
        if room is None or len(pair.prompt) <= room:
            found.setdefault(tuple(pair.prompt.tolist()), pair)
    return list(found.values())


def prompts_of_file(path: Path, encoder: PairEncoder, room: int | None) -> list[Prompt]:
    """The prompts of a text file, one a line, or of a .jsonl file with `prompt`; each is the only turn.

    Raises:
        UsageError: the file cannot be read or has none.
        DataError: a line of it is no prompt, or too long; see `held_out_prompts` for `room`.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"train.generate.prompts {path}: {error}", hint="give a UTF-8 file") from error
    if not lines:
        raise UsageError(f"train.generate.prompts {path}: no prompts in it", hint="write one a line")
    texts = [_text(line, f"{path}:{n}") for n, line in enumerate(lines, 1)] if path.suffix == ".jsonl" else lines
    found = []
    for number, text in enumerate(texts, 1):
        try:
            ids = encoder.prompt([{"role": "user", "content": text}])
        except Unusable as problem:
            raise DataError(f"{path}: prompt {number} cannot be used: {problem}") from problem
        if room is not None and len(ids) > room:
            raise DataError(
                f"{path}: prompt {number} has {len(ids):,} tokens, and {room:,} leave room for an answer",
                hint="shorten it, or lower train.generate.max_new_tokens",
            )
        found.append(Prompt(text, np.array(ids, np.int32)))
    return found


def end_of_turn(encoder: PairEncoder) -> tuple[int, ...]:
    """The token that ends a turn in the chat template, where that is one token; not always the tokenizer's EOS."""
    turns = Conversation([{"role": "user", "content": "QUESTION"}], "ANSWER", "OTHER")
    (encoded,) = encoder.encode([turns])
    if isinstance(encoded, Unusable) or not encoder.ends_in_special(encoded.chosen):
        return ()
    return (encoded.chosen[-1],)


def _text(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise DataError(f"{where}: no text under `prompt`")
    return str(row["prompt"])


class Answers:
    """Prompts and their answers so far.

    Args:
        settings: of the recipe.
        prompts: at least one.
        folder: the run's.
        ends: tokens that end an answer beside the tokenizer's and the model's own.
    """

    def __init__(
        self,
        settings: GenerateConfig,
        prompts: Sequence[Prompt],
        tokenizer: Any,
        folder: Path,
        ends: tuple[int, ...] = (),
    ) -> None:
        self.prompts, self.tokenizer, self.path = prompts, tokenizer, folder / TEXTS_FILE
        self.decoding = Decoding(settings.max_new_tokens, settings.temperature, settings.seed)
        self.ends = ends
        self._base: list[Completion] | None = None

    def row(self, policy: Policy, step: int, granted: Granted) -> dict[str, Any]:
        """Have the policy answer, write the texts down, and return the metrics row. The base answers the first time.

        Args:
            granted: called after each token; if it raises, nothing is written.

        Raises:
            SampoError: the disk is full.
        """
        if self._base is None:
            self._base = self._kept() or self._complete_as_base(policy, granted)
        untouched = step == 0 and REFERENCE_ADAPTER not in policy.model.peft_config  # a new adapter adds nothing
        own = self._base if untouched else self._complete(policy, granted)
        for number, (prompt, ours, theirs) in enumerate(zip(self.prompts, own, self._base, strict=True)):
            texts = {"prompt": prompt.text, "answer": ours.text, "base": theirs.text}
            line = {"step": step, "number": number, **texts, **_facts(ours), **_facts(theirs, "base_")}
            metrics.append(self.path, line)
        return {"kind": "generate", "step": step, **numbers(own, self._base)}

    def _complete(self, policy: Policy, granted: Granted) -> list[Completion]:
        prompts = [prompt.ids for prompt in self.prompts]
        ends = self.ends
        return complete(policy, self.tokenizer, prompts, self.decoding, more_ends=ends, each_token=granted)

    def _complete_as_base(self, policy: Policy, granted: Granted) -> list[Completion]:
        with base(policy):
            return self._complete(policy, granted)

    def _kept(self) -> list[Completion] | None:
        """The base's answers as they were written down before a resume."""
        rows = [row for row in metrics.read(self.path) if row["step"] == 0]
        if len(rows) != len(self.prompts):
            return None
        keys = ("base", "base_tokens", "base_ended", "base_repetition")
        return [Completion(*(row[key] for key in keys)) for row in sorted(rows, key=lambda row: row["number"])]


def _facts(answer: Completion, prefix: str = "") -> dict[str, Any]:
    facts = {"tokens": answer.tokens, "ended": answer.ended, "repetition": answer.repetition}
    return {f"{prefix}{key}": value for key, value in facts.items()}


def numbers(own: Sequence[Completion], of_base: Sequence[Completion]) -> dict[str, Any]:
    """The adapter's answers and the base's in numbers: lengths in tokens, shares, and the ratio of mean lengths."""
    row: dict[str, Any] = {"prompts": len(own)}
    for prefix, answers in (("", own), ("base_", of_base)):
        row[f"{prefix}tokens"] = statistics.fmean(one.tokens for one in answers)
        row[f"{prefix}median_tokens"] = statistics.median(one.tokens for one in answers)
        row[f"{prefix}ended"] = statistics.fmean(one.ended for one in answers)
        row[f"{prefix}repetition"] = statistics.fmean(one.repetition for one in answers)
    return {**row, "length_ratio": row["tokens"] / row["base_tokens"]}
