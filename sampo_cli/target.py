"""The device that a forecast is for: the one that is here, or a card that is not."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from sampo_cli.model import pick_device, pick_dtype

ON_CPU, ON_CUDA = "cpu", "cuda"

CUDA_CONTEXT = 500 * 2**20
"""What a process takes on a GPU before its first tensor: the driver's context and the libraries' kernels."""

CPU_LIBRARIES = 45 * 2**20
"""What oneDNN keeps from the first step on, compiled kernels and scratch; 31 to 57 MiB with a model of 135M weights."""

HEADROOM = 0.05
"""Share of the memory that is left free: the caching allocator's gaps, and what this forecast does not see."""


@dataclass(frozen=True)
class Device:
    """Where a run will be.

    Attributes:
        kind: "cpu" or "cuda"; it need not be here.
        name: for people.
        memory: bytes that a run may take, all in all.
        framework: bytes that are gone before the first tensor.
    """

    kind: str
    name: str
    memory: int
    framework: int

    def compute_dtype(self, name: str) -> torch.dtype:
        """The dtype that a recipe names, or what `auto` is there; a card that is not here has bfloat16."""
        if name == "auto" and self.kind == ON_CUDA and not torch.cuda.is_available():
            return torch.bfloat16
        return pick_dtype(name, torch.device(self.kind))

    @property
    def room(self) -> int:
        """Bytes for tensors, with some headroom."""
        return self.usable - self.framework

    @property
    def usable(self) -> int:
        """Bytes of `memory` that a run is planned to take."""
        return int(self.memory * (1 - HEADROOM))


def this_device() -> Device:
    """The device that `sampo train` would take here, with the memory that is free now."""
    if pick_device().type == ON_CUDA:
        free, _ = torch.cuda.mem_get_info()  # this process has its context by now
        return Device(ON_CUDA, torch.cuda.get_device_name(), free + CUDA_CONTEXT, CUDA_CONTEXT)
    resident = psutil.Process().memory_info().rss  # torch, transformers and the rest, as a run imports them
    there_is = psutil.virtual_memory().available + resident
    return Device(ON_CPU, "this machine's CPU", there_is, resident + CPU_LIBRARIES)


def named_card(memory: int) -> Device:
    """A CUDA card with so many bytes."""
    return Device(ON_CUDA, "a CUDA card", memory, CUDA_CONTEXT)
