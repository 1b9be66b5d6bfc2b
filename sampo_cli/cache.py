"""What sampo keeps because it can make it again: where it lies, what there is, and how to be rid of it.

Two kinds: `pairs` (tokenized, `dataset.py`) and `reference` (log-probs per token, `reference.py`). Each entry is a
folder that was finished under its name or is not there; what is unfinished starts with a dot.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sampo_cli.errors import UsageError

KINDS = ("pairs", "reference")
UNFINISHED = ".building-"
"""How the name of an entry begins that is being written, or that a process left when it was killed."""


def cache_folder() -> Path:
    """Where it all lies: $SAMPO_CACHE, or ~/.cache/sampo."""
    return Path(os.environ.get("SAMPO_CACHE") or Path.home() / ".cache" / "sampo").expanduser()


def lock(kind: str, key: str, timeout: float = -1) -> FileLock:
    """The lock of whoever writes an entry; it dies with its process.

    Args:
        timeout: how many seconds to wait for another process; -1 is for ever.
    """
    folder = cache_folder() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{kind}-{key}", timeout=timeout)


def remove_unfinished(path: Path) -> bool:
    """Delete an entry that nobody is writing any more; False if somebody is."""
    try:
        with lock(path.parent.name, path.name.removeprefix(UNFINISHED), timeout=0):
            shutil.rmtree(path, ignore_errors=True)
    except Timeout:
        return False
    return True


def is_complete(folder: Path) -> bool:
    """True for an entry whose files are as long as they were when it was finished."""
    try:
        sizes = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


@dataclass(frozen=True)
class Entry:
    """One thing in the cache. `bytes` on the disk; `written` in ISO 8601, UTC; `state`: whole, unfinished, broken."""

    kind: str
    key: str
    of: str
    state: str
    bytes: int
    written: str
    path: Path

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def entries() -> list[Entry]:
    """Everything in the cache, newest first."""
    found = []
    for kind in KINDS:
        for path in sorted((cache_folder() / kind).glob("*")):
            if path.is_dir():
                found.append(_entry(kind, path))
    return sorted(found, key=lambda entry: entry.written, reverse=True)


def _entry(kind: str, path: Path) -> Entry:
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        meta = {}
    state = "unfinished" if path.name.startswith(UNFINISHED) else "whole" if is_complete(path) else "broken"
    stats = [file.stat() for file in path.rglob("*") if file.is_file()]
    written = max([stat.st_mtime for stat in stats], default=path.stat().st_mtime)
    return Entry(
        kind=kind,
        key=path.name.removeprefix(UNFINISHED),
        of=str(meta.get("of", "")),
        state=state,
        bytes=sum(stat.st_size for stat in stats),
        written=datetime.fromtimestamp(written, UTC).isoformat(timespec="seconds"),
        path=path,
    )


def clear(keys: Sequence[str] = ()) -> list[Entry]:
    """Delete the entries whose keys begin so, or all; returns what was deleted.

    A run that is using one keeps reading it on systems that delete a file when its last reader is gone. One that a
    run is writing stays.

    Raises:
        UsageError: nothing begins so.
    """
    found = entries()
    chosen = [entry for entry in found if not keys or any(entry.key.startswith(key) for key in keys)]
    for key in keys:
        if not any(entry.key.startswith(key) for entry in chosen):
            raise UsageError(f"nothing in the cache has a key that begins with '{key}'", hint="see: sampo cache list")
    return [entry for entry in chosen if _remove(entry)]


def _remove(entry: Entry) -> bool:
    if entry.state == "unfinished":
        return remove_unfinished(entry.path)
    shutil.rmtree(entry.path)
    return True
