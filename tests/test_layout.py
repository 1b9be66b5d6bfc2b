"""One row per pair equals separate rows, for every architecture; what cannot take the mask is found out."""

from __future__ import annotations

from functools import wraps

import numpy as np
import pytest
import torch

from sampo_cli.batch import Draw, Pair, collate
from sampo_cli.errors import ModelError
from sampo_cli.policy import Policy, check_head, find_layout
from tests import tiny

ATTENTION = [name for name in tiny.CONFIGS if name != "mamba"]


def make_pairs() -> list[Pair]:
    generator = np.random.default_rng(3)
    lengths = [(12, 5, 14), (20, 17, 3), (3, 9, 9)]
    return [Pair(i, *(generator.integers(3, 300, n).astype(np.int32) for n in row)) for i, row in enumerate(lengths)]


def plain_logps(model: torch.nn.Module, pair: Pair) -> torch.Tensor:
    """Log-probs of chosen then rejected from the model's own logits, one unpadded row each: nothing of ours."""
    parts = []
    for response in (pair.chosen, pair.rejected):
        ids = torch.from_numpy(np.concatenate([pair.prompt, response])).long()
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].float()
        logps = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        parts.append(logps[len(pair.prompt) - 1 :])
    return torch.cat(parts)


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("name", ATTENTION)
def test_layouts_agree_with_the_models_own_logits(name: str, layout: str) -> None:
    model = tiny.make_model(tiny.CONFIGS[name]())
    pairs = make_pairs()
    with torch.no_grad():
        ours = Policy(model, layout)(collate(pairs, Draw("sum", 0, 0), layout))
    theirs = torch.cat([plain_logps(model, pair) for pair in pairs])
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ATTENTION)
def test_every_attention_model_takes_the_shared_row(name: str) -> None:
    assert find_layout(Policy(tiny.make_model(tiny.CONFIGS[name]()))) == ("shared", "")


def test_a_state_space_model_falls_back_to_two_rows() -> None:
    model = tiny.make_model(tiny.CONFIGS["mamba"]())
    policy = Policy(model)
    layout, reason = find_layout(policy)
    assert layout == "separate"
    assert "state" in reason
    pairs = make_pairs()
    with torch.no_grad():
        ours = Policy(model, "separate")(collate(pairs, Draw("sum", 0, 0), "separate"))
    torch.testing.assert_close(ours, torch.cat([plain_logps(model, pair) for pair in pairs]), atol=2e-5, rtol=0)


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_a_model_that_ignores_the_mask_or_the_positions_is_found_by_its_numbers(ignored: str) -> None:
    model = tiny.make_model(tiny.CONFIGS["llama"]())
    body = model.base_model
    forward = body.forward
    body.forward = wraps(forward)(lambda **inputs: forward(**{**inputs, ignored: None}))
    layout, reason = find_layout(Policy(model))
    assert layout == "separate"
    assert "leak" in reason


def test_a_model_that_refuses_the_mask_is_caught() -> None:
    model = tiny.make_model(tiny.CONFIGS["llama"]())
    body = model.base_model
    forward = body.forward

    @wraps(forward)
    def two_dimensional_only(**inputs: torch.Tensor) -> object:
        if inputs["attention_mask"].ndim != 2:
            raise ValueError("expected a 2-D mask")
        return forward(**inputs)

    body.forward = two_dimensional_only
    layout, reason = find_layout(Policy(model))
    assert layout == "separate"
    assert "expected a 2-D mask" in reason


def test_a_model_without_position_ids_gets_two_rows() -> None:
    model = tiny.make_model(tiny.CONFIGS["llama"]())
    body = model.base_model
    forward = body.forward
    body.forward = lambda input_ids, attention_mask, use_cache: forward(input_ids, attention_mask, use_cache=use_cache)
    assert find_layout(Policy(model)) == ("separate", "it takes no position ids")


def test_an_output_layer_that_does_more_is_refused() -> None:
    model = tiny.make_model(tiny.CONFIGS["llama"]())
    check_head(Policy(model))
    forward = model.forward

    def scaled(*arguments: object, **options: object) -> object:
        output = forward(*arguments, **options)
        output.logits = output.logits * 0.5
        return output

    model.forward = scaled
    with pytest.raises(ModelError, match="output layer does more"):
        check_head(Policy(model))
