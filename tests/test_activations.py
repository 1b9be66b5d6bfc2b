"""Checkpointing and offload change where activations are and how often they are computed, never a number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import rotate_half

from sampo_cli import activations
from sampo_cli.activations import Checkpointing, Offload, offload_note, offloaded, set_checkpointing
from sampo_cli.batch import Draw, PairBatch, collate
from sampo_cli.config import LoraSection, ModelConfig
from sampo_cli.lora_linear import join_adapters
from sampo_cli.model import load_policy
from sampo_cli.policy import Policy, reference
from tests import tiny
from tests.test_layout import make_pairs

POLICIES: tuple[Checkpointing, ...] = get_args(Checkpointing)
ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu.default"
LAYERS = tiny.SIZES["num_hidden_layers"]


def load(
    folder: Path, checkpointing: Checkpointing, quantization: str = "none", dtype: str = "float32", **lora: Any
) -> Policy:
    """A policy whose adapter has an effect, so that all of its matrices have gradients."""
    config = ModelConfig(name=str(folder), quantization=quantization, dtype=dtype)
    policy, _ = load_policy(config, LoraSection(**lora), seed=1, checkpointing=checkpointing)
    torch.manual_seed(9)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return policy


def make_batch(policy: Policy) -> PairBatch:
    return collate(make_pairs(), Draw("sum", 0, 0), policy.layout).to(policy.causal_lm.device)


def backward(policy: Policy, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a loss that weighs every token differently, with the log-probs themselves."""
    (logps * torch.linspace(-1, 1, len(logps), device=logps.device)).sum().backward()
    found = {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    return found | {"log-probs": logps.detach()}


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    return backward(policy, policy(make_batch(policy)))


def assert_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []


class CountOps(TorchDispatchMode):
    """Inside, `counts` has how often each operator ran, by name and, for matrix products, by [inputs, outputs]."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(op)] += 1
        if op is torch.ops.aten.mm.default:
            self.counts[tuple(args[1].shape)] += 1
        return op(*args, **(kwargs or {}))


@contextmanager
def watched(offload: Offload) -> Iterator[list[tuple[torch.Tensor, bool]]]:
    """Inside `offload`, every tensor that autograd saves, and whether it moved."""
    seen = []
    pack = offload.pack_hook

    def record(tensor: torch.Tensor) -> Any:
        packed = pack(tensor)
        seen.append((tensor, isinstance(packed, tuple)))
        return packed

    offload.pack_hook = record
    with offload:
        yield seen


def checkpoint(policy: Policy, checkpointing: Checkpointing) -> None:
    """What `load_policy` does."""
    set_checkpointing(policy.causal_lm, checkpointing)
    join_adapters(policy, checkpointing)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_neox", "qwen3"])
def test_what_is_computed_again_gives_the_same_gradients(name: str, quantization: str, tmp_path: Path) -> None:
    policy = load(tiny.save_model(tiny.CONFIGS[name](), tmp_path / name), "none", quantization)
    expected = gradients(policy)
    for checkpointing in ("all", "selective"):
        checkpoint(policy, checkpointing)
        assert_equal(gradients(policy), expected)


def test_checkpointing_under_autocast_gives_the_same_gradients(tiny_llama: Path) -> None:
    policy = load(tiny_llama, "none", dtype="bfloat16")
    expected = gradients(policy)
    for checkpointing in ("all", "selective"):
        checkpoint(policy, checkpointing)
        assert_equal(gradients(policy), expected)


@pytest.mark.parametrize(
    ("checkpointing", "attention", "narrowing", "widening"),
    # Widening: gate and up, 64 to 128, computed by forward, and by backward once more under checkpointing. Backward
    # itself multiplies by the transposed weight of down, 64 to 128 too: 3 and 5 a layer.
    [("none", 1, 3, 3), ("all", 2, 4, 5), ("selective", 1, 3, 5)],
)
def test_what_is_kept_is_not_computed_again(
    checkpointing: Checkpointing, attention: int, narrowing: int, widening: int, tiny_llama: Path
) -> None:
    policy = load(tiny_llama, checkpointing)
    with CountOps() as mode:
        gradients(policy)
    counts = mode.counts
    assert counts[ATTENTION] == attention * LAYERS
    # Narrowing: down, 128 to 64, and in backward gate and up, whose transposed weights go from 128 to 64.
    assert counts[128, 64] == narrowing * LAYERS
    assert counts[64, 128] == widening * LAYERS


def test_a_4_bit_projection_is_kept(tiny_llama: Path) -> None:
    policy = load(tiny_llama, "none", "nf4")
    counts = []
    for checkpointing in ("none", "all", "selective"):
        checkpoint(policy, checkpointing)
        with CountOps() as mode:
            gradients(policy)
        counts.append(mode.counts["bitsandbytes.gemm_4bit.default"])
    # A layer has seven: q, k, v, o, gate, up, down. Down is kept.
    assert counts == [7 * LAYERS, 14 * LAYERS, 13 * LAYERS]


class RotateInPlace(torch.autograd.Function):
    """Rotary embeddings as a fused kernel does them: into the memory of its inputs, behind autograd's back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        x.data.copy_(x * cos + rotate_half(x) * sin)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return grads[0] * cos - rotate_half(grads[0] * sin), None, None


def test_kernels_that_rotate_keys_in_place_do_not_spoil_what_is_kept(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rotated(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **_: Any) -> tuple[Any, Any]:
        return RotateInPlace.apply(q, cos[:, None], sin[:, None]), RotateInPlace.apply(k, cos[:, None], sin[:, None])

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotated)
    # No adapter on the keys: what the kernel gets is what the projection gave, not a sum of it.
    policy = load(tiny_llama, "all", targets=["q_proj", "v_proj"])
    expected = gradients(policy)
    checkpoint(policy, "selective")
    assert_equal(gradients(policy), expected)


def test_the_reference_computes_nothing_twice(tiny_llama: Path) -> None:
    policy = load(tiny_llama, "none")
    counts = []
    for checkpointing in ("none", "all", "selective"):
        checkpoint(policy, checkpointing)
        batch = make_batch(policy)
        with reference(policy), CountOps() as mode:
            policy(batch)
        counts.append(mode.counts)
    assert counts[0][ATTENTION] == LAYERS
    assert counts[0] == counts[1] == counts[2]


def test_a_model_that_cannot_checkpoint_is_left_alone() -> None:
    model = tiny.make_model(tiny.CONFIGS["llama"]())
    model.supports_gradient_checkpointing = False
    set_checkpointing(model, "all")
    assert not model.is_activation_checkpointing


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("checkpointing", POLICIES)
def test_what_moved_away_comes_back_as_it_was(
    checkpointing: Checkpointing, quantization: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "SMALLEST_BYTES", 1024)
    policy = load(tiny_llama, checkpointing, quantization)
    expected = gradients(policy)
    policy.zero_grad()
    batch = make_batch(policy)
    with watched(Offload(policy.model)) as seen:
        logps = policy(batch)
    assert_equal(backward(policy, logps), expected)
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*policy.parameters(), *policy.buffers())}
    moved = [tensor for tensor, has_moved in seen if has_moved]
    assert not any(tensor.untyped_storage().data_ptr() in weights for tensor in moved)
    assert all(tensor.nbytes >= 1024 for tensor in moved)
    hidden = (*batch.input_ids.shape, 64)
    if checkpointing == "none":
        # Autograd did save weights, the frozen ones of linear layers and the adapter's; they stayed.
        assert sum(tensor.untyped_storage().data_ptr() in weights and tensor.nbytes >= 1024 for tensor, _ in seen) > 14
        assert len(moved) > 20 * LAYERS
    else:
        # The layers' inputs, twice the final norm's, and the head's gradient of the 57 scored tokens.
        assert [tuple(tensor.shape) for tensor in moved] == [hidden] * (LAYERS + 2) + [(57, 64)]


def test_strides_survive_and_an_expanded_view_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "SMALLEST_BYTES", 16)
    offload = Offload(torch.nn.Linear(2, 2))
    turned = torch.arange(12.0).view(3, 4).t()
    away = offload.pack_hook(turned)
    assert away[1].data_ptr() != turned.data_ptr()
    back = offload.unpack_hook(away)
    assert back.stride() == (1, 4)
    assert torch.equal(back, turned)
    expanded = torch.arange(4.0).expand(100, 4)  # 16 bytes that a copy would make 1600
    assert offload.pack_hook(expanded) is expanded
    small = torch.arange(3.0)
    assert offload.pack_hook(small) is small


def test_on_the_cpu_offload_does_nothing_and_says_so(tiny_llama: Path) -> None:
    model = tiny.make_model(tiny.CONFIGS["llama"]())
    if not torch.cuda.is_available():
        assert not isinstance(offloaded(True, model), Offload)
    assert not isinstance(offloaded(False, model), Offload)
    with torch.no_grad():
        assert not isinstance(offloaded(True, model), Offload)
    assert "does nothing on the CPU" in offload_note(True, torch.device("cpu"))
    assert offload_note(True, torch.device("cuda")) is None
    assert offload_note(False, torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("checkpointing", POLICIES)
def test_offload_lowers_the_peak_of_device_memory(checkpointing: Checkpointing, tmp_path: Path) -> None:
    config = LlamaConfig(
        **(tiny.SIZES | {"hidden_size": 1024, "intermediate_size": 1024, "head_dim": 256, "num_hidden_layers": 12})
    )
    policy = load(tiny.save_model(config, tmp_path / "wide"), checkpointing)
    pairs = [pair for _ in range(8) for pair in make_pairs()]
    batch = collate(pairs, Draw("sum", 0, 0), policy.layout).to(policy.causal_lm.device)
    peaks, found = {}, {}
    for offload in (False, True):
        policy.offload = offload
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found[offload] = backward(policy, policy(batch))
        peaks[offload] = torch.cuda.max_memory_allocated() - before
        policy.zero_grad()
    layer_input = batch.input_ids.numel() * 1024 * 4
    # All inputs but those of a layer or two that are on their way.
    assert peaks[True] < peaks[False] - 8 * layer_input
    for name, gradient in found[True].items():
        torch.testing.assert_close(gradient, found[False][name])
