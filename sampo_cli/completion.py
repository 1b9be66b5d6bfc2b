"""What a shell offers on Tab: recipes, methods, runs, keys of a recipe. Typer has the scripts and the protocol.

Nothing here is slow (no torch) or talks. Where something cannot be read nothing is offered, and the shell offers files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

Offers = list[tuple[str, str]]
"""What may be typed, and what it is."""

METHODS = (
    *("sampo", "dpo", "hinge", "ipo", "kto-pair", "dpop", "dpo-sft", "r-dpo", "tdpo", "bco-pair", "nca-pair"),
    *("sppo-hard", "orpo", "simpo", "cpo", "cpo-simpo"),
)
"""Names in the table of methods, which needs torch; a test compares."""


def _silent(function: Callable[[str], Offers]) -> Callable[[str], Offers]:
    """Offers nothing instead of failing: a traceback would end up in the line that somebody types."""

    @functools.wraps(function)
    def offers(incomplete: str) -> Offers:
        try:
            return function(incomplete)
        except Exception:
            return []

    return offers


def words(*known: str) -> Callable[[str], Offers]:
    """Some fixed words."""

    def offers(incomplete: str) -> Offers:
        return [(word, "") for word in known]

    return offers


@_silent
def shipped(incomplete: str) -> Offers:
    """Shipped recipes with their first line."""
    from sampo_cli.recipe_files import shipped_recipes

    return [(name, _first_line(path)) for name, path in shipped_recipes().items()]


@_silent
def recipes(incomplete: str) -> Offers:
    """Shipped recipes, and YAML files."""
    return shipped(incomplete) + [(str(path), "") for path in _beside(incomplete) if path.suffix in (".yaml", ".yml")]


@_silent
def runs(incomplete: str) -> Offers:
    """Folders of runs: in outputs/, and in the folder that is being typed."""
    folders = [*_beside("outputs/"), *(_beside(incomplete) if "/" in incomplete else ())]
    found = dict.fromkeys(folder for folder in folders if (folder / "recipe.yaml").is_file())
    return [(str(folder), "a run") for folder in found]


@_silent
def cached(incomplete: str) -> Offers:
    """Keys of the cache's entries."""
    from sampo_cli.cache import entries

    return [(entry.key, f"{entry.kind} {entry.of}") for entry in entries()]


@_silent
def settings(incomplete: str) -> Offers:
    """Keys of a recipe as `section.key=`. Once one is whole, its values too: a word that may go on gets no space."""
    fields = {f"{key}=": field for key, field in _fields()}
    found = [key for key in fields if key.startswith(incomplete) or incomplete.startswith(key)]
    offers = [(key, fields[key].description or "") for key in found]
    if len(found) == 1:
        form = "[{}]" if get_origin(fields[found[0]].annotation) is list else "{}"
        offers += [(found[0] + form.format(value), "") for value in _values(fields[found[0]])]
    return offers


def choices(key: str) -> Callable[[str], Offers]:
    """The values that a key of a recipe may have."""

    @_silent
    def offers(incomplete: str) -> Offers:
        return [(value, "") for value in _values(dict(_fields())[key])]

    return offers


def _fields(section: Any = None, before: str = "") -> Iterator[tuple[str, Any]]:
    """All keys of a recipe with their fields."""
    from sampo_cli.config import Recipe, Section

    for name, field in (section or Recipe).model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from _fields(inner, f"{before}{name}.")
        elif get_origin(inner) is dict:
            yield from ((f"{before}{name}.{key}", field) for key in _literals(inner))
        else:
            yield f"{before}{name}", field


def _values(field: Any) -> list[str]:
    """The words that a field takes; its default where it takes anything."""
    if field.annotation is bool:
        return ["true", "false"]
    default = field.get_default(call_default_factory=True)
    if default is None:
        return [*_literals(field.annotation), "null"]
    if get_origin(field.annotation) is dict:
        return []
    return _literals(field.annotation) or [str(default)] * isinstance(default, int | float | str)


def _literals(annotation: Any) -> list[str]:
    """The words of the `Literal`s in an annotation."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [word for inner in get_args(annotation) for word in _literals(inner)]


def _beside(incomplete: str) -> list[Path]:
    """What lies in the folder of the path that is being typed."""
    folder = Path(incomplete if incomplete.endswith("/") else Path(incomplete).parent)
    return sorted(path for path in folder.glob("*") if not path.name.startswith("."))


def _first_line(recipe: Path) -> str:
    """What a recipe's first comment says."""
    with recipe.open(encoding="utf-8") as file:
        return file.readline().strip("# \n")
