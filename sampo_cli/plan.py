"""A run before any weight is loaded: its recipe resolved, its pairs read, its folder chosen.

Everything that can be wrong with a recipe, a tokenizer or the data is found here.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sampo_cli import checkpoint, early_stopping
from sampo_cli.answers import Prompt, find_prompts
from sampo_cli.batch import Draw
from sampo_cli.config import Recipe, resolve, validate
from sampo_cli.data_report import Token, token_view
from sampo_cli.dataset import PairDataset, prepare, split
from sampo_cli.disk import existing, expanded, is_writable
from sampo_cli.early_stopping import kind_of
from sampo_cli.errors import DataError, UsageError
from sampo_cli.journal import METRICS_FILE, TEXTS_FILE
from sampo_cli.lock import LOCK, refuse_held
from sampo_cli.method_checks import check, refuse
from sampo_cli.method_table import METHODS, Method, find
from sampo_cli.model import context_length, load_config
from sampo_cli.prompts import prompt_texts
from sampo_cli.remote import fetch_model
from sampo_cli.sampling import POLICY
from sampo_cli.template import PairEncoder, load_tokenizer, never_ends, uses_plain_template

BEFORE_THE_FIRST_CHECKPOINT = {
    *(LOCK, "recipe.yaml", "summary.json", "run.log", METRICS_FILE, TEXTS_FILE, checkpoint.CHECKPOINTS),
    *("sampo", "wandb"),
}
"""All that can be in the folder of a run that has none; `sampo` is TensorBoard's."""


class Notes(Protocol):
    """Whoever is told what was found."""

    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Plan:
    """A run before any weight is loaded."""

    recipe: Recipe
    method: Method
    tokenizer: Any
    dataset: PairDataset
    train: list[int]
    evaluation: list[int]
    prompts: list[Prompt]


def resolve_recipe(tree: Mapping[str, Any]) -> Recipe:
    """Check a recipe's tree and fill in its method's defaults.

    Raises:
        UsageError: problems, all of them, an unknown method, or a combination that has no meaning with it.
    """
    recipe = with_whole_paths(validate(tree))
    name = recipe.method.name
    method = find(name)
    defaults = method.recipe_defaults()
    if recipe.train.max_steps:
        defaults["train"].pop("epochs", None)
    resolved = resolve(recipe, defaults)
    refuse(method, resolved.method.model_dump())
    if resolved.iterations.count > 1 and not method.needs_reference:
        raise UsageError(f"iterations.count: {name} has no reference, so there is nothing to renew after a round")
    train = resolved.train
    early_stopping.check(train.early_stopping, answers=bool(train.generate.prompts), reference=method.needs_reference)
    if resolved.train.cache_reference == "on" and not method.caches_reference:
        reason = "needs the whole vocabulary of the reference" if method.needs_kl else "has no reference"
        raise UsageError(f"train.cache_reference: {name} {reason}", hint="leave it at auto")
    return resolved


def with_whole_paths(recipe: Recipe) -> Recipe:
    """The recipe with local folders and files as absolute paths, so that it means the same from anywhere."""

    def whole(name: str | None) -> str | None:
        try:
            return str(Path(name).expanduser().resolve()) if name and Path(name).expanduser().exists() else name
        except (OSError, RuntimeError):  # too long for a file's name, or the home of nobody: refused when it is read
            return name

    model, data = recipe.model, recipe.data
    model = model.model_copy(update={"name": whole(model.name), "adapter": whole(model.adapter)})
    sources = [whole(source) for source in data.sources]
    data = data.model_copy(update={"sources": sources, "chat_template": whole(data.chat_template)})
    generate = recipe.train.generate
    if isinstance(generate.prompts, str):
        generate = generate.model_copy(update={"prompts": whole(generate.prompts)})
    train = recipe.train.model_copy(update={"generate": generate})
    return recipe.model_copy(update={"model": model, "data": data, "train": train})


def check_trackers(recipe: Recipe) -> None:
    """Refuse a tracker that is not installed now, not after the model is loaded."""
    for name in recipe.output.report_to:
        if find_spec(name) is None:
            raise UsageError(f"--report-to {name}: {name} is not installed", hint=f"pip install {name}")


def make_plan(recipe: Recipe, view: Notes) -> Plan:
    """Read, tokenize and split the pairs; needs the model's config and tokenizer, not its weights."""
    for warning in check(METHODS[recipe.method.name], recipe.method.model_dump()):
        view.note(f"warning: {warning}")
    tokenizer = load_tokenizer(recipe.model, recipe.data)
    if uses_plain_template(tokenizer):
        view.note("warning: the model has no chat template; the plain one of docs/data.md is used")
    if never_ends(tokenizer, recipe.data.template_date):
        view.note("warning: neither the chat template nor the tokenizer has a token that ends a response")
    config = load_config(recipe.model, fetch_model(recipe.model.name, recipe.model.revision, weights=False))
    dataset = prepare(recipe.data, tokenizer, context=context_length(config), progress=_tokenizing(view))
    counts = dataset.counts
    view.note(f"pairs: {counts.kept:,} of {counts.rows:,} usable, at most {dataset.max_length:,} tokens a side")
    for title, reasons in (("dropped", counts.dropped), ("truncated", counts.truncated)):
        if any(reasons.values()):
            view.note(
                f"  {title}: " + ", ".join(f"{reason} {number:,}" for reason, number in reasons.items() if number)
            )
    train, evaluation = split(len(dataset), recipe.data.eval_fraction, recipe.train.seed)
    view.note(f"  {len(train):,} train, {len(evaluation):,} held out")
    prompts = _prompts(recipe, tokenizer, dataset, evaluation.tolist(), context_length(config), view)
    return Plan(recipe, METHODS[recipe.method.name], tokenizer, dataset, train.tolist(), evaluation.tolist(), prompts)


def _prompts(
    recipe: Recipe, tokenizer: Any, dataset: PairDataset, held_out: list[int], context: int | None, view: Notes
) -> list[Prompt]:
    """What is answered while training.

    Raises:
        UsageError, DataError: there is nothing to answer, or nothing held out for the metric of early stopping.
    """
    stopping, wanted = recipe.train.early_stopping, recipe.train.generate.prompts
    if stopping.metric and kind_of(stopping.metric) == "eval" and not held_out:
        raise UsageError(f"train.early_stopping.metric: {stopping.metric} needs pairs held out", hint="--eval-fraction")
    encoder = PairEncoder(tokenizer, recipe.data.template_date)
    texts = partial(prompt_texts, recipe.data)
    found = find_prompts(recipe.train.generate, dataset, held_out, encoder, context, texts)
    if isinstance(wanted, int) and len(found) < wanted:
        view.note(f"  {len(found)} prompts are answered, not {wanted}: no others leave room for an answer")
    return found


def _tokenizing(view: Notes) -> Callable[[int, int | None], None]:
    """Says how far tokenizing is, every 50,000 rows."""

    def progress(done: int, total: int | None) -> None:
        if done and done % 50_000 == 0:
            view.note(f"tokenizing: {done:,} rows{f' of {total:,}' if total else ''}")

    return progress


def inspect_pair(the_plan: Plan, row: int | None = None) -> tuple[list[Token], str]:
    """One pair token by token, as its first epoch scores it, and where it came from.

    Args:
        row: number in the data, from 1, or None for the first usable one.

    Raises:
        DataError: there is no such row, or it was dropped.
    """
    dataset, recipe = the_plan.dataset, the_plan.recipe
    index = 0 if row is None else int(np.searchsorted(dataset.pair_ids, row - 1))
    if row is not None and (index == len(dataset) or dataset.pair_ids[index] != row - 1):
        raise DataError(f"row {row} is not among the usable pairs", hint=f"there are {dataset.counts.rows} rows")
    pair = dataset[index]
    assert recipe.method.reduction is not None, "resolve() fills the reduction"
    draw = Draw(recipe.method.reduction, recipe.train.seed, epoch=0, draws=recipe.method.draws)
    weights = draw.weights(pair, POLICY)
    keep = weights[: len(pair.chosen)], weights[len(pair.chosen) :]
    return token_view(pair, the_plan.tokenizer, keep), dataset.location(index)


def folder_of(recipe: Recipe, form: str) -> Path:
    """outputs/ and `form` with {model}, {method} and {data}, each without what a file's name should not have."""
    model, data = Path(recipe.model.name).name, Path(recipe.data.sources[0].partition(":")[0]).name
    names = {"model": model, "method": recipe.method.name, "data": data.partition(".jsonl")[0]}
    plain = {key: re.sub(r"[^A-Za-z0-9._]+", "-", name) for key, name in names.items()}
    return Path("outputs") / form.format(**plain).strip("-.")


def refuse_unwritable(folder: Path) -> None:
    """Stop where a folder cannot be written, or not be made.

    Raises:
        UsageError: it, or the nearest above it that is there, is no folder or not ours to write into.
    """
    place = existing(folder)
    if not is_writable(place):
        raise UsageError(f"{folder} cannot be made: {place} is no folder that can be written", hint="--output another")


def new_folder(recipe: Recipe) -> Path:
    """Where the run goes: `output.dir`, or outputs/<model>-<method>-<data>. Refused if something is there."""
    folder = expanded(recipe.output.dir) if recipe.output.dir else folder_of(recipe, "{model}-{method}-{data}")
    refuse_unwritable(folder)
    if folder.is_dir():
        refuse_held(folder)
    if folder.exists() and not is_free(folder):
        resumable = folder.is_dir() and checkpoint.all_checkpoints(folder)
        raise UsageError(
            f"the run folder is already there: {folder}",
            hint=f"--output another, delete it{f', or go on with --resume {folder}' if resumable else ''}",
        )
    return folder


def is_free(folder: Path) -> bool:
    """True for a folder that a new run may have: empty, or of a run that ended before it had anything to keep."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir() if not path.name.endswith(".tmp")}
    begun = (LOCK in names or {"recipe.yaml", "summary.json"} <= names) and names <= BEFORE_THE_FIRST_CHECKPOINT
    return not names or (begun and not checkpoint.all_checkpoints(folder))


def clear_abandoned(folder: Path) -> None:
    """Delete what such a run left, so that a new one can have its name. The caller holds the folder's lock.

    Raises:
        UsageError: another run has come far here meanwhile.
    """
    if not is_free(folder):
        raise UsageError(f"the run folder is already there: {folder}", hint="--output another, or delete it")
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
