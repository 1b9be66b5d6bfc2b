"""Fused kernels go into one model and nowhere else, or stay out and say why.

Liger itself runs on GPUs only (tests/test_gpu.py); here a library of its name and its ways stands in for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from sampo_cli.batch import Draw, collate
from sampo_cli.config import LoraSection
from sampo_cli.errors import ModelError
from sampo_cli.kernels import replace_parts, replaced_parts, use_kernels
from sampo_cli.lora import add_adapter
from sampo_cli.policy import Policy, reference
from tests import tiny
from tests.test_layout import make_pairs

HUGGING_FACES_ROTARY = modeling_llama.apply_rotary_pos_emb


class OwnMLP(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class WrongMLP(OwnMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * OwnMLP.forward(self, x)


def own_rotary(*arguments: Any, **options: Any) -> Any:
    own_rotary.calls += 1
    return HUGGING_FACES_ROTARY(*arguments, **options)


def put_into(model: Any, mlp: type = OwnMLP, **options: Any) -> None:
    """What Liger does: classes and functions of the architecture's module, then the modules of the model."""
    assert options == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    modeling_llama.apply_rotary_pos_emb = own_rotary
    modeling_llama.LlamaMLP = mlp
    modeling_llama.something_new = 1
    for layer in model.base_model.layers:
        layer.mlp.forward = mlp.forward.__get__(layer.mlp)
        layer.mlp._get_name = lambda: "LigerOwnMLP"


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    """Installs a function as the library's."""

    def install(function: Callable) -> None:
        for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"):
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)
        module._apply_liger_kernel_to_instance = function
        own_rotary.calls = 0

    return install


def llama() -> Any:
    return tiny.make_model(tiny.CONFIGS["llama"]())


def test_without_a_gpu_auto_and_none_change_nothing(liger: Callable) -> None:
    liger(put_into)
    model = llama()
    assert [use_kernels(model, choice) for choice in ("auto", "none")] == ["none", "none"]
    assert replaced_parts(model) == []


def test_what_cannot_be_had_is_an_error_that_says_what_to_do(liger: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    liger(put_into)
    with pytest.raises(ModelError, match="need a CUDA device") as refused:
        use_kernels(llama(), "liger")
    assert "model.kernels=auto" in refused.value.hint
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ModelError, match="Liger is not installed") as refused:
        use_kernels(llama(), "liger")
    assert refused.value.hint == "pip install liger-kernel"


def test_one_model_gets_them_and_no_other(liger: Callable) -> None:
    liger(put_into)
    before = dict(vars(modeling_llama))
    model, other, tokens = llama(), llama(), torch.tensor([[5, 6, 7, 8]])
    assert replace_parts(model) == ""
    assert replaced_parts(model) == ["OwnMLP", "rotary"]
    assert dict(vars(modeling_llama)) == before
    own_rotary.calls = 0
    expected = other(tokens).logits
    assert own_rotary.calls == 0
    torch.testing.assert_close(model(tokens).logits, expected)
    assert own_rotary.calls == 2  # layers
    assert replaced_parts(other) == replaced_parts(llama()) == []


def test_kernels_that_compute_something_else_are_taken_out(liger: Callable) -> None:
    liger(lambda model, **options: put_into(model, WrongMLP, **options))
    model, tokens = llama(), torch.tensor([[5, 6, 7, 8]])
    assert "hidden states differ by" in replace_parts(model)
    assert replaced_parts(model) == []
    assert torch.equal(model(tokens).logits, llama()(tokens).logits)


def test_kernels_that_do_not_run_are_taken_out(liger: Callable) -> None:
    def half_way(model: Any, **options: Any) -> None:
        put_into(model, **options)
        raise RuntimeError("no compiler\nin sight")

    liger(half_way)
    before, model = dict(vars(modeling_llama)), llama()
    assert replace_parts(model) == "Liger's kernels do not run here (RuntimeError: no compiler)"
    assert replaced_parts(model) == []
    assert dict(vars(modeling_llama)) == before


def test_adapters_stay_in_effect_and_can_be_switched_off(liger: Callable) -> None:
    liger(put_into)
    batch, outcomes = collate(make_pairs(), Draw("sum", 0, 0)), []
    for with_kernels in (False, True):
        model = llama().requires_grad_(False)
        assert not with_kernels or replace_parts(model) == ""
        policy = Policy(add_adapter(model, LoraSection(r=4), seed=0))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1, generator=generator)
        logps = policy(batch)
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        with reference(policy):
            before = policy(batch)
        outcomes.append([before, logps.detach()] + [p.grad for p in policy.parameters() if p.grad is not None])
    assert (outcomes[0][0] - outcomes[0][1]).abs().mean() > 0.1
    assert len(outcomes[0]) == 2 + 2 * 14
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other)
