"""Answers of a model to a few prompts: batched, greedy, with their lengths in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sampo_cli.policy import Policy


@dataclass(frozen=True)
class Answer:
    """`tokens` counts the end-of-turn token if the model reached it (`ended`)."""

    prompt: str
    text: str
    tokens: int
    ended: bool


@torch.no_grad()
def answer(policy: Policy, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 256) -> list[Answer]:
    """Greedy answers of the policy to single-turn prompts.

    The prompts run as one left-padded batch.
    """
    ids = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for prompt in prompts
    ]
    causal_lm = policy.causal_lm
    width = max(map(len, ids))
    ends = end_tokens(causal_lm, tokenizer)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    input_ids = torch.tensor([[padding] * (width - len(row)) + row for row in ids], device=causal_lm.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=causal_lm.device)
    was_training = policy.training
    policy.eval()
    device = causal_lm.device.type
    try:
        with torch.autocast(device, dtype=policy.dtype, enabled=policy.dtype != torch.float32):
            rows = causal_lm.generate(
                input_ids=input_ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=padding,
            )[:, width:].tolist()
    finally:
        policy.train(was_training)
    return [_answer(prompt, row, ends, tokenizer) for prompt, row in zip(prompts, rows, strict=True)]


def end_tokens(causal_lm: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's EOS and those of the generation config."""
    configured = causal_lm.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*listed, tokenizer.eos_token_id) if token is not None})


def _answer(prompt: str, row: list[int], ends: list[int], tokenizer: Any) -> Answer:
    stop = next((i for i, token in enumerate(row) if token in ends), None)
    kept = row if stop is None else row[: stop + 1]
    text = tokenizer.decode(kept, skip_special_tokens=True).strip()
    return Answer(prompt, text, len(kept), stop is not None)
