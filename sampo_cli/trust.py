"""What a folder from somebody else may make happen here: its files are read, nothing in it is run, no link is followed
out of it.

Models, adapters, runs and recipes come from anybody. Python code that comes with a model runs only where the person at
the command line said so; a file cannot say it. Reads configs, never weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sampo_cli.errors import ModelError, UsageError
from sampo_cli.fingerprint import read_json

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""What no name has: line ends, a terminal's control characters, halves of characters."""

RISK = "code that comes with a model runs with all your rights: read it first, then"
FLAG = "--set model.trust_remote_code=true"

_TEMPLATE_NAME = re.compile(r"\w[\w .-]*")
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def leads_out(path: Path, folder: Path) -> bool:
    """True if `path`, with links followed, lies outside of `folder`. The Hub's cache may link to its own blobs."""
    whole = folder.resolve()
    blobs = [place.parent / "blobs" for place in whole.parents if place.name == "snapshots"]
    return not any(path.resolve().is_relative_to(place) for place in (whole, *blobs))


def check_inside(path: Path, folder: Path) -> None:
    """Check a file that is going to be copied or published, or a folder's entry that is going to be written.

    Raises:
        UsageError: it is a link to a place outside of `folder`, or lies behind one.
    """
    if leads_out(path, folder):
        raise UsageError(f"{path} is a link that leads out of {folder}", hint="put the file itself there")


def files_like(pattern: str, folder: Path) -> list[Path]:
    """The files in a folder that fit a pattern, links among them; none that is hidden or whose name cannot be shown."""
    found = (path for path in sorted(folder.glob(pattern)) if path.is_file() and not path.name.startswith("."))
    return [path for path in found if not CONTROL.search(path.name)]


def check_links(folder: Path) -> None:
    """`check_inside` for every link in a folder that is going to be written into."""
    for path in folder.rglob("*"):
        if path.is_symlink():
            check_inside(path, folder)


def check_consent(tree: Mapping[str, Any], where: object, *, given: bool, flag: str = FLAG) -> None:
    """Check that a recipe's file does not itself allow a model's own Python code to run.

    Args:
        tree: what the file holds.
        where: how messages call it.
        given: the command line allows it.
        flag: what allows it there.

    Raises:
        UsageError: only the file does.
    """
    section = tree.get("model")
    asked = section.get("trust_remote_code") if isinstance(section, Mapping) else None
    if asked not in (None, False) and not given:
        raise UsageError(f"{where}: a file cannot switch on model.trust_remote_code", hint=f"{RISK} {flag}")


def own_code(folder: Path) -> str | None:
    """The first class of a model's or tokenizer's own code that its folder names, or None if it names none."""
    for name in ("config.json", "tokenizer_config.json"):
        waiting = [read_json(folder / name).get("auto_map")] if (folder / name).is_file() else []
        while waiting:
            named = waiting.pop(0)
            if isinstance(named, str):
                return f"{named[:100]} ({name})"
            if isinstance(named, dict | list):
                waiting += named.values() if isinstance(named, dict) else named
    return None


def does_not_load(what: str, folder: Path, reason: str, hint: str, *, trusted: bool) -> ModelError:
    """The error for a config or tokenizer that transformers cannot load without running code.

    Args:
        what: how the message begins, such as "model 'x'".
        reason, hint: what to say where no code of its own is the reason.
        trusted: its code was allowed to run.
    """
    code = None if trusted else own_code(folder)
    if code is None:
        return ModelError(f"{what}: {reason}", hint=hint)
    message = f"{what} needs Python code of its own, {code}, which is not run: {reason}"
    return ModelError(message, hint=f"{RISK} {FLAG}; or take a model that transformers knows")


def check_templates(what: str, templates: object) -> None:
    """Check the names of a tokenizer's chat templates, which become names of files when it is saved.

    Args:
        templates: one template, or several by name.

    Raises:
        ModelError: a name that is a path.
    """
    names = [str(name) for name in templates] if isinstance(templates, Mapping) else []
    bad = next((name for name in names if not _TEMPLATE_NAME.fullmatch(name)), None)
    if bad is not None:
        raise ModelError(
            f"{what}: a chat template called {bad[:100]!r}, which would be saved as a file outside of its folder",
            hint="rename it in tokenizer_config.json",
        )


def check_model(what: str, folder: Path) -> None:
    """Check a model's folder for what would make transformers load something else than its weights.

    Raises:
        ModelError: config.json names a kernel on the Hub (native code), or an adapter lies beside the model.
    """
    config = read_json(folder / "config.json")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for key, value in ((key, part.get(key)) for part in parts for key in _KERNELS):
        named = value.values() if isinstance(value, dict) else [value]
        kernel = next((name for name in named if isinstance(name, str) and "/" in name), None)
        if kernel:
            raise ModelError(
                f"{what}: {key}={kernel[:100]!r} in config.json names code on the Hub", hint="delete that line"
            )
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{what}: an adapter_config.json lies beside its config.json, and transformers would add that adapter",
            hint="move the adapter to a folder of its own and give it with --adapter",
        )
