"""The state of a training run as files: what a checkpoint's folder holds, written and read back.

Folders that are there whole or not at all are `checkpoint.py`'s; here is what goes into one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sampo_cli.checkpoint import STATE_FILE
from sampo_cli.errors import UsageError
from sampo_cli.lora import load_adapter_weights, save_adapter
from sampo_cli.optim import set_rate
from sampo_cli.policy import Policy

FORMAT = 1


@dataclass(frozen=True)
class Machinery:
    """What moves in training and must be put back as it was. `scaler` is float16's loss scaler, or None."""

    policy: Policy
    optimizer: Any
    scheduler: Any
    scaler: Any


@dataclass
class Progress:
    """What a checkpoint restores beside weights and optimizer; `rounds`: the last evaluation of each that is over."""

    step: int = 0
    round: int = 0
    rounds: list[dict[str, Any] | None] = field(default_factory=list)
    rewards: dict[str, Any] | None = None
    best: float | None = None
    best_row: dict[str, Any] | None = None
    last_evaluation: dict[str, Any] | None = None
    zero_gradients: int = 0
    tokens_per_microbatch: int | None = None


def generator_states() -> dict[str, torch.Tensor]:
    """torch's random generators, of the CPU and of the GPU in use."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def write_state(folder: Path, machinery: Machinery, progress: Mapping[str, Any], identity: Mapping[str, str]) -> None:
    """Adapter, optimizer, schedule, loss scaler, generators and `progress` (plain values) into `folder`."""
    save_adapter(machinery.policy, folder)
    state = {
        "format": FORMAT,
        "identity": dict(identity),
        "progress": dict(progress),
        "optimizer": machinery.optimizer.state_dict(),
        "scheduler": machinery.scheduler.state_dict(),
        "scaler": machinery.scaler.state_dict() if machinery.scaler else None,
        "generators": generator_states(),
    }
    torch.save(state, folder / STATE_FILE)


def load_state(folder: Path, identity: Mapping[str, str]) -> dict[str, Any]:
    """What `write_state` wrote, on the CPU; `state["progress"]` is the progress.

    Raises:
        UsageError: the checkpoint is of another version, or `identity` (fingerprints by name) is not what it was.
    """
    state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    if state["format"] != FORMAT:
        raise UsageError(f"{folder}: a checkpoint of format {state['format']}, and this sampo reads {FORMAT}")
    changed = [name for name, value in identity.items() if state["identity"].get(name) != value]
    if changed:
        raise UsageError(
            f"cannot resume: {' and '.join(changed)} changed since {folder.name}",
            hint="put back what was there, or start a new run",
        )
    return dict(state)


def put_back(state: Mapping[str, Any], folder: Path, machinery: Machinery) -> None:
    """Make everything that moves what it was when `state` was written into `folder`."""
    load_adapter_weights(machinery.policy, folder)
    machinery.optimizer.load_state_dict(state["optimizer"])
    machinery.scheduler.load_state_dict(state["scheduler"])
    set_rate(machinery.optimizer, machinery.scheduler)
    if machinery.scaler and state["scaler"]:
        machinery.scaler.load_state_dict(state["scaler"])
    restore_generators(state["generators"])
