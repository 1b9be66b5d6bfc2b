"""Keys of a recipe that are set from outside: `section.key=value` on a command line, a dictionary from Python.

Whether such a key exists and takes the value is for `config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sampo_cli.errors import UsageError
from sampo_cli.plain_yaml import parse_yaml

Settings = Mapping[str, Any] | Sequence[str]
"""Keys of a recipe: `{"section.key": value}`, or texts `section.key=value` whose values are YAML."""


def apply_settings(tree: dict[str, Any], settings: Settings) -> None:
    """Write settings into `tree`.

    Raises:
        UsageError: one that is no `section.key`, or a text without a value or with one that is not YAML.
    """
    for setting in settings:
        key, separator, text = setting.partition("=")
        section, dot, name = key.strip().partition(".")
        if bool(separator) == isinstance(settings, Mapping) or not dot or not name:
            raise UsageError(f"--set {setting}: expected section.key=value", hint="for example train.save_every=20")
        value = settings[setting] if isinstance(settings, Mapping) else parse_yaml(text, f"--set {key}")
        put(tree, section, name, value)


def keys_of(settings: Settings) -> set[str]:
    """The keys that are set."""
    return {setting.partition("=")[0].strip() for setting in settings}


def put(tree: dict[str, Any], section: str, key: str, value: Any) -> None:
    """Set one key of one section; a dotted key goes deeper (`columns.prompt`)."""
    node = tree.setdefault(section, {})
    *parents, last = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else node
    if not isinstance(node, dict):
        raise UsageError(f"'{section}' is not a section with keys in this recipe")
    node[last] = value
