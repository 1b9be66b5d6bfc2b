"""Shared rows for flex attention: all rows end to end, with the blocks in which there is something to see.

Blocks that nobody sees are skipped and no [S, S] mask is stored. Knows no adapter; who sees whom is the same as in
`attention.py`.

Legend: R rows, S positions of a row, T positions of all rows end to end, K blocks of `BLOCK` positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sampo_cli.attention import by_layer_type, pair_mask
from sampo_cli.batch import CHOSEN, PADDING, PROMPT, PairBatch
from sampo_cli.errors import ModelError
from sampo_cli.remote import first_line

FLEX = "sampo_flex"
"""Name under which transformers finds `attend`."""

BLOCK = 128
"""Positions that flex attention takes or skips at a time."""

LEAST_BLOCKS = 2
"""torch compiles a dimension of size 1 on its own; with two blocks at least there is none."""

TRIAL_BLOCKS = (2, 3, 5, 4, 7)
"""Lengths of the trial."""

MOST_GRAPHS = 2
"""Compilations that they may take: torch takes a length for fixed at first, and for variable when another comes."""

TRIAL_TOLERANCE = 0.05
"""Share by which flex may differ from sdpa: rounding in 16 bits, never another mask."""


def flat_length(positions: int) -> int:
    """T: how many positions are computed for so many of all rows, so that they are whole blocks."""
    return BLOCK * max(LEAST_BLOCKS, -(-positions // BLOCK))


def flat_inputs(batch: PairBatch, config: Any) -> dict[str, Any]:
    """A model's inputs for all shared rows of a batch end to end, as one row of `flat_length` positions.

    Position [r, s] becomes r * S + s. With one row of whole blocks only T varies, which is compiled once.
    """
    total = flat_length(batch.segments.numel())

    def flat(values_RS: Tensor) -> Tensor:
        return torch.nn.functional.pad(values_RS.flatten(), (0, total - values_RS.numel()))[None]

    def mask(window: int | None) -> BlockMask:
        return block_mask(spans(batch.segments, batch.position_ids, total, window))

    return {
        "input_ids": flat(batch.input_ids),
        "position_ids": flat(batch.position_ids),
        "attention_mask": by_layer_type(config, mask),
    }


class Spans(NamedTuple):
    """What each position sees: keys k with `first` <= k < `last` of its prompt, and `start` <= k up to itself.

    int32 [T] each.
    """

    first: Tensor
    last: Tensor
    start: Tensor


def spans(segments: Tensor, position_ids: Tensor, total: int, window: int | None = None) -> Spans:
    """`pair_mask` for rows end to end, padded to `total` positions. Padding sees nothing but itself.

    Args:
        segments: [R, S].
        position_ids: [R, S].
    """
    rows, width = segments.shape
    place = torch.arange(width, device=segments.device).expand(rows, width)
    prompt, chosen = ((segments == kind).sum(1) for kind in (PROMPT, CHOSEN))
    begins = torch.stack([torch.zeros_like(prompt), prompt, prompt + chosen], 1)
    start = torch.where(segments == PADDING, place, begins.gather(1, segments.clamp(min=PROMPT).long()))
    last = prompt[:, None] * (segments > PROMPT)
    first = torch.zeros_like(last)
    if window is not None:
        first = torch.minimum(last, (position_ids - window + 1).clamp(min=0))
        start = torch.maximum(start, place - window + 1)
    flat = torch.arange(total, dtype=torch.int32, device=segments.device).repeat(3, 1)
    flat[:2] = 0
    row_starts = torch.arange(0, rows * width, width, device=segments.device)[:, None]
    flat[:, : rows * width] = torch.stack([first, last, start]).add(row_starts).flatten(1)
    return Spans(*flat)


def block_mask(seen: Spans) -> BlockMask:
    """`Spans` as flex attention takes them: which blocks of keys a block of queries sees in part, and which in full."""
    first, last, start = seen
    itself = torch.arange(len(start), dtype=torch.int32, device=start.device)
    low = itself[::BLOCK]

    def keys_in_block(begin_T: Tensor, end_T: Tensor) -> Tensor:
        return torch.minimum(end_T[:, None], low + BLOCK).sub_(torch.maximum(begin_T[:, None], low)).clamp_(min=0)

    keys_TK = keys_in_block(first, last) + keys_in_block(start, itself + 1)
    keys = keys_TK.view(len(low), BLOCK, len(low))
    full_KK = (keys == BLOCK).all(1)
    part_KK = (keys > 0).any(1) & ~full_KK

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ((key >= first[query]) & (key < last[query])) | ((key >= start[query]) & (key <= query))

    return BlockMask.from_kv_blocks(*_listed(part_KK), *_listed(full_KK), BLOCK_SIZE=BLOCK, mask_mod=visible)


def _listed(blocks_KK: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each block of queries has, int32 [1, 1, K], and their numbers first in [1, 1, K, K]."""
    numbers = blocks_KK.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks_KK.sum(1, dtype=torch.int32)[None, None], numbers.int()[None, None]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: flex for a `BlockMask`, sdpa for anything else (two rows, generation)."""
    if not isinstance(attention_mask, BlockMask):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    flex: Any = flex_attention if query.device.type == "cpu" else compiled_flex()
    query, key = query.to(value.dtype), key.to(value.dtype)
    attended = flex(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
    return attended.transpose(1, 2).contiguous(), None


@cache
def compiled_flex() -> Callable[..., Any]:
    """Flex attention compiled. `fullgraph`: else torch runs it uncompiled, with all T x T scores, where that fails."""
    return torch.compile(flex_attention, fullgraph=True)


def use_flex(model: Any) -> None:
    """Switch a transformers model to `attend`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(FLEX, attend)
    AttentionMaskInterface.register(FLEX, sdpa_mask)
    model.set_attn_implementation(FLEX)


def use_attention(model: Any, choice: str) -> str:
    """Switch a model, as transformers loads it, to flex attention if `choice` (auto, flex, ...) says so.

    Returns:
        Why `auto` did not, on a device where it might have; else nothing.

    Raises:
        ModelError: `flex` was asked for and cannot be had.
    """
    on_cuda = model.device.type == "cuda"
    if choice not in ("auto", "flex") or (choice == "auto" and not on_cuda):
        return ""
    if not on_cuda:
        reason = "flex attention trains on CUDA devices only"
    elif not (model._supports_flex_attn and model._supports_sdpa and model._can_set_attn_implementation()):
        reason = f"{type(model).__name__} cannot use flex attention"
    else:
        reason = flex_failure(model)
    if not reason:
        use_flex(model)
    elif choice == "flex":
        raise ModelError(f"model.attention is flex, but {reason}", hint="--set model.attention=auto")
    return reason


def flex_failure(model: Any) -> str:
    """Why compiled flex attention is not to be used for a model on its device, or nothing.

    Forward and backward are tried at a few lengths, with the model's heads, against sdpa: compiling can fail (no
    compiler, too little shared memory for large heads), and a torch that compiles anew for each length is of no use.
    """
    from torch._dynamo.utils import counters

    compiled_before = counters["stats"]["unique_graphs"]
    try:
        worst = torch.stack([_trial(model, blocks * BLOCK) for blocks in TRIAL_BLOCKS]).max().item()
    except Exception as error:  # compilers fail in any way, and wrap what failed
        cause = error.__cause__ or error
        return f"flex attention does not run here ({type(cause).__name__}: {first_line(cause)})"[:300]
    compiled = counters["stats"]["unique_graphs"] - compiled_before
    if compiled > MOST_GRAPHS:
        return f"flex attention was compiled {compiled} times for {len(TRIAL_BLOCKS)} lengths"
    if not worst < TRIAL_TOLERANCE:
        return f"flex attention differs from sdpa by {worst:.1%}"
    return ""


def _trial(model: Any, total: int) -> Tensor:
    """Largest relative difference between flex and sdpa over output and gradients, for a pair of `total` tokens."""
    config, weight = model.config.get_text_config(), model.get_input_embeddings().weight
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    generator = torch.Generator(weight.device).manual_seed(0)

    def random(count: int) -> Tensor:
        shape = (1, total, count, size)
        return torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype).transpose(1, 2)

    inputs = query, key, value = tuple(random(count).requires_grad_() for count in (heads, groups, groups))
    weights, places = random(heads), torch.arange(total, device=weight.device)
    segments = (places[None] // (total // 3 + 1)).to(torch.int8)
    mask = block_mask(spans(segments, places[None], total))
    flex = compiled_flex()(query, key, value, block_mask=mask, scale=size**-0.5, enable_gqa=True)
    sdpa = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=pair_mask(segments, places[None]), enable_gqa=True
    )
    ours, theirs = ((out, *torch.autograd.grad(out, inputs, weights)) for out in (flex, sdpa))
    return torch.stack([(a - b).norm() / b.norm() for a, b in zip(ours, theirs, strict=True)]).max()
