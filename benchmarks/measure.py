"""Measuring one process: wall and CPU seconds, peak memory, and on what machine.

CPU seconds are those of all threads. Memory is resident memory on the CPU and allocated memory on a GPU; its peak is
measured anew for each step, from the kernel's own high-water mark where it can be reset.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
SAMPLE_SECONDS = 0.01
PACKAGES = ("sampo-cli", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "liger-kernel", "triton")


@dataclass(frozen=True)
class Readings:
    """One stretch of time; `peak_bytes` is everything that the process held, its model included."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


class ResidentPeak:
    """The most resident memory since `start`: the kernel's mark, or samples of a thread where it cannot be reset."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._most = 0

    def start(self) -> None:
        try:
            CLEAR_REFS.write_text("5")  # resets the high-water mark and nothing else
        except OSError:
            self._most = 0
            self._stopped.clear()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self._most = max(self._most, process.memory_info().rss)
            if self._stopped.wait(SAMPLE_SECONDS):
                return

    def stop(self) -> int:
        """Bytes."""
        if self._thread is None:
            return status_bytes("VmHWM")
        self._stopped.set()
        self._thread.join()
        self._thread = None
        return max(self._most, psutil.Process().memory_info().rss)


def status_bytes(name: str) -> int:
    """A field of /proc/self/status that counts kB, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


class Meter:
    """Measures stretches of this process between `start` and `stop`. `device`: a torch device."""

    def __init__(self, device: Any) -> None:
        self.cuda = device.type == "cuda"
        self._resident = ResidentPeak()
        self._began = self._began_cpu = 0.0

    def start(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._resident.start()
        self._began, self._began_cpu = time.perf_counter(), time.process_time()

    def stop(self) -> Readings:
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - self._began, time.process_time() - self._began_cpu
        peak = torch.cuda.max_memory_allocated() if self.cuda else self._resident.stop()
        return Readings(seconds, cpu_seconds, peak)

    def settled_bytes(self, parameters: Iterable[Any]) -> int:
        """What the process holds with its model loaded and nothing else: the line above which a step's peak counts.

        Weights that were mapped from a file are touched first, or the first step would seem to need them in addition;
        and what loading freed is given back to the system.
        """
        gc.collect()
        if self.cuda:
            import torch

            torch.cuda.empty_cache()
            return torch.cuda.memory_allocated()
        for parameter in parameters:
            parameter.detach().flatten()[:: max(1, 4096 // parameter.element_size())].sum()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        return int(psutil.Process().memory_info().rss)


def machine() -> dict[str, Any]:
    """The machine and the versions, as plain data. Starts no CUDA context of its own beyond asking for the name."""
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "usable cores": usable,
        "threads": torch.get_num_threads(),
        "memory GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": versions(),
    }


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
