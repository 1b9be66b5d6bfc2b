"""What the files of a run, an adapter or a merged model say of it, for a card and for publishing.

They may come from anybody: a value of another type than expected counts as not there. No network, no weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sampo_cli.errors import ModelError, UsageError
from sampo_cli.fingerprint import read_json
from sampo_cli.plain_yaml import parse_yaml
from sampo_cli.remote import is_path_like, local_folder

Tree = dict[str, Any]

_LICENCE = ("license", "license_name", "license_link")
_FRONT_MATTER = re.compile(r"\A\s*---\s*\n(.*?)\n---", re.DOTALL)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_METHOD = re.compile(r"[a-z0-9-]{1,40}")
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


@dataclass(frozen=True)
class Facts:
    """What is known of an adapter or a merged model, whatever it was read from.

    Attributes:
        base: the base model's name on the Hub, or None where it is a local folder or unknown.
        merged: a whole model, not an adapter.
        datasets: names on the Hub; `local_data` counts the sources that are files or folders.
        licence: `license`, `license_name` and `license_link` of the base, where known.
        recipe, summary: what the run folder says; empty without a run.
    """

    base: str | None
    base_revision: str | None
    merged: bool
    method: str | None
    datasets: tuple[str, ...]
    local_data: int
    licence: Tree
    recipe: Tree = field(repr=False)
    summary: Tree = field(repr=False)


def read_facts(folder: Path, *, merged: bool = False) -> Facts:
    """What the files in `folder` (a run, an adapter or a merged model) say."""
    run = run_of(folder)
    part = folder / ("merged" if merged else "adapter") if (folder / "summary.json").is_file() else folder
    config, own = read_tree(part / "adapter_config.json"), read_tree(part / "sampo.json")
    summary = read_tree(run / "summary.json") if run else {}
    recipe = read_tree(run / "recipe.yaml") if run else {}
    model, near = tree_of(summary.get("model")), run or folder
    named = model.get("name") or own.get("base_model") or config.get("base_model_name_or_path")
    commit = _known_commit(model.get("commit"))
    base = hub_id(named, near=near, certain=commit is not None)
    method = tree_of(summary.get("method")).get("name") or own.get("method")
    listed = [str(name) for name in list_of(tree_of(recipe.get("data")).get("sources"))]
    sources = [None if is_path_like(name) else hub_id(name.partition(":")[0], near=near) for name in listed]
    return Facts(
        base=base,
        base_revision=commit if base else None,
        merged=merged or (part / "config.json").is_file(),
        method=method if isinstance(method, str) and _METHOD.fullmatch(method) else None,
        datasets=tuple(dict.fromkeys(name for name in sources if name)),
        local_data=sources.count(None),
        licence=_licence(base, commit, named),
        recipe=recipe,
        summary=summary,
    )


def run_of(folder: Path) -> Path | None:
    """The run folder that `folder` is, or that it is the adapter or merged model of; None without a run."""
    whole = folder.resolve()
    places = [folder, whole.parent] if whole.name in ("adapter", "merged") else [folder]
    return next((place for place in places if (place / "summary.json").is_file()), None)


def _known_commit(value: object) -> str | None:
    return value if isinstance(value, str) and _COMMIT.fullmatch(value) else None


def hub_id(name: object, *, near: Path, certain: bool = False) -> str | None:
    """`name` if it can only be a name on the Hub, else None.

    Args:
        near: a folder of the run; a relative path that exists from here, there or above is a local folder.
        certain: it is known not to be a folder.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(name, str) or not _NAME.fullmatch(name) or is_path_like(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    places = [Path.cwd(), near.resolve(), *near.resolve().parents]
    return name if certain or not any((place / name).exists() for place in places) else None


def tree_of(value: object) -> Tree:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def list_of(value: object) -> list[Any]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def read_tree(path: Path) -> Tree:
    """What a JSON or YAML file of ours holds; empty where there is none, a ModelError where it is broken."""
    if not path.is_file():
        return {}
    if path.suffix == ".json":
        return read_json(path)
    try:
        return tree_of(parse_yaml(path.read_text(encoding="utf-8"), str(path), prose=True))
    except (OSError, UnicodeDecodeError, UsageError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error


def _licence(base: str | None, commit: str | None, named: object) -> Tree:
    """Licence fields of the base's own card: from its folder or the Hub's cache, never from the network."""
    from huggingface_hub import try_to_load_from_cache

    card: object = None
    if base is not None:
        card = try_to_load_from_cache(base, "README.md", revision=commit)
    elif isinstance(named, str) and (folder := local_folder(named)):
        card = str(folder / "README.md")
    if not isinstance(card, str) or not Path(card).is_file():
        return {}
    front = _FRONT_MATTER.match(Path(card).read_text(encoding="utf-8", errors="replace"))
    try:
        metadata = tree_of(parse_yaml(front[1], card, prose=True)) if front else {}
    except UsageError:
        return {}
    licence = {key: metadata[key] for key in _LICENCE if isinstance(metadata.get(key), str)}
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence.get("license", "")):
        return {}
    link = licence.pop("license_link", "")
    if base and re.fullmatch(r"\w[\w.-]*", link):
        link = f"https://huggingface.co/{base}/blob/main/{link}"
    return licence | ({"license_link": link} if link.startswith("https://") else {})
