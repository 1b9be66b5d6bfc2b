"""The state of a training run as files: what a checkpoint's folder holds, written and read back.

Folders that are there whole or not at all are `checkpoint.py`'s; here is what goes into one. The first process of a run
writes, all read, and nothing in it belongs to one of them: another number of processes may go on.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sampo_cli import ranks
from sampo_cli.checkpoint import (
    BEST,
    FORMAT,
    SEAL,
    STATE_FILE,
    damage,
    link_folder,
    prune,
    read_seal,
    seal,
    step_folder,
    whole_folder,
)
from sampo_cli.disk import folder_bytes
from sampo_cli.early_stopping import Waiting
from sampo_cli.errors import UsageError, is_out_of_memory
from sampo_cli.lora import adopt_reference, load_adapter_weights, save_adapter
from sampo_cli.optim import set_rate
from sampo_cli.policy import Policy
from sampo_cli.remote import first_line

BYTES_BESIDE, BYTES_PER_TENSOR = 2**16, 1536
"""Of a checkpoint, beside its tensors' contents: settings and seal; names and places of each trained tensor."""

EIGHT_BIT_FROM = 4096


@dataclass(frozen=True)
class Machinery:
    """What moves in training and must be put back as it was. `scaler` is float16's loss scaler, or None."""

    policy: Policy
    optimizer: Any
    scheduler: Any
    scaler: Any


@dataclass
class Progress:
    """What a checkpoint restores beside weights and optimizer.

    Attributes:
        rounds: the last evaluation of each that is over.
        evaluation_due: the step was taken, and the evaluation after it was not; `generation_due`, the answers.
        generated: the row of the newest answers; `best_generated`, of the best adapter's if it gave any.
        stopping: what early stopping has seen.
        skipped: steps that changed nothing, as something was not finite; `skipped_in_a_row`, up to the last step.
    """

    step: int = 0
    round: int = 0
    rounds: list[dict[str, Any] | None] = field(default_factory=list)
    rewards: dict[str, Any] | None = None
    best: float | None = None
    best_row: dict[str, Any] | None = None
    last_evaluation: dict[str, Any] | None = None
    evaluation_due: bool = False
    generation_due: bool = False
    generated: dict[str, Any] | None = None
    best_generated: dict[str, Any] | None = None
    stopping: Waiting = field(default_factory=Waiting)
    zero_gradients: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    tokens_per_microbatch: int | None = None

    @property
    def due(self) -> bool:
        """The step was taken, and not all that comes after it."""
        return self.evaluation_due or self.generation_due

    def plain(self) -> dict[str, Any]:
        """Plain values, for `from_plain`."""
        return {**vars(self), "stopping": dict(vars(self.stopping))}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Progress:
        return cls(**{**values, "stopping": Waiting(**values.get("stopping", {}))})


def generator_states() -> dict[str, torch.Tensor]:
    """torch's random generators, of the CPU and of the GPU in use."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def draw_apart(seed: int, step: int) -> None:
    """Let dropout in the other processes draw other numbers than in the first; nothing else draws while training."""
    if ranks.rank():
        torch.manual_seed(int(np.random.default_rng((seed, step, ranks.rank())).integers(2**63)))


def restore_generators(states: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def write_state(folder: Path, machinery: Machinery, progress: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Adapter, optimizer, schedule, loss scaler, generators and `progress` (plain values) into `folder`; then its seal.

    Args:
        facts: for the seal: "identity" (fingerprints by name) and "recipe".
    """
    save_adapter(machinery.policy, folder)
    state = {
        "progress": dict(progress),
        "optimizer": machinery.optimizer.state_dict(),
        "scheduler": machinery.scheduler.state_dict(),
        "scaler": machinery.scaler.state_dict() if machinery.scaler else None,
        "generators": generator_states(),
    }
    torch.save(state, folder / STATE_FILE)
    seal(folder, {"step": progress["step"], **facts})


def save_checkpoint(run: Path, machinery: Machinery, progress: Progress, facts: Mapping[str, Any], keep: int) -> None:
    """A checkpoint of a run's folder, its best adapter inside; of the older ones, `keep` less one stay."""
    if not ranks.is_first():
        return
    with whole_folder(step_folder(run, progress.step), checkpoint_bytes(machinery)) as aside:
        link_folder(run / BEST, aside / BEST)
        write_state(aside, machinery, progress.plain(), facts)
    prune(run, keep)


def write_best(run: Path, machinery: Machinery) -> None:
    """The policy's adapter, as the best so far."""
    if not ranks.is_first():
        return
    with whole_folder(run / BEST, adapter_bytes(machinery)) as aside:
        save_adapter(machinery.policy, aside)


def write_round(folder: Path, machinery: Machinery) -> None:
    """The policy's adapter at the end of a round, which is the reference of the next; there when this returns."""
    if ranks.is_first():
        with whole_folder(folder, adapter_bytes(machinery)) as aside:
            save_adapter(machinery.policy, aside)
            seal(aside, {})
    ranks.wait()


def load_round(folder: Path, machinery: Machinery) -> None:
    """Make what `write_round` wrote the frozen reference.

    Raises:
        UsageError: it is not there any more as it was.
    """
    if problem := damage(folder):
        raise UsageError(
            f"cannot resume: the reference of this round is damaged: {problem}",
            hint="put it back, or resume from a checkpoint of an earlier round",
        )
    adopt_reference(machinery.policy, folder)


def refuse_other_format(folder: Path) -> dict[str, Any]:
    """The seal of a checkpoint that this sampo can read.

    Raises:
        UsageError: it was written by another.
    """
    found = read_seal(folder)
    if found["format"] != FORMAT:
        raise UsageError(
            f"{folder / SEAL}: a checkpoint of format {found['format']}, and this sampo reads {FORMAT}",
            hint="go on with the sampo that wrote it (summary.json has its version), or start a new run",
        )
    return found


def load_state(folder: Path, identity: Mapping[str, str]) -> dict[str, Any]:
    """What `write_state` wrote, on the CPU; `state["progress"]` is the progress.

    Raises:
        UsageError: the checkpoint is of another version, cannot be read, or `identity` (fingerprints by name) is not
            what it was.
    """
    before = refuse_other_format(folder).get("identity", {})
    changed = {name: (before.get(name, "none"), value) for name, value in identity.items() if before.get(name) != value}
    if changed:
        lines = "".join(f"\n  {name}: {old} → {new}" for name, (old, new) in changed.items())
        raise UsageError(
            f"cannot resume: {' and '.join(changed)} changed since {folder.name}:{lines}",
            hint="put back what was there, or start a new run",
        )
    try:
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        Progress.from_plain(state["progress"])
    except pickle.UnpicklingError as error:
        raise _unusable(folder, "it holds more than numbers, texts and tensors, and could run code") from error
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise _unusable(folder, first_line(error)) from error
    return dict(state)


def _unusable(folder: Path, reason: str) -> UsageError:
    return UsageError(
        f"{folder / STATE_FILE}: not the state of a run: {reason}",
        hint="resume from another checkpoint of the run, by its folder",
    )


def put_back(state: Mapping[str, Any], folder: Path, machinery: Machinery) -> None:
    """Make everything that moves what it was when `state` was written into `folder`."""
    load_adapter_weights(machinery.policy, folder)
    machinery.optimizer.load_state_dict(state["optimizer"])
    machinery.scheduler.load_state_dict(state["scheduler"])
    set_rate(machinery.optimizer, machinery.scheduler)
    if machinery.scaler and state["scaler"]:
        machinery.scaler.load_state_dict(state["scaler"])
    restore_generators(state["generators"])


def checkpoint_bytes(machinery: Machinery) -> int:
    """What a checkpoint takes at most, its best adapter not counted.

    A float32 adapter, and AdamW's two moments of it: in float32, or by bitsandbytes in 8 bits with a float32 scale for
    each 256 of them where a tensor has `EIGHT_BIT_FROM` elements.
    """
    optimizer = getattr(machinery.optimizer, "optimizer", machinery.optimizer)
    eight_bit = type(optimizer).__module__.startswith("bitsandbytes")
    sizes = [parameter.numel() for group in optimizer.param_groups for parameter in group["params"]]
    moments = sum(n * (2 * (1 + 4 / 256) if eight_bit and n >= EIGHT_BIT_FROM else 8) for n in sizes)
    return int(adapter_bytes(machinery) + moments) + BYTES_BESIDE + BYTES_PER_TENSOR * len(sizes)


def adapter_bytes(machinery: Machinery) -> int:
    """What the policy's adapter takes as a file, its tokenizer not counted."""
    return sum(4 * p.numel() for p in machinery.policy.parameters() if p.requires_grad)


def bytes_to_come(run: Path, machinery: Machinery, keep: int, rounds: int) -> int:
    """What a run will still write at most: checkpoints with a best adapter each, best/, rounds/ and adapter/."""
    adapter, whole = adapter_bytes(machinery), checkpoint_bytes(machinery)
    in_all = (keep + 1) * (whole + adapter) + (rounds + 1) * adapter  # the newest is there before the oldest goes
    return max(in_all - folder_bytes(run), whole + adapter)
