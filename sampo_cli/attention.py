"""Who sees whom in the rows of a `PairBatch`: the masks for sdpa and eager attention.

Runs no model. What flex attention takes instead of a mask is `flex.py`'s.

Legend: R rows, S positions of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sampo_cli.batch import PROMPT, PairBatch

Masks = Tensor | dict[str, Tensor]


def pair_mask(segments: Tensor, position_ids: Tensor, window: int | None = None) -> Tensor:
    """Who sees whom in a shared row: bool [R, 1, S, S], True where the query (third axis) may look at the key.

    A response sees the prompt and itself, never the other response; with a sliding `window`, only what lies less
    than `window` positions back. Nothing looks at padding but padding itself.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    size = segments.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=segments.device).tril()
    mask = causal & ((key == PROMPT) | (key == query))
    if window is not None:
        mask &= position_ids[:, :, None] - position_ids[:, None, :] < window
    return mask[:, None]


def layer_windows(config: Any) -> dict[str, int | None]:
    """Sliding window (or None) by layer type, of the types that a model has; one entry if all layers are alike.

    Raises:
        ValueError: the model has layers that are neither full nor sliding-window attention.
    """
    kinds = sorted(set(getattr(config, "layer_types", None) or []))
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"layers of type {', '.join(sorted(unknown))}")
    window = getattr(config, "sliding_window", None)
    if not kinds:
        return {"all": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def by_layer_type(config: Any, mask: Callable[[int | None], Any]) -> Any:
    """`mask` of each window that a model has: one, or a dictionary by layer type, as transformers takes it."""
    masks = {kind: mask(window) for kind, window in layer_windows(config).items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def row_masks(batch: PairBatch, config: Any, dtype: torch.dtype) -> Masks:
    """The masks of shared rows, [R, 1, S, S]: boolean, or numbers of `dtype` to add where attention is eager."""

    def mask(window: int | None) -> Tensor:
        visible = pair_mask(batch.segments, batch.position_ids, window)
        if config._attn_implementation != "eager":
            return visible
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)

    return by_layer_type(config, mask)
