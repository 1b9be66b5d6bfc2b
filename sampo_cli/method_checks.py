"""A recipe's `method` section against its method: what has no meaning is refused, what is far from usual is named.

The table is in `method_table.py`. Nothing here prints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sampo_cli.errors import UsageError
from sampo_cli.method_table import METHODS, Method

OPTIONS = ("gamma", "label_smoothing", "dpop_weight", "length_weight", "kl_weight")
"""Keys that only some losses take. Elsewhere they are refused: a key that is ignored looks like one that works."""

DRAWING = {"draws": 1, "sampling": "paired"}
"""Keys that only `sample` reads, with the value that means nothing special."""


def refuse(method: Method, settings: Mapping[str, Any]) -> None:
    """Stop at combinations that have no meaning or no effect.

    Args:
        settings: the recipe's resolved `method` section.

    Raises:
        UsageError: all of them, with reasons.
    """
    problems = []
    reduction = settings["reduction"]
    if reduction in method.refused:
        problems.append(
            f"method.reduction: '{reduction}' has no meaning for {method.name}, because {method.refused[reduction]}; "
            f"it takes {', '.join(method.reductions)}"
        )
    for key in OPTIONS:
        if settings[key] and key not in method.option_names:
            takers = ", ".join(name for name, other in METHODS.items() if key in other.option_names)
            problems.append(f"method.{key}: {method.name} has none; it belongs to {takers}")
    for key, nothing_special in DRAWING.items():
        if reduction != "sample" and settings[key] != nothing_special:
            problems.append(f"method.{key}: only reduction 'sample' draws positions, and this is '{reduction}'")
    if problems:
        raise UsageError("\n".join(problems))


def check(method: Method, settings: Mapping[str, Any]) -> list[str]:
    """A sentence for each value that is far from what is known to work; `settings` as for `refuse`."""
    warnings = []
    for key, (low, high) in method.usual.items():
        scale, unit = (settings["beta"], " times beta") if key == "gamma" else (1.0, "")
        value = settings[key] / scale
        if not low <= value <= high:
            usual = f"{low:g} to {high:g}{unit}"
            warnings.append(f"method.{key} is {value:g}{unit}; {method.name} is known to work with {usual}")
    return warnings
