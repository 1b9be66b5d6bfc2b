"""One training run, from a resolved recipe to a finished folder.

Nothing is written to the run's folder before the pairs are known to be usable and the model is loaded.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from sampo_cli import checkpoint, metrics
from sampo_cli.adapter import RECORD_FILE
from sampo_cli.card import model_card
from sampo_cli.config import LoraSection, Recipe, read_recipe, validate
from sampo_cli.errors import Interrupted, UsageError
from sampo_cli.lora import lora_section, save_adapter
from sampo_cli.model import ModelFacts, load_policy
from sampo_cli.plan import Plan, check_trackers, clear_abandoned, make_plan, resolve_recipe
from sampo_cli.policy import Policy
from sampo_cli.signals import stop_requests
from sampo_cli.tracking import tracking
from sampo_cli.trainer import Split, Trainer

RESUMABLE_CHANGES = {
    *("train.epochs", "train.max_steps", "train.save_every", "train.keep_checkpoints", "train.tokens_per_microbatch"),
    *("train.pairs_per_microbatch", "train.cache_reference", "train.checkpointing", "train.offload_activations"),
    "output.report_to",
}


STOPPING = "finishing this step, then saving; once more to leave at once"


class RunView(Protocol):
    """What a run tells while it goes; `console.py` has the views."""

    def note(self, text: str) -> None: ...
    def begin(self, folder: Path, steps: int, done: int) -> None: ...
    def train_row(self, row: Mapping[str, Any]) -> None: ...
    def eval_row(self, row: Mapping[str, Any]) -> None: ...


def train(recipe: Recipe, view: RunView, run: Path, resume_from: Path | None = None) -> dict[str, Any]:
    """Run a recipe to its end and return the summary that is also in the run's `summary.json`.

    Args:
        recipe: resolved.
        run: the run's folder; new, unless a run is resumed.
        resume_from: a checkpoint's folder.

    Raises:
        SampoError: of any kind; the folder's state says so.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("several processes are not supported yet", hint="start sampo train without a launcher")
    check_trackers(recipe)
    the_plan = make_plan(recipe, view)
    settings = recipe.train
    policy, facts = load_policy(
        recipe.model,
        recipe.lora,
        seed=settings.seed,
        checkpointing=settings.checkpointing,
        offload=settings.offload_activations,
    )
    recipe = what_was_loaded(recipe, facts, policy, view)
    tell_model(facts, recipe, view)
    pairs = Split(the_plan.dataset, the_plan.train, the_plan.evaluation, the_plan.dataset.where)
    identity = {"the data": the_plan.dataset.fingerprint, "the base": facts.fingerprint}
    if not resume_from:
        clear_abandoned(run)
    run.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(policy, pairs, recipe, the_plan.method, run, view, identity)
    if resume_from:
        trainer.restore(resume_from)
        view.note(f"resuming after step {trainer.progress.step}")
    (run / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
    record = Record(run, replace(the_plan, recipe=recipe), facts, trainer)
    trainer.on_save = lambda: record.write("running")
    view.begin(run, trainer.steps, trainer.progress.step)
    record.write("running")
    try:
        with stop_requests(lambda: view.note(STOPPING)) as stop, tracking(trainer.accelerator, recipe, run):
            trainer.fit(stop)
        finish(trainer, record.plan, facts, run)
    except BaseException as error:
        record.write("interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed")
        raise
    summary = record.write("finished")
    (run / "README.md").write_text(model_card(run), encoding="utf-8")
    return summary


def resume(path: Path, changes: Mapping[str, Any]) -> tuple[Recipe, Path]:
    """The recipe of an earlier run with harmless `changes`, and the checkpoint to go on from.

    Args:
        path: a run's folder or one of its checkpoints.
        changes: a recipe's tree holding only what is to be different.

    Raises:
        UsageError: nothing to resume, or a change that would make it another run.
    """
    run, found = checkpoint.find(path)
    before = read_recipe(run / "recipe.yaml")
    merged = {section: {**values, **changes.get(section, {})} for section, values in before.items()}
    recipe = resolve_recipe(merged | {key: value for key, value in changes.items() if key not in before})
    old, new = validate(before).model_dump(), recipe.model_dump()
    different = [f"{s}.{k}" for s in old for k in old[s] if old[s][k] != new[s][k]]
    refused = [key for key in different if key not in RESUMABLE_CHANGES]
    if refused:
        raise UsageError(
            f"--resume continues the same run, but {', '.join(refused)} would change",
            hint="start a new run for that; allowed: " + ", ".join(sorted(RESUMABLE_CHANGES)),
        )
    return recipe, found


def what_was_loaded(recipe: Recipe, facts: ModelFacts, policy: Policy, view: RunView) -> Recipe:
    """The recipe with what loading decided: the Hub's commit, and the shape of an adapter that was gone on from."""
    actual = lora_section(policy.model) if recipe.model.adapter else recipe.lora
    if recipe.lora not in (LoraSection(), actual):
        view.note("warning: --adapter brings its own rank, scale and layers; the recipe's lora section is not used")
    commit = facts.folder.name if facts.folder.parent.name == "snapshots" else recipe.model.revision
    model = recipe.model.model_copy(update={"revision": commit})
    return recipe.model_copy(update={"lora": actual, "model": model})


def tell_model(facts: ModelFacts, recipe: Recipe, view: RunView) -> None:
    view.note(
        f"model: {facts.quantized_layers} of {facts.linear_layers} linear layers in {recipe.model.quantization}, "
        f"compute {facts.dtype}, on {facts.device}, {facts.parameter_bytes / 2**20:,.0f} MiB"
    )
    share = facts.trainable_parameters / facts.total_parameters
    view.note(
        f"adapter: {facts.trainable_parameters:,} trainable parameters ({share:.2%}) in {facts.adapter_layers} layers, "
        f"float32; reference: {'a frozen copy of ' + recipe.model.adapter if recipe.model.adapter else 'adapter off'}"
    )
    if facts.layout == "separate":
        view.note(f"layout: two rows per pair{f', because {facts.layout_reason}' if facts.layout_reason else ''}")
    if recipe.method.sampling == "independent":
        view.note(
            "warning: sampling=independent draws other positions for the reference, as the released SamPO code does; "
            "margins are noisy even before training"
        )


def finish(trainer: Trainer, the_plan: Plan, facts: ModelFacts, run: Path) -> None:
    """Put the best or the final adapter into `adapter/`, ready to load elsewhere."""
    recipe = the_plan.recipe
    best = run / checkpoint.BEST
    with checkpoint.whole_folder(run / "adapter") as aside:
        if recipe.output.keep == "best" and best.is_dir():
            shutil.copytree(best, aside, dirs_exist_ok=True)
        else:
            save_adapter(trainer.raw_policy, aside)
        the_plan.tokenizer.save_pretrained(aside)
        record = {
            "format": 1,
            "base_model": recipe.model.name,
            "base_revision": recipe.model.revision,
            "base_fingerprint": facts.fingerprint,
            "quantization": recipe.model.quantization,
            "dtype": facts.dtype,
            "method": recipe.method.name,
            "run": run.resolve().name,
        }
        (aside / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


class Record:
    """Writes `summary.json`: what the run is, how far it came, what it reached."""

    def __init__(self, run: Path, the_plan: Plan, facts: ModelFacts, trainer: Trainer) -> None:
        self.run, self.plan, self.facts, self.trainer = run, the_plan, facts, trainer

    def write(self, state: str) -> dict[str, Any]:
        recipe, facts, progress = self.plan.recipe, self.facts, self.trainer.progress
        keeps_best = recipe.output.keep == "best" and progress.best_row is not None
        evaluation = progress.best_row if keeps_best else progress.last_evaluation
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
            "adapter_step": evaluation["step"] if keeps_best and evaluation else progress.step,
            "evaluation": evaluation,
            "rounds": progress.rounds,
            "tokens_per_microbatch": progress.tokens_per_microbatch,
            "generated": None,
            "versions": versions(),
            "device": facts.device,
            "seconds": round(sum(row.get("seconds", 0) for row in metrics.read(self.run / "metrics.jsonl")), 1),
        }
        aside = self.run / "summary.json.tmp"
        aside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        aside.replace(self.run / "summary.json")
        return summary


def versions() -> dict[str, str]:
    """Versions of everything that decides a run's numbers."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
    found = {"sampo": version("sampo-cli"), "python": platform.python_version()}
    return found | {package: version(package) for package in packages}
