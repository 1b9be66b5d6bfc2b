"""One forward pass of a `PairBatch`: the model's body over its rows, log-probs of the scored tokens.

Who sees whom in a row is said by `attention.py`, `flex.py` and `pair_attention.py`.

Legend: R rows, S positions of a row, N scored tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sampo_cli.activations import offloaded
from sampo_cli.attention import Masks, row_masks
from sampo_cli.batch import PADDING, Draw, Layout, Pair, PairBatch, collate
from sampo_cli.errors import ModelError
from sampo_cli.flex import FLEX, flat_inputs, flat_length
from sampo_cli.logprobs import Head, token_kl, token_logps
from sampo_cli.pair_attention import LEAST_POSITIONS, NAME, row_bounds

REFERENCE_ADAPTER = "reference"
POLICY_ADAPTER = "default"

FUSED_LAYERS = ("conv1d", "dt_proj", "out_proj", "x_proj")
"""Layers of state-space models whose weights their kernels read directly, past any adapter or quantization."""

HEAD_TOLERANCE = 5e-2
"""Nats per token between our log-probs and those of the model's own logits, which may be rounded once more."""

LEAK_TOLERANCE = 0.25
"""Share of what an open row changes that a shared row may differ from two rows: rounding in 16 bits, never a leak.

SmolLM2-135M in bfloat16 comes to 0.11; without its position ids to 0.43, without its mask to 1.
"""


def is_state_space(model_class: type) -> bool:
    """True for an architecture whose layers carry a state along the row."""
    return bool(getattr(model_class, "_is_stateful", False))


class Policy(nn.Module):
    """A causal language model with adapters, seen as a function from a `PairBatch` to log-probs.

    Args:
        model: a `PeftModel` around a causal language model (or that model itself, without a reference).
        layout: how rows are laid out; `separate` for models that cannot take the mask of a shared row.
        dtype: compute dtype; matrix products run in it under autocast, so that float32 adapters cost no more.
        offload: activations wait for backward in the CPU's memory.

    Attributes:
        pieces_from: positions of a shared row from which on attention is computed in pieces, or None for never.
        sharded: each process keeps a part of the base, so all must run it equally often.
        adapted: the layers with an adapter.
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        layout: Layout = "shared",
        dtype: torch.dtype = torch.float32,
        *,
        offload: bool = False,
    ) -> None:
        super().__init__()
        self.offload = offload
        self.pieces_from: int | None = None
        self.sharded = False
        self.model = model
        self.adapted: list[Any] = [module for module in model.modules() if hasattr(module, "adapter_layer_names")]
        self.layout: Layout = layout
        self.dtype = dtype

    @property
    def causal_lm(self) -> Any:
        """The transformers model, adapters inside."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def head(self) -> Head:
        config = self._text_config
        output = self.causal_lm.get_output_embeddings()
        scaling = getattr(config, "logits_scaling", None)
        return Head(
            weight=output.weight,
            bias=getattr(output, "bias", None),
            scale=1 / scaling if scaling else getattr(config, "logit_scale", None) or 1.0,
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    @property
    def _text_config(self) -> Any:
        return self.causal_lm.config.get_text_config()

    @property
    def flex(self) -> bool:
        """True where all rows run end to end, by flex attention."""
        return self.layout == "shared" and self._text_config._attn_implementation == FLEX

    @property
    def attention(self) -> str:
        """What computes attention: flex, sdpa or eager."""
        name = self._text_config._attn_implementation
        return "flex" if self.flex else "sdpa" if name in (FLEX, NAME) else name

    def computed_positions(self, batch: PairBatch) -> int:
        """Positions that a forward pass of the batch computes, padding included."""
        positions = batch.input_ids.numel()
        return flat_length(positions) if self.flex else positions

    def masks(self, batch: PairBatch) -> Masks:
        """What the model takes as `attention_mask` of rows: one, or one per layer type, or the plain [R, S] one."""
        if self.layout == "separate":
            return (batch.segments != PADDING).long()
        return row_masks(batch, self._text_config, self.causal_lm.get_input_embeddings().weight.dtype)

    def inputs(self, batch: PairBatch) -> dict[str, Any]:
        """What the model's body takes; position [r, s] of the batch is r * S + s of its flattened hidden states."""
        if self.flex:
            return flat_inputs(batch, self._text_config)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": self.masks(batch)}
        if self.layout == "shared":
            inputs["position_ids"] = batch.position_ids
            if self.pieces_from is not None and batch.input_ids.shape[1] >= self.pieces_from:
                inputs["pair_bounds"] = row_bounds(batch.segments)
        return inputs

    def forward(self, batch: PairBatch, reference_NH: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probs of the batch's scored tokens, float32 [N].

        With the reference's hidden states [N, H], also KL(reference || policy) over the vocabulary, float32 [N].
        """
        with self.autocast(batch), offloaded(self.offload, self.model):
            hidden_NH = self.hidden(batch)
            logps_N = token_logps(hidden_NH, batch.targets, self.head())
            if reference_NH is None:
                return logps_N
            return logps_N, token_kl(hidden_NH, reference_NH, self.head())

    def autocast(self, batch: PairBatch) -> torch.autocast:
        return torch.autocast(batch.input_ids.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def hidden(self, batch: PairBatch) -> Tensor:
        """The hidden states that predict the scored tokens, [N, H]."""
        hidden_RSH = self.causal_lm.base_model(**self.inputs(batch), use_cache=False).last_hidden_state
        return hidden_RSH.flatten(0, 1)[batch.positions]


def score_against_reference(policy: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of policy and of reference, and KL(reference || policy) over the vocabulary; float32 [N] each."""
    raw: Any = getattr(policy, "module", policy)
    with reference(policy), raw.autocast(batch):
        reference_NH = raw.hidden(batch)
        reference_logps = token_logps(reference_NH, batch.targets, raw.head())
    policy_logps, kl = policy(batch, reference_NH)
    return policy_logps, reference_logps, kl


@contextmanager
def reference(policy: nn.Module) -> Iterator[None]:
    """Inside, the model is the reference: the frozen adapter of that name if there is one, else adapters off.

    No gradients; the policy's adapter is active again afterwards, whatever happens.
    """
    model: Any = getattr(policy, "module", policy).model
    with torch.no_grad():
        if REFERENCE_ADAPTER not in model.peft_config:
            with base(policy):
                yield
            return
        model.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
        try:
            yield
        finally:
            model.set_adapter(POLICY_ADAPTER)


@contextmanager
def base(policy: nn.Module) -> Iterator[None]:
    """Inside, the model is the base alone: adapters off, also where the reference is an adapter.

    PEFT's own way asks every module for its state first, which takes longer than many a layer's forward pass.
    """
    layers: list[Any] = getattr(policy, "module", policy).adapted  # type: ignore[assignment]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _probe_batch(policy: Policy, layout: Layout) -> PairBatch:
    """One pair of made-up tokens; the rejected response is the longer one, so that it sits after the chosen one."""
    generator = np.random.default_rng(0)
    vocabulary = policy.causal_lm.get_input_embeddings().weight.shape[0]
    prompt, chosen, rejected = (generator.integers(0, vocabulary, n, dtype=np.int32) for n in (9, 7, 11))
    return collate([Pair(0, prompt, chosen, rejected)], Draw("sum", 0, 0), layout).to(policy.causal_lm.device)


@contextmanager
def _probing(policy: Policy, layout: Layout) -> Iterator[None]:
    """Inside: no gradients, no dropout, and `layout`."""
    was, training = policy.layout, policy.training
    policy.layout = layout
    policy.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        policy.layout = was
        policy.train(training)


def check_head(policy: Policy) -> None:
    """Compare our log-probs with the model's own logits on one made-up pair.

    Raises:
        ModelError: they differ: the architecture does something to its logits that `Head` does not know.
    """
    with _probing(policy, "separate"):
        batch = _probe_batch(policy, "separate")
        try:
            ours = policy(batch)
            with policy.autocast(batch):
                logits = policy.causal_lm(batch.input_ids, attention_mask=policy.masks(batch), use_cache=False).logits
        except AttributeError as error:
            raise ModelError(f"this architecture is not supported: {error}") from error
    own_NV = logits.flatten(0, 1)[batch.positions].float().log_softmax(-1)
    difference = (own_NV.gather(1, batch.targets[:, None])[:, 0] - ours).abs().mean().item()
    if difference > HEAD_TOLERANCE:  # not for nan: that is a matter of the weights, and found before the first step
        raise ModelError(
            f"{type(policy.causal_lm).__name__} is not supported: its output layer does more than sampo knows "
            f"(log-probs differ by {difference:.3g} nats a token)",
            hint="train another architecture, or report this one",
        )


def find_layout(policy: Policy) -> tuple[Layout, str]:
    """Test on the loaded model whether it keeps the two responses of a shared row apart.

    Three passes over one made-up pair: two rows, one row, and one row in which everything sees everything before it.
    If the shared row is not far nearer to the two rows than to the open row, the model ignores mask or positions.

    Returns:
        The layout to use, and the reason where it is not the shared one.
    """
    causal_lm = policy.causal_lm
    if is_state_space(type(causal_lm)):
        return "separate", "its layers carry a state along the row"
    if "position_ids" not in inspect.signature(causal_lm.base_model.forward).parameters:
        return "separate", "it takes no position ids"
    with _probing(policy, "separate"):
        apart = policy(_probe_batch(policy, "separate"))
    row = _probe_batch(policy, "shared")
    with _probing(policy, "shared"):
        try:
            shared, together = policy(row), policy(replace(row, segments=torch.zeros_like(row.segments)))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            return "separate", f"it does not take a mask of its own ({type(error).__name__}: {error})"[:200]
    difference, leak = (apart - shared).abs().mean(), (apart - together).abs().mean()
    if not difference < LEAK_TOLERANCE * leak:
        return "separate", f"its log-probs leak between the responses ({difference:.3g} against {leak:.3g})"
    return "shared", ""


def use_pieces(policy: Policy) -> bool:
    """Compute sdpa's attention over shared rows in pieces, if the loaded model then gives the same log-probs."""
    causal_lm = policy.causal_lm
    if policy.layout != "shared" or causal_lm.config._attn_implementation != "sdpa":
        return False
    row = _probe_batch(policy, "shared")
    with _probing(policy, "shared"):
        masked = policy(row)
        causal_lm.set_attn_implementation(NAME)
        policy.pieces_from = 0
        try:
            same = bool(((policy(row) - masked).abs().mean() < HEAD_TOLERANCE).item())
        except TypeError:  # it does not take keywords for its attention
            same = False
    policy.pieces_from = LEAST_POSITIONS if same else None
    if not same:
        causal_lm.set_attn_implementation("sdpa")
    return same
