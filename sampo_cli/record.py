"""`summary.json`: what a run is, how far it came, what it reached; also while it goes, and if it fails."""

from __future__ import annotations

import json
import platform
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sampo_cli import ranks
from sampo_cli.disk import write_text
from sampo_cli.errors import SampoError
from sampo_cli.model import ModelFacts
from sampo_cli.plan import Plan
from sampo_cli.state import Progress
from sampo_cli.trainer import Trainer


class Record:
    """Writes the file of one run.

    Attributes:
        resumed: for each resume, the step after which and what was different.
    """

    def __init__(self, run: Path, the_plan: Plan, facts: ModelFacts, trainer: Trainer) -> None:
        self.run, self.plan, self.facts, self.trainer = run, the_plan, facts, trainer
        self.resumed: list[dict[str, Any]] = []

    def resume(self, entry: dict[str, Any]) -> None:
        """Add to the resumes so far, which are taken from the file."""
        try:
            before = json.loads((self.run / "summary.json").read_text(encoding="utf-8"))
            earlier = list(before["resumed"])
        except (OSError, ValueError, KeyError, TypeError):
            earlier = []
        self.resumed = [*earlier, entry]

    def leave(self, state: str) -> None:
        """Write the state that a failed run is left in, if the disk takes it; the failure is what is to be heard of."""
        with suppress(SampoError, OSError, MemoryError):
            self.write(state)

    def write(self, state: str) -> dict[str, Any]:
        recipe, facts, progress = self.plan.recipe, self.facts, self.trainer.progress
        keeps_best = recipe.output.keep == "best" and progress.best_row is not None
        evaluation = progress.best_row if keeps_best else progress.last_evaluation
        adapter_step = evaluation["step"] if keeps_best and evaluation else progress.step
        folder = facts.folder
        counts = asdict(self.plan.dataset.counts)
        summary = {
            "format": 1,
            "state": state,
            "model": {
                "name": recipe.model.name,
                "revision": recipe.model.revision,
                "commit": folder.name if folder.parent.name == "snapshots" else None,
                "fingerprint": facts.fingerprint,
                "quantization": recipe.model.quantization,
                "dtype": facts.dtype,
                "adapter": recipe.model.adapter,
            },
            "method": recipe.method.model_dump(),
            "pairs": {**counts, "train": len(self.plan.train), "eval": len(self.plan.evaluation)},
            "steps": {"done": progress.step, "planned": self.trainer.steps},
            "adapter_step": adapter_step,
            "evaluation": evaluation,
            "rounds": progress.rounds,
            "skipped_steps": progress.skipped,
            "resumed": self.resumed,
            "tokens_per_microbatch": progress.tokens_per_microbatch,
            "stopped_early": self.trainer.stopped_early(),
            "generated": _generated(progress, adapter_step),
            "versions": versions(),
            "device": facts.device,
            "processes": ranks.count(),
            "seconds": round(self.trainer.journal.seconds, 1),
        }
        if ranks.is_first():
            write_text(self.run / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary


def _generated(progress: Progress, step: int) -> dict[str, Any] | None:
    """Mean lengths in tokens of the answers of the adapter of `step`, if it gave any."""
    for row in (progress.generated, progress.best_generated):
        if row and row["step"] == step:
            return {"prompts": row["prompts"], "base_tokens": row["base_tokens"], "adapter_tokens": row["tokens"]}
    return None


@cache
def versions() -> dict[str, str]:
    """Versions of everything that decides a run's numbers."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
    found = {"sampo": version("sampo-cli"), "python": platform.python_version()}
    return found | {package: version(package) for package in packages}
