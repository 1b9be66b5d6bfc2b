"""What a push to the Hugging Face Hub would send of a run's adapter or of a merged model. No network.

Which files are published (an explicit list, nothing else, and nothing that a link leads to), what they say about this
machine (nothing), who will see them (nobody else, unless asked for), and what in them looks like a secret.
`upload.py` sends them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sampo_cli.card import model_card
from sampo_cli.card_facts import hub_id, read_facts, read_tree, run_of
from sampo_cli.card_results import plots_of
from sampo_cli.errors import ModelError, UsageError
from sampo_cli.fingerprint import INDEX_FILE, merged_is_current, read_header, weight_files
from sampo_cli.remote import is_path_like
from sampo_cli.secrets_scan import scan
from sampo_cli.trust import check_inside, files_like

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = ("adapter_config.json", "sampo.json")
MODEL_FILES = (
    *("config.json", "generation_config.json", INDEX_FILE, "sampo.json"),
    *("preprocessor_config.json", "processor_config.json", "modeling_*.py", "configuration_*.py", "tokenization_*.py"),
)
SHARED_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model*"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "*.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)
CLEANED_FILES = ("adapter_config.json", "config.json", "generation_config.json", "tokenizer_config.json", "sampo.json")


@dataclass(frozen=True)
class PushFile:
    """One file to publish: path and size (bytes) in the repository; a local file, or the content itself."""

    path: str
    size: int
    source: Path | bytes


@dataclass(frozen=True)
class PushPlan:
    """Everything that a push will do.

    Attributes:
        card: the README.md, also among `files`.
        notes: what the user should know.
        warnings: what looks like a secret in the files, and where.
    """

    repo: str
    private: bool
    files: tuple[PushFile, ...]
    card: str
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        files = [{"path": file.path, "size": file.size} for file in self.files]
        told = {"notes": list(self.notes), "warnings": list(self.warnings)}
        return {"repo": self.repo, "private": self.private, "files": files, "card": self.card, **told}


def plan(source: Path, *, repo: str, merged: bool = False, public: bool = False) -> PushPlan:
    """What `push` would publish of a run, an adapter folder or a merged model's folder. No network, nothing written.

    Args:
        source: of a run its `adapter/` is taken, with `merged` its `merged/`.
        repo: `user/name` or `organisation/name`.

    Raises:
        UsageError: `repo` is no such name, or a file is a link that leads out of the folder.
        ModelError: `source` holds nothing to publish, or something broken.
    """
    if hub_id(repo, near=Path(), certain=True) is None or "/" not in repo:
        hint = "it looks like user/name: letters, digits, '-', '_' and '.', at most 96"
        raise UsageError(f"--repo '{repo}': not a name on the Hub", hint=hint)
    folder, is_model = _folder_of(source, merged)
    facts = read_facts(source, merged=is_model)
    plots = plots_of(run_of(source))
    card = model_card(source, repo=repo, merged=is_model, plots=plots)
    notes = []
    if facts.base is None and not is_model:
        notes.append("the base model has no name on the Hub: adapter_config.json is published without one")
    if facts.summary.get("state", "finished") != "finished":
        notes.append(f"the run is not complete: its state is '{facts.summary['state']}'")
    files = [_file(path, folder, facts.base) for path in _paths(folder, is_model)]
    readme = card.encode()
    files.append(PushFile("README.md", len(readme), readme))
    files += [PushFile(plot.path, len(plot.content), plot.content) for plot in plots]
    files.sort(key=lambda file: file.path)
    found = scan((file.path, file.source) for file in files)
    warnings = tuple(f"{finding.describe()}: take it out before others can read it" for finding in found)
    return PushPlan(repo, not public, tuple(files), card, tuple(notes), warnings)


def _folder_of(source: Path, merged: bool) -> tuple[Path, bool]:
    """The folder to publish, and whether it is a whole model."""
    if not source.is_dir():
        raise ModelError(f"{source}: there is no such folder", hint="give a run's folder, an adapter or a merged model")
    is_run = run_of(source) == source
    folder = source / ("merged" if merged else "adapter") if is_run else source
    check_inside(folder, source)
    has_adapter, has_model = (folder / "adapter_config.json").is_file(), (folder / "config.json").is_file()
    if merged and not has_model:
        raise ModelError(f"{source}: there is no merged model", hint=f"make one: sampo merge {source}")
    if merged and is_run and not merged_is_current(source):
        raise ModelError(f"{source}: merged/ is of an earlier adapter", hint=f"delete it, then: sampo merge {source}")
    if has_adapter or has_model:
        return folder, not has_adapter
    if is_run:
        raise ModelError(f"{source}: the run has no adapter yet", hint="let it finish, or go on with --resume")
    missing = "no summary.json, adapter_config.json or config.json"
    raise ModelError(f"{source}: neither a run nor an adapter nor a model ({missing})", hint="give a run's folder")


def _paths(folder: Path, is_model: bool) -> list[Path]:
    """The files of the explicit list that are there; the weights must be there and whole."""
    weights = weight_files(folder) if is_model else [folder / ADAPTER_WEIGHTS]
    for path in weights:
        if not path.is_file():
            hint = "only safetensors are published; pickled weights can run code where they are loaded"
            raise ModelError(f"{folder}: no {path.name}", hint=hint)
        read_header(path)
    named = MODEL_FILES if is_model else ADAPTER_FILES
    found = [path for pattern in (*named, *SHARED_FILES) for path in files_like(pattern, folder)]
    for path in (*weights, *found):
        check_inside(path, folder)
    return [*weights, *found]


def _file(path: Path, folder: Path, base: str | None) -> PushFile:
    """A file as it is published: a small JSON file that may name local folders as a copy without them."""
    name = path.relative_to(folder).as_posix()
    if name in CLEANED_FILES:
        content = read_tree(path)
        cleaned = _cleaned(content, base, folder, ours=name == "sampo.json")
        if cleaned != content:
            text = (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()
            return PushFile(name, len(text), text)
    return PushFile(name, path.stat().st_size, path)


def _cleaned(value: Any, base: str | None, folder: Path, *, ours: bool, key: str = "") -> Any:
    """JSON without names of local folders: the base's name on the Hub where it has one, else nothing.

    In `ours`, sampo's own file, any text that can only be a path is one.
    """
    if isinstance(value, dict):
        return {name: _cleaned(item, base, folder, ours=ours, key=name) for name, item in value.items()}
    if isinstance(value, list):
        return [_cleaned(item, base, folder, ours=ours) for item in value]
    if key in ("base_model_name_or_path", "base_model"):
        return base
    if not isinstance(value, str):
        return value
    if key in ("_name_or_path", "name_or_path"):
        return hub_id(value, near=folder) or ""
    return None if ours and is_path_like(value) else value
