"""YAML as plain values: text from anybody, of which nothing is run and nothing grows beyond bounds.

The loader is PyYAML's safe one, so tags of Python objects are refused. What a recipe means is `config.py`'s.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from sampo_cli.errors import UsageError
from sampo_cli.trust import CONTROL

MOST_VALUES = 100_000
"""In one document, aliases written out: ten lines of aliases can stand for more values than there is memory."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-6` as a string; this reads it as the number that everybody means. A date stays text."""

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        if _written_out(node, {}) > MOST_VALUES:
            problem = f"more than {MOST_VALUES:,} values, aliases written out"
            raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return self.construct_document(node)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _written_out(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node stands for; infinitely many where it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        items = [] if isinstance(node, yaml.ScalarNode) else node.value  # nodes, or pairs of them in a mapping
        parts = [part for item in items for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_written_out(part, known) for part in parts)
    return known[id(node)]


def parse_yaml(text: str, where: str, *, prose: bool = False) -> Any:
    """Plain values from YAML.

    Args:
        where: how messages call the text.
        prose: its texts are read by people; else they are names, of which none has a line end.

    Raises:
        UsageError: not YAML, a tag that is not YAML's own, more than `MOST_VALUES`, or a line end or control
            character in a name.
    """
    try:
        content = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UsageError(f"{place}: not YAML: {problem}") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, thousands of brackets
        raise UsageError(f"{where}: not YAML: {error}") from error
    if not prose:
        _refuse_control(content, where)
    return content


def _refuse_control(value: Any, where: str) -> None:
    if isinstance(value, dict | list):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            _refuse_control(part, where)
    elif isinstance(value, str) and CONTROL.search(value):
        raise UsageError(f"{where}: a line end or control character in {value[:100]!r}", hint="no name holds one")
