"""Options that several commands share, and how flags and settings become a recipe's tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from sampo_cli import completion

if TYPE_CHECKING:
    from sampo_cli.settings import Settings

MODEL, DATA, TRAINING, RUN = "Model", "Data", "Training", "Run"
"""Panels of the help pages."""

# Where a flag of `train` goes in the recipe.
FLAGS = {
    "model": "model.name",
    "adapter": "model.adapter",
    "quantization": "model.quantization",
    "data": "data.sources",
    "max_length": "data.max_length",
    "eval_fraction": "data.eval_fraction",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "method": "method.name",
    "beta": "method.beta",
    "epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "learning_rate": "train.learning_rate",
    "batch_pairs": "train.batch_pairs",
    "save_every": "train.save_every",
    "seed": "train.seed",
    "output": "output.dir",
    "report_to": "output.report_to",
    "cache_reference": "train.cache_reference",
    "iterations": "iterations.count",
}


def option(name: str, text: str, panel: str, metavar: str | None = None, offers: Any = None, **limits: Any) -> Any:
    """An option; `offers` is one of `completion.py`."""
    return typer.Option(name, help=text, rich_help_panel=panel, metavar=metavar, autocompletion=offers, **limits)


Set = Annotated[
    Optional[list[str]],
    option("--set", "Any other key of a recipe; repeatable.", RUN, "SECTION.KEY=VALUE", completion.settings),
]
Quiet = Annotated[bool, option("--quiet", "Only warnings and errors.", RUN)]
Json = Annotated[bool, option("--json", "The result as JSON on stdout.", RUN)]
Debug = Annotated[bool, option("--debug", "Show the traceback of an error.", RUN)]

SubjectName = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="A run, an adapter or a model.", autocompletion=completion.runs)
]
SubjectAdapter = Annotated[
    Optional[str], option("--adapter", "Of a run or a folder, on MODEL.", MODEL, offers=completion.runs)
]
SubjectQuantization = Annotated[
    Optional[str],
    option(
        "--quantization",
        "Of the base, if not as trained.",
        MODEL,
        "nf4|int8|none",
        completion.choices("model.quantization"),
    ),
]

PRINTING = ("as_json", "debug")
"""Parameters of commands that only decide what is printed."""


def asked_for(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A command's arguments as its function takes them."""
    return {name: value for name, value in arguments.items() if name not in PRINTING}


def recipe_tree(recipe: str | None, flags: Mapping[str, Any], settings: Settings | None) -> dict[str, Any]:
    """The recipe file, overwritten by the flags that were given, overwritten by --set."""
    from sampo_cli.recipe_files import load_recipe
    from sampo_cli.settings import apply_settings, put

    tree = load_recipe(recipe, settings or ()) if recipe else {}
    for flag, value in flags.items():
        if value is not None:
            section, key = FLAGS[flag].split(".")
            put(tree, section, key, value)
    if flags.get("epochs") is not None and flags.get("max_steps") is None:
        put(tree, "train", "max_steps", None)
    apply_settings(tree, settings or [])
    return tree
