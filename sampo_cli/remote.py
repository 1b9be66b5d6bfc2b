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

RepoType = Literal["model", "dataset"]

TOKENIZER_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md")
WEIGHT_FILES = ("*.safetensors", "*.py")
DATA_FILES = ("*.json", "*.jsonl", "*.csv", "*.parquet", "*.gz", "README.md")
NOT_NEEDED = ("original/*", "onnx/*", "*.gguf")

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
    except (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError) as error:
        raise HubError(
            f"{what}: no network, and it is not in the local cache",
            hint="check the connection (and HF_HUB_OFFLINE, HF_ENDPOINT), or give a local folder",
        ) from error
    except (hub.LocalTokenNotFoundError, hub.HFValidationError) as error:
        raise HubError(f"{what}: {first_line(error)}", hint="`hf auth login`, or set HF_TOKEN") from error
    except hub.HfHubHTTPError as error:
        raise _http_error(what, error) from error
    except (ConnectionError, TimeoutError) as error:
        raise HubError(f"{what}: {first_line(error)}", hint="check the connection and try again") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpcore", "requests", "urllib3"):
            raise
        raise HubError(f"{what}: {first_line(error)}", hint="check the connection and try again") from error


_HTTP_HINTS = {
    401: ("you are not logged in, or the token is wrong", "`hf auth login`, or set HF_TOKEN"),
    403: ("access is denied", "ask for access on the repository's page; a token needs the right scope"),
    404: ("it does not exist, or is private", "check the name and revision; log in if it is private"),
    409: ("it conflicts with what is there", "look at the repository and try again"),
    429: ("too many requests", "wait a few minutes and try again"),
}


def _http_error(what: str, error: Exception) -> HubError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if type(error).__name__ == "GatedRepoError":
        return HubError(
            f"{what}: access is gated (HTTP {status})",
            hint="accept the licence on the model's page, then `hf auth login` or set HF_TOKEN",
        )
    reason, hint = _HTTP_HINTS.get(status or 0, (first_line(error), "the Hub failed; try again later"))
    return HubError(f"{what}: {reason} (HTTP {status})", hint=hint)


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def local_folder(name: str) -> Path | None:
    """The folder that `name` names on this machine, if there is one."""
    path = Path(name).expanduser()
    return path if path.is_dir() else None


def fetch(name: str, repo_type: RepoType, *, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The local folder of a model or data set: `name` itself if it is one, else a snapshot from the Hub.

    Raises:
        ModelError, DataError: a path-like name that is not there.
        HubError: no network, no access, no such repository.
    """
    folder = local_folder(name)
    if folder is not None:
        return folder
    if is_path_like(name):
        raise _NOT_FOUND[repo_type](
            f"{repo_type} not found: there is no folder '{name}'",
            hint="check the path; a name on the Hub looks like 'owner/name'",
        )
    from huggingface_hub import snapshot_download

    with hub_errors(f"{repo_type} '{name}'"):
        return Path(
            snapshot_download(
                name,
                repo_type=repo_type,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(NOT_NEEDED),
            )
        )


def fetch_model(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local folder of a model; without `weights` only its config and tokenizer are fetched."""
    patterns = TOKENIZER_FILES + (WEIGHT_FILES if weights else ())
    folder = fetch(name, "model", revision=revision, patterns=patterns)
    if not (folder / "config.json").is_file():
        raise ModelError(f"model '{name}': no config.json in {folder}", hint="give a folder in transformers' format")
    if weights and not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"model '{name}': no *.safetensors in {folder}",
            hint="only safetensors are read; pickled weights can run code. Convert them first",
        )
    return folder
