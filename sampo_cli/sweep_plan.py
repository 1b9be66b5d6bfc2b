"""A sweep before anything runs: the runs that its values make, their names and commands, and the folder's plan.

Everything that can be wrong with any of the recipes is found here. Nothing is started.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sampo_cli.card_facts import tree_of
from sampo_cli.config import Recipe, leaves, read_recipe, validate
from sampo_cli.disk import write_text
from sampo_cli.errors import UsageError
from sampo_cli.fingerprint import read_json
from sampo_cli.lock import LOCK
from sampo_cli.method_table import find
from sampo_cli.plain_yaml import parse_yaml
from sampo_cli.plan import refuse_unwritable, resolve_recipe, with_whole_paths
from sampo_cli.settings import put

RECIPE_FILE, PLAN_FILE = "recipe.yaml", "sweep.json"
FORMAT = 1
LONGEST_NAME = 150
"""Characters of a run's folder; names of files may have 255 bytes, and checkpoints lie below."""

CONSENT = "model.trust_remote_code=true"
"""Only a command line can give it, so each of the commands has it where the sweep's had."""

OPENING, CLOSING, QUOTES = "[{", "]}", "'\""

Axes = Mapping[str, Sequence[Any]]
"""What varies: recipe keys (`section.key`) and their values."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        settings: the values that make it, by key.
        words: of the command that starts it, after `sampo`.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    words: list[str] = field(repr=False)


def split_values(text: str, where: str) -> list[Any]:
    """The values of `0.05,0.1` or `[q_proj,v_proj],all-linear`: YAML between commas that are in no bracket or quote.

    Raises:
        UsageError: a value that is not YAML, or none.
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in QUOTES and not parts[-1].strip():
            quote = character
        else:
            depth += (character in OPENING) - (character in CLOSING)
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    if any(not part.strip() for part in parts):
        raise UsageError(f"{where}: a value is missing in '{text}'", hint="for example method.beta=0.05,0.1,0.3")
    return [parse_yaml(part, where) for part in parts]


def read_axes(settings: Mapping[str, Any] | Sequence[str]) -> dict[str, list[Any]]:
    """Keys with their values, each once: from `key=value,value` texts, or a mapping of keys to a value or a list.

    Raises:
        UsageError: not `section.key=value`, a key that is there twice, or nothing that varies.
    """
    axes: dict[str, list[Any]] = {}
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if bool(equals) == isinstance(settings, Mapping) or "." not in key:
            raise UsageError(f"--set {setting}: expected section.key=value,value", hint="--set method.beta=0.05,0.1")
        if key == "output.dir":
            raise UsageError("--set output.dir: each run has a folder of its own", hint="--output for the sweep's")
        if key in axes:
            raise UsageError(f"--set {key} is there twice", hint="give all its values at once, with commas between")
        given = settings[key] if isinstance(settings, Mapping) else split_values(text, f"--set {key}")
        values = given if isinstance(given, list) else [given]
        if not values:
            raise UsageError(f"--set {key}: no values", hint="give several, --set method.beta=0.05,0.1,0.3")
        axes[key] = [value for place, value in enumerate(values) if value not in values[:place]]
    if all(len(values) < 2 for values in axes.values()):
        raise UsageError("nothing varies", hint="give several values, --set method.beta=0.05,0.1,0.3; one run is train")
    return axes


def plan_runs(tree: dict[str, Any], axes: Axes, folder: Path) -> tuple[Recipe, list[PlannedRun]]:
    """The recipe that the runs share, and a run for each combination of values.

    Args:
        tree: a recipe's, in which the values of `axes` are put.
        folder: the sweep's.

    Raises:
        UsageError: one of the recipes has problems.
    """
    varied = [key for key, values in axes.items() if len(values) > 1]
    shared, runs = None, []
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        own = copy.deepcopy(tree)
        for key, value in settings.items():
            section, _, name = key.partition(".")
            put(own, section, name, value)
        try:
            recipe = resolve_recipe(own)
        except UsageError as error:
            where = ", ".join(f"{key}={as_text(settings[key])}" for key in varied)
            raise UsageError(f"the run with {where}: {error.message}", hint=error.hint) from error
        shared = shared or with_whole_paths(validate(own))
        runs.append(_planned(recipe, {key: settings[key] for key in varied}, folder))
    assert shared is not None, "a product of values that are there"
    if len({run.name for run in runs}) < len(runs):
        raise UsageError("two runs would have the same folder", hint="give values that differ in letters or digits")
    return shared.model_copy(update={"output": shared.output.model_copy(update={"dir": None})}), runs


def _planned(recipe: Recipe, settings: dict[str, Any], folder: Path) -> PlannedRun:
    """A run with its command; one pass of the reference serves all of them."""
    name, whole = run_name(settings), leaves(recipe.model_dump())  # which has whole paths
    given = [f"{key}={as_text(whole.get(key, value))}" for key, value in settings.items()]
    given += [CONSENT] * recipe.model.trust_remote_code
    words = ["train", "--recipe", str(folder / RECIPE_FILE), *(word for one in given for word in ("--set", one))]
    caches = find(recipe.method.name).caches_reference and recipe.train.cache_reference == "auto"
    words += ["--cache-reference", "on"] * caches
    return PlannedRun(name, folder / name, settings, [*words, "--output", str(folder / name)])


def as_text(value: Any) -> str:
    """A value as `--set` reads it back."""
    if isinstance(value, str) and parse_yaml(value, "a value") == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def run_name(settings: Mapping[str, Any]) -> str:
    """`method.beta=0.05,train.learning_rate=1e-05`, with what a file's name should not have replaced."""
    text = ",".join(f"{key}={as_text(value)}" for key, value in settings.items())
    name = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", text).strip("-.,")
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def check_folder(folder: Path) -> None:
    """Stop where a sweep cannot go.

    Raises:
        UsageError: it cannot be written, or has something else in it.
    """
    refuse_unwritable(folder)
    is_new = not folder.exists() or all(path.name == LOCK for path in folder.iterdir())
    if not is_new and not (folder / PLAN_FILE).is_file():
        raise UsageError(f"{folder} is there and is no sweep", hint="give a new --output")


def write_plan(folder: Path, shared: Recipe, keys: Sequence[str], runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """Put recipe and plan into the folder; a sweep that is there gets the new runs beside its own.

    Args:
        keys: what varies.

    Returns:
        The plan: `runs` by name with their settings and, where they ended, their exit code.

    Raises:
        UsageError: the folder holds a sweep of another recipe or other keys.
    """
    plan: dict[str, Any] = {"format": FORMAT, "keys": sorted(keys), "runs": {}}
    if (folder / PLAN_FILE).is_file():
        plan = _read_plan(folder)
        before, after = leaves(read_recipe(folder / RECIPE_FILE)), leaves(shared.model_dump())
        different = [key for key in {**before, **after} if before.get(key) != after.get(key) and key not in keys]
        different += sorted(set(plan["keys"]) ^ set(keys))
        if different:
            hint = "give a new --output; more values of the same keys may be added here"
            raise UsageError(f"{folder} is a sweep with other {', '.join(dict.fromkeys(different))}", hint=hint)
    else:
        write_text(folder / RECIPE_FILE, shared.dump())
    for run in runs:
        plan["runs"].setdefault(run.name, {"settings": run.settings, "exit_code": None})
    save_plan(folder, plan)
    return plan


def _read_plan(folder: Path) -> dict[str, Any]:
    plan = read_json(folder / PLAN_FILE)
    runs = tree_of(plan.get("runs"))
    sound = bool(runs) and isinstance(plan.get("keys"), list) and plan.get("format") == FORMAT
    if not sound or not all(isinstance(run, dict) and isinstance(run.get("settings"), dict) for run in runs.values()):
        raise UsageError(f"{folder / PLAN_FILE} is not a plan that this version wrote", hint="give a new --output")
    return plan


def save_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    write_text(folder / PLAN_FILE, json.dumps(plan, indent=2, ensure_ascii=False) + "\n")
