"""What a model answers to prompts: how long, whether it ends, how much it repeats itself.

Prompts are token ids, as the pairs have them, and answers are generated in batches of prompts of like length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sampo_cli.batch import TokenIds
from sampo_cli.errors import is_out_of_memory
from sampo_cli.estimate import Estimate, estimate, mean_of, median_of
from sampo_cli.generate import end_tokens
from sampo_cli.model import context_length
from sampo_cli.policy import Policy

BATCH = 16
"""Prompts answered at a time; fewer where they do not fit."""

NGRAM = 4


@dataclass(frozen=True)
class Decoding:
    """How answers are chosen. `temperature` 0 is greedy; above, from the whole vocabulary.

    An answer also ends where the model's context does.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        tokens: its length, the end-of-turn token included if the model reached it (`ended`).
        repetition: share of its 4-grams that were there before.
    """

    text: str
    tokens: int
    ended: bool
    repetition: float


@dataclass(frozen=True)
class Answering:
    """A model's answers in numbers, with 95 % bootstrap intervals over the prompts; lengths in tokens."""

    mean_tokens: Estimate
    median_tokens: Estimate
    ended: Estimate
    repetition: Estimate


@dataclass(frozen=True)
class GenerationReport:
    """Answers to the same prompts.

    Attributes:
        models: "adapter" and "base", or "base" alone.
        mean_difference, median_difference: adapter minus base, of mean and of median tokens.
    """

    prompts: int
    decoding: Decoding
    models: dict[str, Answering]
    mean_difference: Estimate | None
    median_difference: Estimate | None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return asdict(self)


def complete(
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[TokenIds],
    decoding: Decoding,
    note: Callable[[str], object] = lambda text: None,
) -> list[Completion]:
    """The policy's answers to rendered prompts, in their order.

    A seed gives the same answers to the same prompts on the same machine; what the rest of the process draws is not
    changed by it.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    found: dict[int, Completion] = {}
    devices = [policy.causal_lm.device] if policy.causal_lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(decoding.seed)
        for first in range(0, len(order), BATCH):
            indices = order[first : first + BATCH]
            rows = _generate(policy, tokenizer, [prompts[index] for index in indices], decoding)
            ends = end_tokens(policy.causal_lm, tokenizer)
            found.update((i, completion_of(row, ends, tokenizer)) for i, row in zip(indices, rows, strict=True))
            note(f"answers: {min(first + BATCH, len(order))} of {len(order)}")
    return [found[index] for index in range(len(prompts))]


@torch.no_grad()
def _generate(policy: Policy, tokenizer: Any, prompts: Sequence[TokenIds], decoding: Decoding) -> list[list[int]]:
    """The new tokens of a batch of prompts, padding behind the end included; in halves where it does not fit."""
    causal_lm = policy.causal_lm
    width, ends = max(map(len, prompts)), end_tokens(causal_lm, tokenizer)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    ids = np.stack([np.pad(row, (width - len(row), 0), constant_values=padding) for row in prompts]).astype(np.int64)
    mask = np.stack([np.arange(width) >= width - len(row) for row in prompts]).astype(np.int64)
    room = (context_length(causal_lm.config) or width + decoding.max_new_tokens) - width
    try:
        with torch.autocast(causal_lm.device.type, dtype=policy.dtype, enabled=policy.dtype != torch.float32):
            rows = causal_lm.generate(
                input_ids=torch.from_numpy(ids).to(causal_lm.device),
                attention_mask=torch.from_numpy(mask).to(causal_lm.device),
                eos_token_id=ends or None,
                pad_token_id=padding,
                **choice_of(decoding, room),
            )
        return rows[:, width:].tolist()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(prompts) == 1:
            raise
    half = len(prompts) // 2
    return [row for part in (prompts[:half], prompts[half:]) for row in _generate(policy, tokenizer, part, decoding)]


def choice_of(decoding: Decoding, room: int) -> dict[str, Any]:
    """What `generate` is to be told, whatever a model's own generation config says. `room`: most new tokens."""
    choice: dict[str, Any] = {"do_sample": False}
    if decoding.temperature:
        choice = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
    return {**choice, "max_new_tokens": max(1, min(decoding.max_new_tokens, room)), "repetition_penalty": 1.0}


def completion_of(row: Sequence[int], ends: Sequence[int], tokenizer: Any) -> Completion:
    """The answer in a row of new tokens, with what comes after its end cut off."""
    stop = next((place for place, token in enumerate(row) if token in ends), None)
    kept = row if stop is None else row[: stop + 1]
    text = tokenizer.decode(kept, skip_special_tokens=True).strip()
    return Completion(text, len(kept), stop is not None, repeated_share(row[:stop]))


def repeated_share(tokens: Sequence[int], n: int = NGRAM) -> float:
    """Share of the n-grams of a text that were there before: 0 for one that says nothing twice."""
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def summarise(answers: dict[str, list[Completion]], decoding: Decoding) -> GenerationReport:
    """The answers of "base" and, if there is one, "adapter", to the same prompts in the same order."""
    lengths = {name: _column([answer.tokens for answer in given]) for name, given in answers.items()}
    models = {
        name: Answering(
            mean_of(lengths[name]),
            median_of(lengths[name]),
            mean_of(_column([answer.ended for answer in given])),
            mean_of(_column([answer.repetition for answer in given])),
        )
        for name, given in answers.items()
    }
    return GenerationReport(
        prompts=len(answers["base"]),
        decoding=decoding,
        models=models,
        mean_difference=_difference(lengths, np.mean),
        median_difference=_difference(lengths, np.median),
    )


def _difference(lengths: dict[str, NDArray[np.float64]], average: Callable[..., Any]) -> Estimate | None:
    """Adapter minus base; the same prompts are drawn for both."""
    if "adapter" not in lengths:
        return None
    adapter, base = lengths["adapter"], lengths["base"]
    return estimate(lambda drawn: float(average(adapter[drawn]) - average(base[drawn])), len(base))


def _column(values: Sequence[float]) -> NDArray[np.float64]:
    return np.asarray(values, np.float64)
