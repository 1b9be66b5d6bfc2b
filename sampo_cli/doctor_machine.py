"""What `sampo doctor` finds of the machine: Python, packages and their versions, memory, room on the disks.

No torch is imported here: a broken one must not keep the rest from being said.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from sampo_cli.cache import cache_folder
from sampo_cli.disk import existing, is_writable

PACKAGE = Path(__file__).resolve().parent
DISTRIBUTION = "sampo-cli"

WATCHED = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "huggingface-hub")
"""Packages whose minor versions have changed what a run computes or how it loads."""

OPTIONAL = {
    "matplotlib": "figures of sampo report",
    "tensorboard": "--report-to tensorboard",
    "wandb": "--report-to wandb",
    "mlflow": "--report-to mlflow",
    "trackio": "--report-to trackio",
    "lm_eval": "sampo eval --suite",
}

GB = 10**9
LOW_GB = {"outputs": 5, "Hub cache": 20, "sampo cache": 5}
"""Below that there is a warning: checkpoints of a few runs; an 8B model in 16 bits; log-probs of 1M pairs."""

LEAST_GB = 1
LOW_MEMORY_GIB = 4


@dataclass(frozen=True)
class Check:
    """What one check found. `advice`: what to do; a check that is ok may have some too."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def pinned_versions() -> dict[str, str]:
    """The versions that the tests ran with, by name: `constraints.txt` of the checkout, which the wheel holds too."""
    places = (PACKAGE / "_constraints.txt", PACKAGE.parent / "constraints.txt")
    lines = next(path for path in places if path.is_file()).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {str(canonicalize_name(name)): number.strip() for name, number in pairs}


def pin(name: str) -> str:
    """What installs the tested version of a package."""
    return f"pip install '{name}=={pinned_versions()[name]}'"


def check_python() -> Iterator[Check]:
    allowed = SpecifierSet(metadata(DISTRIBUTION)["Requires-Python"])
    here = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    if allowed.contains(platform.python_version(), prereleases=True):
        yield Check("Python", "ok", here)
    else:
        yield Check("Python", "fail", here, f"make an environment with Python {allowed}")


def check_packages() -> Iterator[Check]:
    """Missing, outside the range that sampo asks for, newer than what the tests ran with; or one line for all."""
    asked = [Requirement(line) for line in requires(DISTRIBUTION) or ()]
    needed = {str(canonicalize_name(need.name)): need for need in reversed(asked)}  # extras come last, and count less
    here = {name: number for name in needed if (number := _version(name))}
    problems = [check for name, need in needed.items() if (check := _against_range(name, need, here.get(name)))]
    tested = pinned_versions()
    for name in WATCHED:
        if name in here and Version(here[name]).release[:2] > Version(tested[name]).release[:2]:
            found = f"{here[name]} is newer than what the tests ran with, {tested[name]}"
            problems.append(Check(name, "warn", found, f"if something breaks: {pin(name)}"))
    yield from problems
    if not problems:
        shown = ", ".join(f"{name} {here[name]}" for name in WATCHED)
        yield Check("packages", "ok", f"sampo {version(DISTRIBUTION)}, all there in the tested ranges: {shown}")


def _against_range(name: str, need: Requirement, installed: str | None) -> Check | None:
    """What is wrong with a package that sampo or one of its extras asks for."""
    optional = need.marker is not None and not need.marker.evaluate({"extra": ""})
    install = f"pip install '{name}{need.specifier}'"
    if installed is None:
        return None if optional else Check(name, "fail", "not installed", install)
    if need.specifier.contains(installed, prereleases=True):
        return None
    found = f"{installed} is outside the tested range {need.specifier}"
    return Check(name, "warn" if optional else "fail", found, install)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_optional() -> Iterator[Check]:
    there = {name: number for name in OPTIONAL if (number := _version(name))}
    missing = [f"{name} ({use})" for name, use in OPTIONAL.items() if name not in there]
    found = ", ".join(f"{name} {number}" for name, number in there.items()) or "none"
    advice = f"pip install what you want of: {', '.join(missing)}" if missing else ""
    yield Check("optional packages", "ok", found, advice)


def check_memory() -> Iterator[Check]:
    memory = psutil.virtual_memory()
    there_is, free = memory.total / 2**30, memory.available / 2**30
    found = f"{free:.1f} of {there_is:.1f} GiB free, {os.cpu_count()} CPU cores"
    if free < LOW_MEMORY_GIB:
        yield Check("memory", "warn", found, "end other programs: loading and merging a model pass through it")
    else:
        yield Check("memory", "ok", found)


def check_disks() -> Iterator[Check]:
    """Where runs, models and caches go: whether it can be written, and what is free."""
    yield _disk("outputs", Path("outputs"), "give --output on another disk")
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        pass  # the packages' check says so
    else:
        yield _disk("Hub cache", Path(HF_HUB_CACHE), "set HF_HOME to another disk, or `hf cache prune`")
    yield _disk("sampo cache", cache_folder(), "set SAMPO_CACHE to another disk, or sampo cache clear")


def _disk(name: str, path: Path, advice: str) -> Check:
    place = existing(path)
    total, _, free = shutil.disk_usage(place)
    found = f"{free / GB:,.0f} GB free for {path.absolute()}"
    if not is_writable(place):
        return Check(name, "fail", f"{place} is no folder that can be written", advice)
    if total and free < LOW_GB[name] * GB:  # some file systems do not say how large they are
        return Check(name, "fail" if free < LEAST_GB * GB else "warn", found, advice)
    return Check(name, "ok", found)
