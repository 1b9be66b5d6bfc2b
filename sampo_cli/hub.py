"""A run's adapter, or a merged model, to the Hugging Face Hub: plan what would be sent, then send it.

huggingface_hub moves the bytes. Here: which files are published (an explicit list, nothing else), what they say about
this machine (nothing), who will see them (nobody else, unless asked for), and what is tried again.
"""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sampo_cli import __version__
from sampo_cli.card import hub_id, model_card, read_facts, read_tree, run_of
from sampo_cli.errors import HubError, ModelError, UsageError
from sampo_cli.fingerprint import INDEX_FILE, merged_is_current, read_header, weight_files
from sampo_cli.remote import first_line, hub_errors, is_path_like

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

Result = TypeVar("Result")

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
WEIGHTS = re.compile(r"(adapter_(model|config)|model|pytorch_model)[\w.-]*\.(safetensors|bin|json)")

RETRY_WAITS: tuple[float, ...] = (1.0, 3.0, 9.0)
LONGEST_WAIT = 60.0
_TRANSIENT = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class PushFile:
    """One file to publish: path and size (bytes) in the repository; a local file, or the content itself."""

    path: str
    size: int
    source: Path | bytes


@dataclass(frozen=True)
class PushPlan:
    """Everything that a push will do. `card` is the README.md, also among `files`; `notes` are for the user to read."""

    repo: str
    private: bool
    files: tuple[PushFile, ...]
    card: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        files = [{"path": file.path, "size": file.size} for file in self.files]
        return {"repo": self.repo, "private": self.private, "files": files, "card": self.card, "notes": [*self.notes]}


@dataclass(frozen=True)
class PushResult:
    """Where it went: the repository's page, the commit's id, the paths of its files."""

    url: str
    commit: str
    files: tuple[str, ...]
    private: bool

    def to_dict(self) -> dict[str, Any]:
        return {"url": self.url, "commit": self.commit, "files": list(self.files), "private": self.private}


def plan(source: Path, *, repo: str, merged: bool = False, public: bool = False) -> PushPlan:
    """What `push` would publish of a run, an adapter folder or a merged model's folder. No network, nothing written.

    Args:
        source: of a run its `adapter/` is taken, with `merged` its `merged/`.
        repo: `user/name` or `organisation/name`.

    Raises:
        UsageError: `repo` is no such name.
        ModelError: `source` holds nothing to publish, or something broken.
    """
    if hub_id(repo, near=Path(), commit=True) is None or "/" not in repo:
        hint = "it looks like user/name: letters, digits, '-', '_' and '.', at most 96"
        raise UsageError(f"--repo '{repo}': not a name on the Hub", hint=hint)
    folder, is_model = _folder_of(source, merged)
    facts = read_facts(source, merged=is_model)
    card = model_card(source, repo=repo, merged=is_model)
    notes = []
    if facts.base is None and not is_model:
        notes.append("the base model has no name on the Hub: adapter_config.json is published without one")
    if facts.summary.get("state", "finished") != "finished":
        notes.append(f"the run is not complete: its state is '{facts.summary['state']}'")
    files = [_file(path, folder, facts.base) for path in _paths(folder, is_model)]
    readme = card.encode()
    files.append(PushFile("README.md", len(readme), readme))
    return PushPlan(repo, not public, tuple(sorted(files, key=lambda file: file.path)), card, tuple(notes))


def _folder_of(source: Path, merged: bool) -> tuple[Path, bool]:
    """The folder to publish, and whether it is a whole model."""
    if not source.is_dir():
        raise ModelError(f"{source}: there is no such folder", hint="give a run's folder, an adapter or a merged model")
    is_run = run_of(source) == source
    folder = source / ("merged" if merged else "adapter") if is_run else source
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
            raise ModelError(f"{folder}: no {path.name}", hint="only safetensors are published")
        read_header(path)
    named = MODEL_FILES if is_model else ADAPTER_FILES
    found = [path for pattern in (*named, *SHARED_FILES) for path in sorted(folder.glob(pattern)) if path.is_file()]
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


def push(plan: PushPlan) -> PushResult:
    """Publish `plan` as one commit; the repository is made if it is not there.

    One that is there must already be as visible as asked for (a private push never fills a public repository, and
    `public` never opens a private one) and hold no weights that this commit would not replace.

    Raises:
        UsageError: the repository does not fit. Nothing was uploaded.
        HubError: no token, no access, no network, or the Hub failed for longer than is waited for.
    """
    from huggingface_hub import HfApi, get_token

    what = f"push to '{plan.repo}'"
    if get_token() is None:
        raise HubError(f"{what}: there is no Hugging Face token", hint="`hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="sampo", library_version=__version__)
    with _push_errors(what):
        _prepare(api, plan)
        commit = _upload(api, plan)
    return PushResult(f"{api.endpoint}/{plan.repo}", commit.oid, tuple(f.path for f in plan.files), plan.private)


@contextmanager
def _push_errors(what: str) -> Iterator[None]:
    """`hub_errors`, and what only an upload raises."""
    from huggingface_hub.errors import HfHubHTTPError

    with hub_errors(what):
        try:
            yield
        except RuntimeError as error:  # "Error while uploading 'file'"; the reason is behind it
            raise (error.__cause__ or error) from None
        except ValueError as error:  # an answer that is no JSON, refused front matter, an LFS object refused
            if isinstance(error, HfHubHTTPError):
                raise
            raise HubError(f"{what}: {first_line(error)}", hint="the Hub answered something unexpected") from error


def _prepare(api: HfApi, plan: PushPlan) -> None:
    """Make the repository if it is not there, and see that what is there fits."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        there = _repeat(lambda: api.model_info(plan.repo, timeout=30))
    except RepositoryNotFoundError:
        _repeat(lambda: api.create_repo(plan.repo, private=plan.private, exist_ok=True))
        there = _repeat(lambda: api.model_info(plan.repo, timeout=30))
    _check_fits(plan, is_private=there.private is True, names=[file.rfilename for file in there.siblings or []])


def _check_fits(plan: PushPlan, *, is_private: bool, names: list[str]) -> None:
    there = f"'{plan.repo}' is there and"
    if plan.private and not is_private:
        hint = "--public to publish them, or another --repo"
        raise UsageError(f"{there} public: a private push would publish these files", hint=hint)
    if is_private and not plan.private:
        hint = "push without --public, make it public in its settings first, or give another --repo"
        raise UsageError(f"{there} private, and --public does not open it", hint=hint)
    ours = {file.path for file in plan.files}
    stale = ", ".join([name for name in names if WEIGHTS.fullmatch(name) and name not in ours][:3])
    if stale:
        hint = "delete them there first, or give another --repo"
        raise UsageError(f"{there} holds other weights ({stale}), which a loader may take for these", hint=hint)


def _upload(api: HfApi, plan: PushPlan) -> CommitInfo:
    """Send the large files, then one commit.

    The client repeats a large file's requests itself: over xet where it is installed; where that is not spoken or not
    let through, over plain HTTP, which it takes for open files. The commit's requests it makes once: they are repeated
    here. A commit whose answer was lost is then made twice, with the same files.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    with ExitStack() as stack:
        operations = _operations(plan)
        try:
            api.preupload_lfs_files(plan.repo, operations, free_memory=False)
        except (HfHubHTTPError, OfflineModeIsEnabled):
            raise
        except OSError:  # what hf_xet raises: ConnectionError, PermissionError, FileNotFoundError
            operations = _operations(plan, stack)
            api.preupload_lfs_files(plan.repo, operations, free_memory=False)
        message = f"Upload with sampo {__version__}"
        return _repeat(lambda: api.create_commit(plan.repo, operations, commit_message=message))


def _operations(plan: PushPlan, stack: ExitStack | None = None) -> list[CommitOperationAdd]:
    """What the client is asked to add; with a `stack` all of it as open files, closed when it ends."""
    from huggingface_hub import CommitOperationAdd

    def content(source: Path | bytes) -> Any:
        if stack is None:
            return source
        return stack.enter_context(io.BytesIO(source) if isinstance(source, bytes) else source.open("rb"))

    return [CommitOperationAdd(file.path, content(file.source)) for file in plan.files]


def _repeat(request: Callable[[], Result]) -> Result:
    """Make a request again after a broken connection or a passing failure of the Hub, `RETRY_WAITS` times at most.

    A Hub that cannot be reached at all is not waited for.
    """
    for wait in RETRY_WAITS:
        try:
            return request()
        except Exception as error:
            asked = _wait_for(error)
            if asked is None:
                raise
            time.sleep(max(wait, asked))
    return request()


def _wait_for(error: Exception) -> float | None:
    """Seconds that the Hub asks to wait before the next try (0 for none), or None where another try is no use."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if isinstance(error, HfHubHTTPError):
        after = error.response.headers.get("Retry-After", "")
        seconds = float(after) if after.isdigit() else 0.0
        return seconds if error.response.status_code in _TRANSIENT and seconds <= LONGEST_WAIT else None
    broken = isinstance(error, HTTPError) and type(error).__name__ != "ConnectError"
    return 0.0 if broken or isinstance(error, json.JSONDecodeError) else None  # JSON: a proxy's page for an answer
