"""The optimizer that the recipe names, on the device that there is, before and after a checkpoint."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

from sampo_cli.config import TrainConfig
from sampo_cli.errors import UsageError
from sampo_cli.optim import SMALLEST_8BIT, check_optimizer, make_optimizer, rehearsal_optimizer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RATE = 0.01
ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def settings(name: str, **more: Any) -> TrainConfig:
    return TrainConfig(optimizer=name, learning_rate=RATE, **more)


def make_parameters(device: torch.device = CPU) -> list[torch.Tensor]:
    """Matrices whose states bitsandbytes keeps in 32 bits, in 8 bits, and in 8 bits and pages."""
    generator = torch.Generator().manual_seed(0)
    sizes = (SMALLEST_8BIT - 1, SMALLEST_8BIT, 100_000)
    return [torch.randn(size, generator=generator).to(device).requires_grad_() for size in sizes]


def train(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], steps: range) -> None:
    for step in steps:
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            parameter.grad = gradient.to(parameter.device)
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("auto", CPU, torch.optim.AdamW),
        ("auto", CUDA, PagedAdamW8bit),
        ("adamw", CUDA, torch.optim.AdamW),
        ("adamw_8bit", CUDA, AdamW8bit),
        ("adamw_8bit", CPU, AdamW8bit),
        ("paged_adamw_8bit", CUDA, PagedAdamW8bit),
    ],
)
def test_the_optimizer_is_as_named_or_what_the_device_takes(
    name: str, device: torch.device, expected: type[torch.optim.Optimizer]
) -> None:
    optimizer = make_optimizer(make_parameters(), settings(name, weight_decay=0.1), device)
    assert type(optimizer) is expected
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], tuple(group["betas"]), group["eps"]) == (RATE, 0.1, (0.9, 0.999), 1e-8)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_the_first_step_is_the_rate_against_the_gradients_sign(name: str) -> None:
    """m / sqrt(v) is g / |g| after one step, whatever the states are stored in."""
    parameters = make_parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    train(make_optimizer(parameters, settings(name), CPU), parameters, range(1))
    for parameter, was in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.detach(), was - RATE * parameter.grad.sign(), atol=1e-5, rtol=0)


def test_states_are_in_8_bits_but_for_small_tensors() -> None:
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, settings("adamw_8bit"), CPU)
    train(optimizer, parameters, range(1))
    states = [optimizer.state[parameter] for parameter in parameters]
    assert [state["state1"].dtype for state in states] == [torch.float32, torch.uint8, torch.uint8]
    assert [state["state2"].dtype for state in states] == [torch.float32, torch.uint8, torch.uint8]


@pytest.mark.parametrize(
    ("name", "device"),
    [("adamw", CPU), ("adamw_8bit", CPU)]
    + [pytest.param(name, CUDA, marks=ON_CUDA) for name in ("adamw", "adamw_8bit", "paged_adamw_8bit")],
)
def test_a_saved_state_goes_on_bit_by_bit(name: str, device: torch.device, tmp_path: Path) -> None:
    expected = make_parameters(device)
    train(make_optimizer(expected, settings(name), device), expected, range(6))

    parameters = make_parameters(device)
    optimizer = make_optimizer(parameters, settings(name), device)
    train(optimizer, parameters, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = make_optimizer(parameters, settings(name), device)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(again, parameters, range(3, 6))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(parameters, expected, strict=True))

    forgetful = make_parameters(device)
    for steps in (range(3), range(3, 6)):
        train(make_optimizer(forgetful, settings(name), device), forgetful, steps)
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(forgetful, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [("auto", CUDA, AdamW8bit), ("paged_adamw_8bit", CUDA, AdamW8bit), ("adamw", CPU, torch.optim.AdamW)],
)
def test_a_rehearsal_moves_nothing_and_is_not_paged(
    name: str, device: torch.device, expected: type[torch.optim.Optimizer]
) -> None:
    parameters = make_parameters()
    optimizer = rehearsal_optimizer(parameters, settings(name, weight_decay=0.5), device)
    assert type(optimizer) is expected
    train(optimizer, parameters, range(2))
    assert all(torch.equal(ours, fresh) for ours, fresh in zip(parameters, make_parameters(), strict=True))


@pytest.mark.parametrize("name", ["auto", "adamw", "adamw_8bit"])
def test_what_runs_passes(name: str) -> None:
    check_optimizer(settings(name), CPU)


@pytest.mark.parametrize("name", ["auto", "adamw", "adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_optimizer_runs_on_cuda(name: str) -> None:
    check_optimizer(settings(name), CUDA)


def test_pages_on_the_cpu_are_refused_before_the_first_step() -> None:
    with pytest.raises(UsageError, match="paged_adamw_8bit needs a CUDA device") as refused:
        check_optimizer(settings("paged_adamw_8bit"), CPU)
    assert "adamw_8bit" in refused.value.hint


def test_a_bitsandbytes_that_is_not_there_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise ImportError("no such library: libbitsandbytes_cpu.so\nand a long story")
        return usual(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    check_optimizer(settings("auto"), CPU)
    with pytest.raises(UsageError, match=r"adamw_8bit does not run on cpu: no such library: \S+\n") as refused:
        check_optimizer(settings("adamw_8bit"), CPU)
    assert "train.optimizer=adamw" in refused.value.hint
