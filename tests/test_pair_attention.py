"""Attention in pieces gives what attention under the mask gives: log-probs and gradients, for every architecture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import MistralConfig

from sampo_cli.batch import Draw, Pair, collate
from sampo_cli.model import load_policy
from sampo_cli.pair_attention import LEAST_POSITIONS, NAME, row_bounds
from sampo_cli.policy import Policy, use_pieces
from tests import tiny
from tests.test_layout import make_pairs
from tests.test_trainer import make_recipe

SDPA = ["llama", "mistral", "gemma3", "qwen2", "qwen2-window", "qwen3", "phi3"]


def test_bounds_by_hand() -> None:
    # prompt prompt chosen chosen chosen rejected padding
    segments = torch.tensor([[0, 0, 1, 1, 1, 2, -1], [0, 1, 2, 2, 2, 2, 2]], dtype=torch.int8)
    assert row_bounds(segments) == [(2, 5, 6), (1, 2, 7)]


def outcome(policy: Policy, pieces_from: int | None, pairs: list[Pair]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    policy.pieces_from = pieces_from
    policy.zero_grad()
    weights = list(policy.parameters())
    logps = policy(collate(pairs, Draw("sum", 0, 0)))
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return logps.detach(), [weight.grad.clone() for weight in weights if weight.grad is not None]


@pytest.mark.parametrize("name", SDPA)
def test_pieces_equal_the_mask(name: str) -> None:
    """Three pairs of different lengths in one batch, so with padding; windows of 8 positions fall back to the mask."""
    policy = Policy(tiny.make_model(tiny.CONFIGS[name]()))
    assert use_pieces(policy)
    assert policy.causal_lm.config._attn_implementation == NAME
    assert policy.pieces_from == LEAST_POSITIONS
    for pairs in (make_pairs(), make_pairs()[:1]):
        logps, gradients = outcome(policy, 0, pairs)
        masked, masked_gradients = outcome(policy, None, pairs)
        torch.testing.assert_close(logps, masked, atol=2e-5, rtol=0)
        assert len(gradients) == len(masked_gradients) > 5
        for one, other in zip(gradients, masked_gradients, strict=True):
            torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def calls(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(queries, keys) of every call of torch's attention in a forward pass in pieces."""
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        seen.append((query.shape[2], key.shape[2]))
        return attend(query, key, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    policy.pieces_from = 0
    with torch.no_grad():
        policy(collate([Pair(0, *(np.arange(3, 3 + n, dtype=np.int32) for n in (4, 6, 10)))], Draw("sum", 0, 0)))
    return seen


def test_what_is_computed_is_what_may_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt 4, chosen 6, rejected 10, in 2 layers: 10 x 10 causal, then 10 queries of rejected over 4 + 10 keys."""
    policy = Policy(tiny.make_model(tiny.CONFIGS["llama"]()))
    use_pieces(policy)
    assert calls(policy, monkeypatch) == [(10, 10), (10, 14)] * 2


@pytest.mark.parametrize(("window", "expected"), [(8, [(20, 20)] * 2), (14, [(10, 10), (10, 14)] * 2)])
def test_a_window_that_cuts_into_a_response_keeps_the_mask(
    window: int, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(tiny.make_model(MistralConfig(**tiny.SIZES, sliding_window=window)))
    assert use_pieces(policy)
    assert calls(policy, monkeypatch) == expected


def test_a_loaded_policy_uses_pieces_for_long_rows_and_agrees_with_two_rows(tiny_llama: object) -> None:
    """Rows of 420 positions, under NF4 and checkpointing, against the layout of two rows."""
    recipe = make_recipe(tiny_llama, model={"quantization": "nf4", "dtype": "float32"})
    policy, _ = load_policy(recipe.model, recipe.lora, seed=0)
    generator = np.random.default_rng(0)
    pairs = [Pair(0, *(generator.integers(3, 300, n).astype(np.int32) for n in (150, 120, 150)))]
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    found = {}
    for layout in ("shared", "separate"):
        policy.layout = layout
        policy.zero_grad()
        logps = policy(collate(pairs, Draw("sum", 0, 0), layout))
        logps.mean().backward()
        found[layout] = logps.detach(), [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    torch.testing.assert_close(found["shared"][0], found["separate"][0], atol=1e-4, rtol=0)
    for one, other in zip(found["shared"][1], found["separate"][1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma2", "mamba"])
def test_other_models_are_left_as_they_are(name: str) -> None:
    """Or use pieces, if they pass the keyword on and agree; never anything that differs."""
    policy = Policy(tiny.make_model(tiny.CONFIGS[name]()))
    before = policy.causal_lm.config._attn_implementation
    if name == "mamba":
        policy.layout = "separate"
    used = use_pieces(policy)
    assert policy.causal_lm.config._attn_implementation == (NAME if used else before)
    assert (policy.pieces_from is None) == (not used)
    if name in ("gemma2", "mamba"):
        assert not used
