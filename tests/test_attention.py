"""Who sees whom: masks by hand, the same in blocks for flex attention, and the same log-probs from both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from sampo_cli.attention import layer_windows, pair_mask
from sampo_cli.batch import Draw, Pair, PairBatch, collate
from sampo_cli.config import LoraSection, ModelConfig
from sampo_cli.errors import ModelError
from sampo_cli.flex import BLOCK, block_mask, flat_length, flex_failure, spans, use_attention, use_flex
from sampo_cli.model import load_policy
from sampo_cli.policy import Policy, check_head, find_layout
from tests import tiny
from tests.test_layout import make_pairs

FLEXIBLE = ["llama", "mistral", "gemma3", "qwen2", "qwen2-window", "qwen3", "phi3", "gpt_neox"]


def traced() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def batch_of(pairs: int = 3) -> PairBatch:
    return collate(make_pairs()[:pairs], Draw("sum", 0, 0))


def test_mask_by_hand() -> None:
    # prompt prompt chosen chosen rejected padding
    segments = torch.tensor([[0, 0, 1, 1, 2, -1]], dtype=torch.int8)
    positions = torch.tensor([[0, 1, 2, 3, 2, 0]])
    expected = ["100000", "110000", "111000", "111100", "110010", "110001"]
    assert ["".join(str(int(x)) for x in row) for row in pair_mask(segments, positions)[0, 0]] == expected
    # A window of 2 positions: the rejected token (position 2) sees position 1 and itself.
    expected = ["100000", "110000", "011000", "001100", "010010", "110001"]
    assert ["".join(str(int(x)) for x in row) for row in pair_mask(segments, positions, 2)[0, 0]] == expected


def test_unknown_layer_types_are_named() -> None:
    config = tiny.CONFIGS["gemma3"]()
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="linear_attention"):
        layer_windows(config)


def test_spans_by_hand() -> None:
    # Row 0: prompt prompt chosen chosen rejected padding; row 1: prompt chosen rejected rejected rejected rejected
    segments = torch.tensor([[0, 0, 1, 1, 2, -1], [0, 1, 2, 2, 2, 2]], dtype=torch.int8)
    positions = torch.tensor([[0, 1, 2, 3, 2, 0], [0, 1, 1, 2, 3, 4]])
    seen = spans(segments, positions, 14)
    assert seen.first.tolist() == [0, 0, 0, 0, 0, 0, 6, 6, 6, 6, 6, 6, 0, 0]
    assert seen.last.tolist() == [0, 0, 2, 2, 2, 0, 6, 7, 7, 7, 7, 7, 0, 0]
    assert seen.start.tolist() == [0, 0, 2, 2, 4, 5, 6, 7, 8, 8, 8, 8, 12, 13]
    # A window of 2 positions: the last rejected token (position 4) sees position 3 and itself.
    seen = spans(segments, positions, 14, 2)
    assert seen.first.tolist() == [0, 0, 1, 2, 1, 0, 6, 6, 6, 7, 7, 7, 0, 0]
    assert seen.start.tolist() == [0, 0, 2, 2, 4, 5, 6, 7, 8, 8, 9, 10, 12, 13]


@pytest.mark.parametrize("window", [None, 3, 300])
def test_rows_end_to_end_see_what_each_row_sees(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    prompt, chosen, rejected = torch.randint(100, 500, (3, 3), generator=generator)
    rows, width = 3, int((prompt + chosen + rejected).max())
    segments = torch.full((rows, width), -1, dtype=torch.int8)
    positions = torch.zeros(rows, width, dtype=torch.long)
    for row, (p, c, r) in enumerate(zip(prompt.tolist(), chosen.tolist(), rejected.tolist(), strict=True)):
        segments[row, : p + c + r] = torch.tensor([0] * p + [1] * c + [2] * r)
        positions[row, : p + c + r] = torch.tensor([*range(p + c), *range(p, p + r)])
    total = flat_length(rows * width)
    mask = block_mask(spans(segments, positions, total, window))
    expected = torch.zeros(total, total, dtype=torch.bool)
    for row, visible in enumerate(pair_mask(segments, positions, window)[:, 0]):
        place = slice(row * width, (row + 1) * width)
        expected[place, place] = visible
    dense = create_mask(mask.mask_mod, None, None, total, total, "cpu")[0, 0]
    real = torch.nn.functional.pad(segments.flatten() >= 0, (0, total - rows * width))
    assert torch.equal(dense[real], expected[real])
    assert torch.equal(dense[~real], torch.eye(total, dtype=torch.bool)[~real])
    # The blocks are those that torch finds by looking at every pair of positions.
    theirs = create_block_mask(mask.mask_mod, None, None, total, total, device="cpu", BLOCK_SIZE=BLOCK)
    for ours, other in ((mask.kv_num_blocks, theirs.kv_num_blocks), (mask.q_num_blocks, theirs.q_num_blocks)):
        assert torch.equal(ours, other)
    assert torch.equal(mask.full_kv_num_blocks, theirs.full_kv_num_blocks)
    assert bool(mask.full_kv_num_blocks.sum() > 0) == (window != 3)
    assert torch.equal(mask.to_dense(), theirs.to_dense())
    assert torch.equal(mask.kv_indices, theirs.kv_indices)
    assert torch.equal(mask.full_kv_indices, theirs.full_kv_indices)


def test_lengths_are_whole_blocks_and_two_at_least() -> None:
    assert [flat_length(n) for n in (1, 128, 256, 257, 4096, 4097)] == [256, 256, 256, 384, 4096, 4224]


def flexible(name: str) -> Policy:
    policy = Policy(tiny.make_model(tiny.CONFIGS[name]()))
    use_flex(policy.causal_lm)
    return policy


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", FLEXIBLE)
def test_flex_gives_the_log_probs_of_sdpa(name: str) -> None:
    batch = batch_of()
    with torch.no_grad():
        expected = Policy(tiny.make_model(tiny.CONFIGS[name]()))(batch)
        policy = flexible(name)
        assert policy.flex
        torch.testing.assert_close(policy(batch), expected, atol=2e-5, rtol=0)
        assert find_layout(policy) == ("shared", "")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_torch_traces_flex_attention_twice_for_any_lengths_and_numbers_of_pairs() -> None:
    generator, policy = np.random.default_rng(0), flexible("gemma3")  # two masks, one per layer type
    torch._dynamo.reset()
    before, seen = traced(), set()
    for pairs in (1, 1, 2, 3, 5, 8, 1, 4, 6, 2, 7):
        rows = generator.integers(1, 90, (pairs, 3))
        made = [Pair(i, *(generator.integers(3, 300, n, dtype=np.int32) for n in row)) for i, row in enumerate(rows)]
        with torch.no_grad():
            policy(collate(made, Draw("sum", 0, 0)))
        seen.add(policy.computed_positions(collate(made, Draw("sum", 0, 0))))
    assert len(seen) == 5
    assert traced() - before == 2


def test_a_device_on_which_flex_does_not_run_is_found_by_trial() -> None:
    """Such as a CPU, for which torch has no backward pass."""
    assert "does not run here" in flex_failure(tiny.make_model(tiny.CONFIGS["llama"]()))


def test_gradients_of_rows_end_to_end_are_those_of_rows() -> None:
    """Torch has no backward pass of flex attention on a CPU, so the flat row runs under its mask, written out."""
    batch = batch_of()
    gradients = []
    for flat in (False, True):
        policy = flexible("gemma3") if flat else Policy(tiny.make_model(tiny.CONFIGS["gemma3"]()))
        inputs = policy.inputs(batch)
        if flat:
            total = inputs["input_ids"].shape[1]
            inputs["attention_mask"] = {
                kind: create_mask(mask.mask_mod, None, None, total, total, "cpu")
                for kind, mask in inputs["attention_mask"].items()
            }
        hidden = policy.causal_lm.base_model(**inputs, use_cache=False).last_hidden_state
        hidden.flatten(0, 1)[batch.positions].square().sum().backward()
        gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def test_two_rows_and_generation_run_as_under_sdpa() -> None:
    plain, flex = Policy(tiny.make_model(tiny.CONFIGS["mistral"]()), "separate"), flexible("mistral")
    check_head(flex)
    flex.layout = "separate"
    assert not flex.flex
    batch = collate(make_pairs(), Draw("sum", 0, 0), "separate")
    with torch.no_grad():
        assert torch.equal(flex(batch), plain(batch))
    prompt = torch.tensor([[0, 5, 6, 7], [8, 9, 10, 11]])
    options = {"attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(flex.causal_lm.generate(prompt, **options), plain.causal_lm.generate(prompt, **options))


def test_what_is_computed_is_counted() -> None:
    batch = batch_of()  # three rows of 40 positions
    assert Policy(tiny.make_model(tiny.CONFIGS["llama"]())).computed_positions(batch) == 120
    policy = flexible("llama")
    assert policy.computed_positions(batch) == policy.inputs(batch)["input_ids"].numel() == 256


@pytest.mark.parametrize(("choice", "expected"), [("auto", "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")])
def test_a_loaded_policy_says_what_computes_its_attention(tiny_llama: Path, choice: str, expected: str) -> None:
    config = ModelConfig(name=str(tiny_llama), quantization="none", attention=choice)
    policy, facts = load_policy(config, LoraSection(), seed=0)
    assert (facts.attention, facts.kernels, policy.flex) == (expected, "none", False)


def test_without_a_gpu_auto_changes_nothing_and_flex_is_refused() -> None:
    model = tiny.make_model(tiny.CONFIGS["llama"]())
    for choice in ("auto", "sdpa", "eager"):
        assert use_attention(model, choice) == ""
        assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ModelError, match="CUDA devices only") as refused:
        use_attention(model, "flex")
    assert "model.attention=auto" in refused.value.hint
    assert model.config._attn_implementation == "sdpa"
