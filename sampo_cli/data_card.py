"""The card of a data set's folder, checked before the datasets library acts on it.

The card says which files there are. It comes from anybody: it may name files of other folders or addresses in the
network, and hold YAML that fills the memory. Which files are taken is not decided here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sampo_cli.errors import DataError, UsageError
from sampo_cli.plain_yaml import parse_yaml

STANDALONE = ".huggingface.yaml"
"""What the datasets library reads beside README.md, of the same form as its front matter."""


def check_card(name: str, folder: Path) -> None:
    """Check the front matter of README.md and `STANDALONE` in a data set's folder.

    Args:
        name: how messages call the data set.

    Raises:
        DataError: not to be read, not YAML, too many values, or a file that lies elsewhere.
    """
    try:
        documents = list(_documents(folder))
    except OSError as error:
        raise DataError(f"data '{name}': {error.filename}: {error.strerror}", hint="check who may read it") from error
    for file, text in documents:
        try:
            content = parse_yaml(text, file, prose=True)
        except UsageError as error:
            raise DataError(f"data '{name}': {error.message}", hint=f"correct or delete {folder / file}") from error
        for pattern in _listed_files(content):
            if _leads_out(pattern):
                raise DataError(f"data '{name}': its {file} names a file outside of it: {pattern[:200]!r}")


def _documents(folder: Path) -> Iterator[tuple[str, str]]:
    """(file, YAML) of those that are there."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    for file in ("README.md", STANDALONE):
        if (folder / file).is_file():
            text = (folder / file).read_text(encoding="utf-8-sig", errors="replace")
            block = REGEX_YAML_BLOCK.search(text)
            yield file, text if file == STANDALONE else block[2] if block else ""


def _listed_files(content: Any) -> Iterator[str]:
    """The texts under `data_files` and `data_dir` of each entry of `configs`."""
    configs = content.get("configs") if isinstance(content, dict) else None
    entries = [entry for entry in configs if isinstance(entry, dict)] if isinstance(configs, list) else []
    waiting = [entry.get(key) for entry in entries for key in ("data_files", "data_dir")]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict | list):
            waiting += part.values() if isinstance(part, dict) else part


def _leads_out(pattern: str) -> bool:
    is_address = "://" in pattern or "::" in pattern
    return is_address or pattern.startswith(("/", "~")) or ".." in Path(pattern).parts
