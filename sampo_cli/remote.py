"""Names to local folders, and the Hub's exceptions to one line each.

Everything that may touch the network goes through here: a model or data set is fetched once into the Hub's own
cache and then read as a folder, so offline use and local use are the same code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from sampo_cli.errors import DataError, HubError, ModelError, SampoError
from sampo_cli.fingerprint import INDEX_FILE, SINGLE_FILE, read_header, read_json, weight_files
from sampo_cli.secrets_scan import mask
from sampo_cli.trust import CONTROL, check_model

RepoType = Literal["model", "dataset"]

TOKENIZER_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "README.md")
WEIGHT_FILES = ("*.safetensors",)
DATA_FILES = ("*.json", "*.jsonl", "*.csv", "*.parquet", "*.gz", "README.md")
NOT_NEEDED = ("original/*", "onnx/*", "*.gguf", "consolidated*")

_NOT_FOUND: dict[str, type[SampoError]] = {"model": ModelError, "dataset": DataError}


def is_path_like(name: str) -> bool:
    """True for what can only be a path: such a name is never looked up on the network."""
    return name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or name.endswith(("/", *_FILE_SUFFIXES))


_FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".gz", ".yaml", ".yml", ".safetensors", ".gguf", ".bin")


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn whatever huggingface_hub raises while doing `what` into a `HubError` that says what to do."""
    from huggingface_hub import errors as hub

    try:
        yield
    except SampoError:
        raise
    except hub.OfflineModeIsEnabled as error:
        raise HubError(f"{what}: the network is switched off", hint="unset HF_HUB_OFFLINE and try again") from error
    except hub.LocalEntryNotFoundError as error:
        raise _not_cached(what, error) from error
    except hub.LocalTokenNotFoundError as error:
        raise HubError(f"{what}: there is no Hugging Face token", hint=_LOG_IN) from error
    except hub.HFValidationError as error:
        raise HubError(f"{what}: {first_line(error)}", hint="a name on the Hub looks like 'owner/name'") from error
    except hub.HfHubHTTPError as error:
        raise _http_error(what, error) from error
    except (ConnectionError, TimeoutError) as error:
        raise HubError(f"{what}: {first_line(error)}", hint=_CONNECTION) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in _TRANSPORTS:
            raise
        raise HubError(f"{what}: {first_line(error)}", hint=_CONNECTION) from error


_TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
_LOG_IN = "`hf auth login`, or set HF_TOKEN"
_CONNECTION = "check the connection (and HF_ENDPOINT) and try again"
_HTTP_HINTS = {
    401: ("you are not logged in, or the token is wrong", _LOG_IN),
    403: ("access is denied", "ask for access on the repository's page; a token needs the right scope"),
    404: ("it does not exist, or is private", "check the name and revision; log in if it is private"),
    409: ("it conflicts with what is there", "look at the repository and try again"),
    429: ("too many requests", "wait a few minutes and try again"),
}
_SERVER_FAILED = 500


def _not_cached(what: str, error: Exception) -> HubError:
    """The client looked into its cache because the Hub had failed: the reason is what the Hub said."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    reason = error.__cause__
    if isinstance(reason, HfHubHTTPError):
        return _http_error(what, reason)
    off = "HF_HUB_OFFLINE is set" if reason is None or isinstance(reason, OfflineModeIsEnabled) else "no network"
    return HubError(
        f"{what}: {off}, and it is not (or not all) in the local cache",
        hint="check the connection (and HF_HUB_OFFLINE, HF_ENDPOINT), or the name: there is no folder of it here",
    )


def _http_error(what: str, error: Exception) -> HubError:
    from huggingface_hub import errors as hub

    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, hub.GatedRepoError):
        return HubError(
            f"{what}: access is gated (HTTP {status})",
            hint="accept the licence on the model's page, then `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, hub.RepositoryNotFoundError):
        hint = f"check the name; if it is private: {_LOG_IN}"
        return HubError(f"{what}: it does not exist, or is private (HTTP {status})", hint=hint)
    if isinstance(error, hub.RevisionNotFoundError):
        return HubError(f"{what}: there is no such revision (HTTP {status})", hint="check the branch, tag or commit")
    refused = ("the Hub refused", "correct that and try again")
    fallback = ("the Hub failed", "try again later") if status >= _SERVER_FAILED else refused
    reason, hint = _HTTP_HINTS.get(status, fallback)
    said = mask(" ".join(str(getattr(error, "server_message", None) or "").split()))[:200]
    return HubError(f"{what}: {reason} (HTTP {status})" + (f": {said}" if said else ""), hint=hint)


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type where it has none; no secrets, no control characters."""
    text = str(error).strip()
    return CONTROL.sub("�", mask(text.splitlines()[0]))[:300] if text else type(error).__name__


def local_folder(name: str) -> Path | None:
    """The folder that `name` names on this machine, if there is one."""
    try:
        path = Path(name).expanduser()
        return path.resolve() if path.is_dir() else None
    except (OSError, RuntimeError):  # longer than any name, or the home of nobody
        return None


def fetch(name: str, repo_type: RepoType, *, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The local folder of a model or data set: `name` itself if it is one, else a snapshot from the Hub.

    Raises:
        ModelError, DataError: a path-like name that is not there, a name or revision that is none.
        HubError: no network, no access, no such repository, or one whose files would lie outside of the cache.
    """
    if CONTROL.search(name) or (revision is not None and not _is_revision(revision)):
        raise _NOT_FOUND[repo_type](
            f"{repo_type} not found: {name[:200]!r} (revision {str(revision)[:200]!r}) is no name",
            hint="names and revisions hold no control characters, and revisions no '..'",
        )
    folder = local_folder(name)
    if folder is not None:
        return folder
    beside_folders = name.count("/") == 1 and Path(name).parent.is_dir()  # outputs/missing, seen from where outputs is
    if is_path_like(name) or beside_folders:
        raise _NOT_FOUND[repo_type](
            f"{repo_type} not found: there is no folder '{name}'",
            hint="check the path; a name on the Hub looks like 'owner/name'",
        )
    from huggingface_hub import snapshot_download

    what = f"{repo_type} '{name}'"
    with hub_errors(what):
        try:
            snapshot = snapshot_download(
                name,
                repo_type=repo_type,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(NOT_NEEDED),
            )
        except ValueError as error:
            if type(error) is not ValueError:
                raise
            hint = "do not use this repository: it has a file of a name that leads out of it"
            raise HubError(f"{what}: {first_line(error)}", hint=hint) from error
    return Path(snapshot)


def _is_revision(revision: str) -> bool:
    """True for what can be a branch, a tag or a commit: it becomes part of a path in the cache."""
    return bool(revision) and not CONTROL.search(revision) and ".." not in revision and not revision.startswith("/")


def fetch_model(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local folder of a model; without `weights` only its config and tokenizer are fetched.

    Raises:
        ModelError: not there, no weights in whole safetensors files, or something that transformers would load
            instead of them.
    """
    patterns = TOKENIZER_FILES + (WEIGHT_FILES if weights else ())
    folder = fetch(name, "model", revision=revision, patterns=patterns)
    what = f"model '{name}'"
    if not (folder / "config.json").is_file():
        raise ModelError(f"{what}: no config.json in {folder}", hint="give a folder in transformers' format")
    check_model(what, folder)
    if weights:
        _check_weights(what, folder)
    return folder


def _check_weights(what: str, folder: Path) -> None:
    hint = "only safetensors are read; pickled weights can run code. Convert them first"
    if not any((folder / file).is_file() for file in (SINGLE_FILE, INDEX_FILE)):
        raise ModelError(f"{what}: no {SINGLE_FILE} and no {INDEX_FILE} in {folder}", hint=hint)
    named = read_json(folder / "config.json").get("transformers_weights")
    if named not in (None, SINGLE_FILE, INDEX_FILE):
        raise ModelError(f"{what}: its config.json names other weights, {str(named)[:100]!r}", hint=hint)
    for path in weight_files(folder):
        read_header(path)
