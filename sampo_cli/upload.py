"""Send what `hub.py` planned: make or check the repository, upload, and try again what may pass.

huggingface_hub moves the bytes; which bytes is not decided here.
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
from sampo_cli.errors import HubError, UsageError
from sampo_cli.hub import PushPlan
from sampo_cli.remote import first_line, hub_errors
from sampo_cli.secrets_scan import mask

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

Result = TypeVar("Result")

WEIGHTS = re.compile(r"(adapter_(model|config)|model|pytorch_model)[\w.-]*\.(safetensors|bin|json)")

RETRY_WAITS: tuple[float, ...] = (1.0, 3.0, 9.0)
LONGEST_WAIT = 60.0
_TRANSIENT = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class PushResult:
    """Where it went: the repository's page, the commit's id, the paths of its files; what the plan warned of."""

    url: str
    commit: str
    files: tuple[str, ...]
    private: bool
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "commit": self.commit,
            "files": list(self.files),
            "private": self.private,
            "warnings": list(self.warnings),
        }


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
    paths = tuple(file.path for file in plan.files)
    return PushResult(f"{mask(api.endpoint)}/{plan.repo}", commit.oid, paths, plan.private, plan.warnings)


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
