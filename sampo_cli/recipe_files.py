"""The recipes that ship with sampo: find one by name, say what it is, copy it, and read it with its neighbours' paths
made whole."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sampo_cli.config import MethodConfig, read_recipe
from sampo_cli.disk import expanded, write_text, writing
from sampo_cli.errors import UsageError, nearest
from sampo_cli.settings import Settings, keys_of
from sampo_cli.trust import check_consent

PACKAGE = Path(__file__).resolve().parent
CARD = re.compile(r"(\d+)gb/")
"""How the name of a recipe for a card begins: its folder's name."""


@dataclass(frozen=True)
class Shipped:
    """What a recipe says of itself.

    Attributes:
        model: None where it has to be given.
        card: memory of the card that it was made for, as `--gpu-memory` takes it; None if for no card in particular.
        about: the first line of its heading.
        text: the file as it stands.
        copied: what `copy_recipe` wrote.
    """

    name: str
    path: Path
    model: str | None
    method: str
    card: str | None
    about: str
    text: str = field(repr=False)
    copied: tuple[Path, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path), "copied": [str(path) for path in self.copied]}


def recipes_folder() -> Path:
    """`_recipes/` inside the installed package, or `recipes/` beside it in a source checkout."""
    installed = PACKAGE / "_recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Recipe files by name, those for no card first, then by card.

    `NAME.yaml`; `NAME/recipe.yaml` for one that brings files of its own; `16gb/NAME.yaml` for a card of so much memory.
    """
    folder = recipes_folder()
    named = {path.stem: path for path in folder.glob("*.yaml")}
    named |= {path.parent.name: path for path in folder.glob("*/recipe.yaml")}
    named |= {f"{path.parent.name}/{path.stem}": path for path in folder.glob("*gb/*.yaml")}
    return dict(sorted(named.items(), key=lambda item: (_card_size(item[0]), item[0])))


def _card_size(name: str) -> int:
    """Gigabytes of the card that a recipe of this name is for; 0 for none."""
    card = CARD.match(name)
    return int(card[1]) if card else 0


def describe(name: str) -> Shipped:
    """What a shipped recipe says of itself.

    Raises:
        UsageError: there is none of that name.
    """
    path, size = find_recipe(name), _card_size(name)
    tree, text = read_recipe(path), path.read_text(encoding="utf-8")
    method = tree.get("method", {}).get("name", MethodConfig.model_fields["name"].default)
    about = text.partition("\n")[0].strip("# :")
    return Shipped(name, path, tree.get("model", {}).get("name"), method, f"{size}GB" if size else None, about, text)


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe.

    Raises:
        UsageError: there is none of that name.
    """
    known = shipped_recipes()
    if name not in known:
        raise UsageError(
            f"recipe not found: '{name}' is neither a file nor a shipped recipe{nearest(name, known)}",
            hint="`sampo recipes` lists those that ship",
        )
    return known[name]


def load_recipe(name: str, settings: Settings = ()) -> dict[str, Any]:
    """The tree of the recipe at a path or of that shipped name.

    A data source is looked for beside the recipe's file first, so that a recipe may bring its own.

    Args:
        settings: `section.key=value` of the command line, which alone can allow a model's own code to run.

    Raises:
        UsageError: no such recipe, not YAML, or one that would allow code to run.
    """
    path = expanded(name)
    path = path if path.is_file() else find_recipe(name)
    tree = read_recipe(path)
    check_consent(tree, f"recipe {path}", given="model.trust_remote_code" in keys_of(settings))
    sources = _sources(tree)
    if sources:
        tree["data"]["sources"] = [_beside(path, source) or source for source in sources]
    return tree


def _sources(tree: dict[str, Any]) -> list[Any]:
    data = tree.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    return sources if isinstance(sources, list) else []


def _beside(recipe: Path, source: Any) -> str | None:
    """The data that lies beside a recipe's file under this name, if any does."""
    found = isinstance(source, str) and source and os.path.exists(recipe.parent / source)
    return str((recipe.parent / source).resolve()) if found else None


def copy_recipe(recipe: Shipped, target: Path) -> tuple[Path, ...]:
    """Write a recipe to a file, or into a folder that is made where it is missing. Returns the new files.

    The command in its heading becomes that of the copy. Data that lies beside it is copied too.

    Raises:
        UsageError: something is there already, or it cannot be written there.
        SampoError: the disk is full.
    """
    is_file = target.suffix in (".yaml", ".yml") and not target.is_dir()
    file = target if is_file else target / f"{recipe.name.replace('/', '-')}.yaml"
    data = [Path(found) for source in _sources(read_recipe(recipe.path)) if (found := _beside(recipe.path, source))]
    written = [file, *(file.parent / source.name for source in data)]
    for path in written:
        if path.exists() or path.is_symlink():
            raise UsageError(f"--copy {target}: {path} is already there", hint="name another file, or delete it")
    command = f"sampo train --recipe {recipe.name}"
    try:
        file.parent.mkdir(parents=not is_file, exist_ok=True)
        with writing(file.parent):
            for source, copied in zip(data, written[1:], strict=True):
                shutil.copyfile(source, copied)
        write_text(file, recipe.text.replace(command, f"sampo train --recipe {shlex.quote(str(file))}"))
    except OSError as error:
        raise UsageError(f"--copy {target}: {error}", hint="name a folder that can be written") from error
    return tuple(written)
