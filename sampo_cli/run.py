"""One training run, from a resolved recipe to a finished folder.

Nothing is written to the run's folder before the pairs are known to be usable and the model is loaded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from sampo_cli import checkpoint, ranks
from sampo_cli.activations import offload_note
from sampo_cli.adapter import RECORD_FILE
from sampo_cli.answers import Answers, end_of_turn
from sampo_cli.card import model_card
from sampo_cli.config import LoraSection, Recipe, merge, read_recipe, validate
from sampo_cli.disk import check_room, write_text
from sampo_cli.errors import Interrupted, UsageError
from sampo_cli.feed import Split
from sampo_cli.identity import change_lines, identity_of, recipe_changes
from sampo_cli.lock import held
from sampo_cli.lora import lora_section, save_adapter
from sampo_cli.model import ModelFacts, load_policy, pick_device
from sampo_cli.optim import check_optimizer
from sampo_cli.plan import Plan, check_trackers, clear_abandoned, make_plan, resolve_recipe
from sampo_cli.policy import Policy
from sampo_cli.record import Record
from sampo_cli.remote import fetch_model
from sampo_cli.run_tables import final_tables
from sampo_cli.sharding import check as check_sharding
from sampo_cli.sharding import left_whole, sharing
from sampo_cli.signals import stop_requests
from sampo_cli.state import adapter_bytes, bytes_to_come, refuse_other_format
from sampo_cli.template import PairEncoder
from sampo_cli.tracking import track_tables, tracking
from sampo_cli.trainer import Trainer
from sampo_cli.trust import check_consent, check_links

RESUMABLE_CHANGES = {
    *("train.epochs", "train.max_steps", "train.save_every", "train.keep_checkpoints", "train.tokens_per_microbatch"),
    *("train.pairs_per_microbatch", "train.cache_reference", "train.checkpointing", "train.offload_activations"),
    *("train.on_nonfinite", "train.nonfinite_limit", "train.early_stopping", "output.report_to"),
}

STOPPING = "finishing this step, then saving; once more to leave at once"


class RunView(Protocol):
    """What a run tells while it goes; `console.py` has the views."""

    def note(self, text: str) -> None: ...
    def begin(self, folder: Path, steps: int, done: int) -> None: ...
    def train_row(self, row: Mapping[str, Any]) -> None: ...
    def eval_row(self, row: Mapping[str, Any]) -> None: ...
    def generate_row(self, row: Mapping[str, Any]) -> None: ...


def train(recipe: Recipe, view: RunView, run: Path, resume_from: Path | None = None) -> dict[str, Any]:
    """Run a recipe to its end and return the summary that is also in the run's `summary.json`.

    Args:
        recipe: resolved.
        run: the run's folder; new, unless a run is resumed.
        resume_from: a checkpoint's folder.

    Raises:
        SampoError: of any kind; the folder's state says so.
    """
    check_trackers(recipe)
    check_sharding(recipe)
    with ExitStack() as stack:
        if resume_from and ranks.is_first():
            stack.enter_context(held(run))
        the_plan, policy, facts = _load(recipe, view)
        if not resume_from and ranks.is_first():
            run.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(run))
            clear_abandoned(run)
        trainer, record = _begin(the_plan, policy, facts, view, run, resume_from)
        return _train(trainer, record, view)


def _load(recipe: Recipe, view: RunView) -> tuple[Plan, Policy, ModelFacts]:
    """Pairs and model; the recipe of the plan is the one with what loading decided."""
    with ranks.first_on_machine():
        the_plan = make_plan(recipe, view)
        fetch_model(recipe.model.name, recipe.model.revision)
    settings = recipe.train
    check_optimizer(settings, pick_device())
    if note := offload_note(settings.offload_activations, pick_device()):
        view.note(note)
    policy, facts = load_policy(
        recipe.model,
        recipe.lora,
        seed=settings.seed,
        checkpointing=settings.checkpointing,
        offload=settings.offload_activations,
    )
    recipe = what_was_loaded(recipe, facts, policy, view)
    tell_model(facts, recipe, view)
    return replace(the_plan, recipe=recipe), policy, facts


def _begin(
    the_plan: Plan, policy: Policy, facts: ModelFacts, view: RunView, run: Path, resume_from: Path | None
) -> tuple[Trainer, Record]:
    """The trainer as it is before the first step, or after the checkpoint; the run's folder with its recipe."""
    recipe, dataset = the_plan.recipe, the_plan.dataset
    split = Split(dataset, the_plan.train, the_plan.evaluation, dataset.where)
    identity = identity_of(dataset, the_plan.tokenizer, facts.fingerprint, policy)
    trainer = Trainer(policy, split, recipe, the_plan.method, run, view, identity, _answers(the_plan, run))
    record = Record(run, the_plan, facts, trainer)
    if resume_from:
        record.resume(_restore(trainer, view, resume_from))
    if ranks.is_first():
        check_room(
            run,
            bytes_to_come(run, trainer.machinery, recipe.train.keep_checkpoints, recipe.iterations.count),
            "the checkpoints of this run",
            "make room, or give --output on another disk; --set train.keep_checkpoints=1 needs less",
        )
        write_text(run / "recipe.yaml", recipe.dump())
    return trainer, record


def _answers(the_plan: Plan, run: Path) -> Answers | None:
    """What is answered while training, if anything is."""
    if not the_plan.prompts:
        return None
    ends = end_of_turn(PairEncoder(the_plan.tokenizer, the_plan.recipe.data.template_date))
    return Answers(the_plan.recipe.train.generate, the_plan.prompts, the_plan.tokenizer, run, ends)


def _restore(trainer: Trainer, view: RunView, found: Path) -> dict[str, Any]:
    """Put a trainer back to where a checkpoint is; what is noted of that."""
    for folder in checkpoint.all_checkpoints(trainer.folder):
        if folder.name > found.name and (problem := checkpoint.damage(folder)):
            view.note(f"warning: the checkpoint {folder.name} is damaged, and {found.name} is used: {problem}")
    before = refuse_other_format(found).get("recipe", {})
    changes = recipe_changes(validate(before).model_dump(mode="json"), trainer.recipe.model_dump(mode="json"))
    refuse_changes(changes)
    trainer.restore(found)
    view.note(f"resuming after step {trainer.progress.step}")
    for line in change_lines(changes):
        view.note(f"  changed: {line}")
    return {"step": trainer.progress.step, "changed": {key: list(values) for key, values in changes.items()}}


def _train(trainer: Trainer, record: Record, view: RunView) -> dict[str, Any]:
    """The loop, what comes after it, and the run's state whatever happens."""
    run, recipe = trainer.folder, trainer.recipe
    trainer.on_save = lambda: record.write("running")
    ranks.on_loss(lambda: record.leave("failed"))
    view.begin(run, trainer.steps, trainer.progress.step)
    record.write("running")
    try:
        with (
            stop_requests(lambda: view.note(STOPPING)) as stop,
            tracking(trainer.accelerator, recipe, run, view.note),
        ):
            trainer.fit(stop)
            if reason := trainer.stopped_early():
                view.note(f"stopped early, after step {trainer.progress.step}: {reason}")
            if ranks.is_first():
                finish(trainer, record.plan, record.facts, run)
            summary = record.write("finished")
            if trainer.accelerator.trackers:
                track_tables(trainer.accelerator, final_tables(summary, run), trainer.progress.step, view.note)
    except BaseException as error:
        record.leave("interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed")
        raise
    if ranks.is_first():
        write_text(run / "README.md", model_card(run))
    return summary


def resume(path: Path, changes: Mapping[str, Any]) -> tuple[Recipe, Path]:
    """The recipe of an earlier run with harmless `changes`, and the checkpoint to go on from.

    Args:
        path: a run's folder or one of its checkpoints.
        changes: a recipe's tree holding only what is to be different.

    Raises:
        UsageError: nothing to resume, a run that another process is at, one with links to other places or that allows
            code to run, or a change that would make it another run.
    """
    run = checkpoint.run_of(path)
    if run.is_dir():
        check_links(run)
        if ranks.is_first():
            with held(run):
                checkpoint.tidy_run(run)
    ranks.wait()
    run, found = checkpoint.find(path)
    before = read_recipe(run / "recipe.yaml")
    check_consent(before, run / "recipe.yaml", given="trust_remote_code" in changes.get("model", {}))
    recipe = resolve_recipe(merge(before, changes))
    old = validate(refuse_other_format(found).get("recipe", {}))
    refuse_changes(recipe_changes(old.model_dump(mode="json"), recipe.model_dump(mode="json")))
    return recipe, found


def refuse_changes(changes: Mapping[str, tuple[Any, Any]]) -> None:
    """Stop where a resumed run would be another one.

    Raises:
        UsageError: something else than `RESUMABLE_CHANGES` is different.
    """
    refused = {key: values for key, values in changes.items() if key not in RESUMABLE_CHANGES}
    if refused:
        raise UsageError(
            "--resume continues the same run, but this would change:\n"
            + "\n".join(f"  {line}" for line in change_lines(refused)),
            hint="start a new run for that; allowed: " + ", ".join(sorted(RESUMABLE_CHANGES)),
        )


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
        f"compute {facts.dtype}, on {facts.device}, {facts.parameter_bytes / 2**20:,.0f} MiB; "
        f"attention: {facts.attention}; kernels: {facts.kernels}"
    )
    if facts.kept_bytes < facts.parameter_bytes:
        view.note(f"{sharing()}: each process keeps {facts.kept_bytes:,} of {facts.parameter_bytes:,} bytes")
    elif left_whole():
        most = 12 * facts.trainable_parameters / 2**20  # a gradient and two moments, in float32
        view.note(
            f"ZeRO-2: gradients and optimizer of an adapter are at most {most:,.0f} MiB, and whole in each process"
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
    with checkpoint.whole_folder(run / "adapter", adapter_bytes(trainer.machinery)) as aside:
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
