"""Attention over a shared row in pieces: what no token of it may see is not computed.

With a mask, sdpa computes all S x S scores of a row. But `prompt | chosen` is plain causal attention, which kernels do
at half the cost and without a mask, and a rejected response looks at the prompt and at itself. For long rows that is a
third to a half of the work. A model that does not pass our keyword on is served with the mask, which it gets as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from sampo_cli.batch import CHOSEN, PADDING, PROMPT

NAME = "sampo"
"""Under which transformers knows it, as a value of `attn_implementation`."""

LEAST_POSITIONS = 384
"""Below that, a row's few masked blocks cost less than another call."""

Bounds = list[tuple[int, int, int]]


def row_bounds(segments: Tensor) -> Bounds:
    """Where the prompt, the chosen and the rejected response of each row end; segments are int8 [R, S]."""
    prompt, chosen = (segments == PROMPT).sum(1), (segments == CHOSEN).sum(1)
    whole = (segments != PADDING).sum(1)
    return [tuple(row) for row in torch.stack([prompt, prompt + chosen, whole], 1).tolist()]


def pair_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    pair_bounds: Bounds | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for a layer's attention: [R, heads, S, d] each, gives [R, S, heads, d].

    Without bounds, or where a sliding window cuts into a response, it is transformers' own sdpa.
    """
    window = options.get("sliding_window")
    cut = window is not None and any(max(c, p + e - c) > window for p, c, e in pair_bounds or ())
    if pair_bounds is None or attention_mask is None or cut or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=is_causal, **options)
    rows = [
        _one_row(module, [tensor[row : row + 1] for tensor in (query, key, value, attention_mask)], bounds, options)
        for row, bounds in enumerate(pair_bounds)
    ]
    return torch.cat(rows), None


def _one_row(
    module: torch.nn.Module, tensors: list[Tensor], bounds: tuple[int, int, int], options: dict[str, Any]
) -> Tensor:
    """[1, S, heads, d] of one row from its query, key, value and mask; padding gets zeros."""
    query, key, value, mask = tensors
    prompt, chosen, end = bounds
    first, _ = sdpa_attention_forward(
        module, query[:, :, :chosen], key[:, :, :chosen], value[:, :, :chosen], None, is_causal=True, **options
    )
    seen_key, seen_value = (torch.cat([x[:, :, :prompt], x[:, :, chosen:end]], 2) for x in (key, value))
    seen = torch.cat([mask[:, :, chosen:end, :prompt], mask[:, :, chosen:end, chosen:end]], 3)
    second, _ = sdpa_attention_forward(
        module, query[:, :, chosen:end], seen_key, seen_value, seen, is_causal=False, **options
    )
    padding = first.new_zeros(1, query.shape[2] - end, *first.shape[2:])
    return torch.cat([first, second, padding], 1)


AttentionInterface.register(NAME, pair_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
