"""The recipes that ship: `recipes`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from sampo_cli import api_files, completion, console
from sampo_cli.options import RUN, Debug, Json, Quiet, option

if TYPE_CHECKING:
    from sampo_cli.recipe_files import Shipped


def recipes(
    name: Annotated[
        Optional[str],
        typer.Argument(
            help="Show this one; or, such as 16gb, list those for a card.", autocompletion=completion.shipped
        ),
    ] = None,
    copy: Annotated[
        Optional[Path],
        option("--copy", "Write it to this new file, or into this folder, to change it.", RUN, "FILE.yaml|DIR"),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the recipes that ship, show one, or copy one."""
    found = api_files.recipes(name, copy=copy)
    if as_json:
        console.print_json([recipe.to_dict() for recipe in found])
    elif copy and not quiet:
        _print_copied(found[0])
    elif not copy and [recipe.name for recipe in found] == [name]:
        console.print_raw(found[0].text)
    elif not copy:
        _print_all(found)


def _print_copied(recipe: Shipped) -> None:
    command = f"sampo train --recipe {shlex.quote(str(recipe.copied[0]))}{'' if recipe.model else ' --model ...'}"
    console.print_facts("copied", {"to": ", ".join(map(str, recipe.copied)), "next": command})


def _print_all(found: Sequence[Shipped]) -> None:
    """A line for each, by card."""
    for card, group in groupby(found, key=lambda recipe: recipe.card):
        shown = list(group)
        console.stdout.print(f"for a card of {card}" if card else "for any card", style="bold")
        names, methods = (max(map(len, column)) for column in zip(*((r.name, r.method) for r in shown), strict=True))
        for recipe in shown:
            line = f"  {recipe.name:<{names}}  {recipe.method:<{methods}}  {recipe.about}"
            console.stdout.print(line, markup=False, soft_wrap=True)
    console.stdout.print("`sampo recipes NAME` shows one; with --copy FILE.yaml it is yours to change.", markup=False)
