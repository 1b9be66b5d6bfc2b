"""Optimizer and schedule, from bitsandbytes, torch and transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sampo_cli.config import TrainConfig


def make_optimizer(parameters: Sequence[Tensor], settings: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (0.9, 0.999, 1e-8): torch's, or bitsandbytes' paged 8-bit one."""
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw_8bit" or (settings.optimizer == "auto" and device.type == "cuda"):
        from bitsandbytes.optim import PagedAdamW8bit

        return PagedAdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, **options)


def rehearsal_optimizer(
    parameters: Sequence[Tensor], settings: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """One that takes as much memory and moves nothing. Not paged: bitsandbytes never gives paged memory back."""
    paged = settings.optimizer == "paged_adamw_8bit" or (settings.optimizer == "auto" and device.type == "cuda")
    still = {"learning_rate": 0.0, "weight_decay": 0.0, "optimizer": "adamw_8bit" if paged else settings.optimizer}
    return make_optimizer(parameters, settings.model_copy(update=still), device)


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
