"""Optimizer and schedule, from bitsandbytes, torch and transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sampo_cli.config import TrainConfig
from sampo_cli.errors import UsageError
from sampo_cli.remote import first_line

SMALLEST_8BIT = 4096
"""bitsandbytes: the states of tensors with fewer elements stay in 32 bits."""


def optimizer_name(settings: TrainConfig, device: torch.device) -> str:
    """`adamw`, `adamw_8bit` or `paged_adamw_8bit`: as named, or what `auto` is on this device."""
    if settings.optimizer != "auto":
        return settings.optimizer
    return "paged_adamw_8bit" if device.type == "cuda" else "adamw"


def make_optimizer(parameters: Sequence[Tensor], settings: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (0.9, 0.999, 1e-8): torch's, or bitsandbytes' with states in 8 bits (arXiv 2110.02861), paged or not."""
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    name = optimizer_name(settings, device)
    if name == "adamw":
        return torch.optim.AdamW(parameters, **options)
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    return (PagedAdamW8bit if name == "paged_adamw_8bit" else AdamW8bit)(parameters, **options)


def rehearsal_optimizer(
    parameters: Sequence[Tensor], settings: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """One that takes as much memory and moves nothing. Not paged: bitsandbytes never gives paged memory back."""
    name = optimizer_name(settings, device).removeprefix("paged_")
    still = {"learning_rate": 0.0, "weight_decay": 0.0, "optimizer": name}
    return make_optimizer(parameters, settings.model_copy(update=still), device)


def check_optimizer(settings: TrainConfig, device: torch.device) -> None:
    """Let bitsandbytes' optimizers take a step on a tensor of zeros, not to fail at the end of the first real step.

    Raises:
        UsageError: it does not run here.
    """
    name = optimizer_name(settings, device)
    if name == "adamw":
        return
    if name == "paged_adamw_8bit" and device.type == "cpu":
        raise UsageError(
            "train.optimizer=paged_adamw_8bit needs a CUDA device: there is nothing to page from on the CPU",
            hint="use train.optimizer=auto, adamw or adamw_8bit",
        )
    trial = torch.zeros(SMALLEST_8BIT, device=device, requires_grad=True)
    trial.grad = torch.zeros_like(trial)
    try:
        rehearsal_optimizer([trial], settings, device).step()
    except Exception as error:  # whatever bitsandbytes raises where it has no kernel
        raise UsageError(
            f"train.optimizer={name} does not run on {device}: {first_line(error)}",
            hint="update bitsandbytes (on the CPU it takes 0.50), or use train.optimizer=adamw",
        ) from error


def make_scheduler(
    optimizer: torch.optim.Optimizer, settings: TrainConfig, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """transformers' linear, cosine or constant schedule after a linear warm-up."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if settings.scheduler == "constant" else settings.scheduler
    warmup = int(settings.warmup_ratio * steps)
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def set_rate(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Give the next step the rate of this schedule: after a resume with another length the saved one is stale."""
    scheduler._last_lr = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


def memory_bytes(device: torch.device) -> int:
    """Peak allocated bytes on a GPU, resident bytes of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return int(psutil.Process().memory_info().rss)
