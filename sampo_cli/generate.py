"""Answers of a model to prompts: in batches, greedy or drawn with a seed, with what they are in numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteriaList

from sampo_cli.batch import TokenIds
from sampo_cli.errors import is_out_of_memory
from sampo_cli.model import context_length
from sampo_cli.policy import Policy

BATCH = 16
"""Prompts answered at a time, where the caller says nothing else."""

FIRST_STRETCH = 64
"""New tokens after which answers that have ended leave the batch; each later stretch is twice as long."""

NGRAM = 4


@dataclass(frozen=True)
class Decoding:
    """How answers are chosen. `temperature` 0 is greedy; above, from the whole vocabulary.

    An answer also ends where the model's context does.
    """

    max_new_tokens: int = 256
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
class Answer:
    """`tokens` counts the end-of-turn token if the model reached it (`ended`)."""

    prompt: str
    text: str
    tokens: int
    ended: bool


def answer(policy: Policy, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 256) -> list[Answer]:
    """Greedy answers of the policy to single-turn prompts."""
    ids = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for prompt in prompts
    ]
    given = complete(policy, tokenizer, [np.array(row, np.int32) for row in ids], Decoding(max_new_tokens))
    return [Answer(prompt, one.text, one.tokens, one.ended) for prompt, one in zip(prompts, given, strict=True)]


def complete(
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[TokenIds],
    decoding: Decoding,
    note: Callable[[str], object] = lambda text: None,
    *,
    batch: int = BATCH,
    more_ends: Sequence[int] = (),
    each_token: Callable[[], object] = lambda: None,
) -> list[Completion]:
    """The policy's answers to rendered prompts, in their order.

    Batches hold rows of like length. They are made in stretches, after which the answers that have ended leave, so that
    one that never ends does not keep its whole batch waiting; the next stretch reads the unfinished ones as prompts.

    A seed gives the same answers to the same prompts on the same machine; what the rest of the process draws is not
    changed by it. The policy comes back in the mode (training or not) that it was in.

    Args:
        note: told how far it is, after each batch.
        batch: most prompts answered at a time; fewer where they do not fit.
        more_ends: tokens that end an answer beside the tokenizer's and the model's own.
        each_token: called after each token of a batch; what it raises ends this.
    """
    ends = end_tokens(policy.causal_lm, tokenizer, more_ends)
    context = context_length(policy.causal_lm.config)
    rows: list[list[int]] = [[] for _ in prompts]
    unfinished, stretch = list(range(len(prompts))), FIRST_STRETCH
    with _evaluating(policy), own_draws(policy.causal_lm.device, decoding.seed):
        while unfinished:
            texts = {index: np.append(prompts[index], np.array(rows[index], np.int32)) for index in unfinished}
            unfinished.sort(key=lambda index: -len(texts[index]))
            done = len(prompts) - len(unfinished)
            for first in range(0, len(unfinished), batch):
                indices = unfinished[first : first + batch]
                left = min(decoding.max_new_tokens - len(rows[index]) for index in indices)
                part = replace(decoding, max_new_tokens=min(stretch, left))
                given = _generate(policy, tokenizer, [texts[index] for index in indices], part, ends, each_token)
                for index, row in zip(indices, given, strict=True):
                    rows[index] += up_to_end(row, ends)
                    done += _is_over(rows[index], len(prompts[index]), decoding, ends, context)
                note(f"answers: {done} of {len(prompts)}")
            unfinished = [i for i in unfinished if not _is_over(rows[i], len(prompts[i]), decoding, ends, context)]
            stretch *= 2
    return [completion_of(row, ends, tokenizer) for row in rows]


def _is_over(row: Sequence[int], prompt: int, decoding: Decoding, ends: Sequence[int], context: int | None) -> bool:
    """Whether an answer goes on no further: it ended, or has no room, after a prompt of so many tokens."""
    full = len(row) >= decoding.max_new_tokens or (context is not None and prompt + len(row) >= context)
    return full or row[-1] in ends


@contextmanager
def _evaluating(policy: Policy) -> Iterator[None]:
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)


@contextmanager
def own_draws(device: torch.device, seed: int) -> Iterator[None]:
    """Inside, torch draws from `seed`; afterwards from where it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def _generate(
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[TokenIds],
    decoding: Decoding,
    ends: Sequence[int],
    each_token: Callable[[], object],
) -> list[list[int]]:
    """The new tokens of a left-padded batch, padding behind the end included; in halves where it does not fit."""
    causal_lm = policy.causal_lm
    width = max(map(len, prompts))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    ids = np.stack([np.pad(row, (width - len(row), 0), constant_values=padding) for row in prompts]).astype(np.int64)
    mask = np.stack([np.arange(width) >= width - len(row) for row in prompts]).astype(np.int64)

    def go_on(input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        each_token()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    room = (context_length(causal_lm.config) or width + decoding.max_new_tokens) - width
    try:
        with torch.autocast(causal_lm.device.type, dtype=policy.dtype, enabled=policy.dtype != torch.float32):
            rows = causal_lm.generate(
                input_ids=torch.from_numpy(ids).to(causal_lm.device),
                attention_mask=torch.from_numpy(mask).to(causal_lm.device),
                use_cache=True,
                stopping_criteria=StoppingCriteriaList([go_on]),
                eos_token_id=list(ends) or None,
                pad_token_id=padding,
                **choice_of(decoding, room),
            )
        return rows[:, width:].tolist()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(prompts) == 1:
            raise
    half = len(prompts) // 2
    parts = (prompts[:half], prompts[half:])
    return [row for part in parts for row in _generate(policy, tokenizer, part, decoding, ends, each_token)]


def choice_of(decoding: Decoding, room: int) -> dict[str, Any]:
    """What `generate` is to be told, whatever a model's own generation config says. `room`: most new tokens."""
    choice: dict[str, Any] = {"do_sample": False}
    if decoding.temperature:
        choice = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
    return {**choice, "max_new_tokens": max(1, min(decoding.max_new_tokens, room)), "repetition_penalty": 1.0}


def end_tokens(causal_lm: Any, tokenizer: Any, more: Sequence[int] = ()) -> list[int]:
    """Tokens that end an answer: the tokenizer's EOS, those of the generation config, and more."""
    configured = causal_lm.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*listed, tokenizer.eos_token_id, *more) if token is not None})


def completion_of(row: Sequence[int], ends: Sequence[int], tokenizer: Any) -> Completion:
    """The answer in a row of new tokens, with what comes after its end cut off."""
    kept = up_to_end(row, ends)
    ended = bool(kept) and kept[-1] in ends
    text = tokenizer.decode(kept, skip_special_tokens=True).strip()
    return Completion(text, len(kept), ended, repeated_share(kept[:-1] if ended else kept))


def up_to_end(row: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The tokens of an answer without the padding behind its end."""
    stop = next((place for place, token in enumerate(row) if token in ends), len(row))
    return list(row[: stop + 1])


def repeated_share(tokens: Sequence[int], n: int = NGRAM) -> float:
    """Share of the n-grams of a text that were there before: 0 for one that says nothing twice."""
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
