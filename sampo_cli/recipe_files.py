"""The recipes that ship with sampo: find one by name, and read it with its neighbours' paths made whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sampo_cli.config import read_recipe
from sampo_cli.disk import expanded
from sampo_cli.errors import UsageError, nearest
from sampo_cli.settings import Settings, keys_of
from sampo_cli.trust import check_consent

PACKAGE = Path(__file__).resolve().parent


def recipes_folder() -> Path:
    """`_recipes/` inside the installed package, or `recipes/` beside it in a source checkout."""
    installed = PACKAGE / "_recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Recipe files by name: `NAME.yaml`, or `NAME/recipe.yaml` for one that brings files of its own."""
    folder = recipes_folder()
    named = {path.stem: path for path in folder.glob("*.yaml")}
    return dict(sorted((named | {path.parent.name: path for path in folder.glob("*/recipe.yaml")}).items()))


def load_recipe(name: str, settings: Settings = ()) -> dict[str, Any]:
    """The tree of the recipe at a path or of that shipped name.

    A data source that lies beside the recipe file may be given by its bare name.

    Args:
        settings: `section.key=value` of the command line, which alone can allow a model's own code to run.

    Raises:
        UsageError: no such recipe, not YAML, or one that would allow code to run.
    """
    path = expanded(name)
    if not path.is_file():
        known = shipped_recipes()
        if name not in known:
            raise UsageError(
                f"recipe not found: '{name}' is neither a file nor a shipped recipe{nearest(name, known)}",
                hint=f"shipped: {', '.join(known)}",
            )
        path = known[name]
    tree = read_recipe(path)
    check_consent(tree, f"recipe {path}", given="model.trust_remote_code" in keys_of(settings))
    data = tree.get("data")
    if isinstance(data, dict) and isinstance(data.get("sources"), list):
        data["sources"] = [_beside(path, source) for source in data["sources"]]
    return tree


def _beside(recipe: Path, source: Any) -> Any:
    if isinstance(source, str) and not Path(source).exists() and (recipe.parent / source).exists():
        return str((recipe.parent / source).resolve())
    return source
