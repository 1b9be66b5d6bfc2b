"""Room on the disk: files that are there whole or not at all, and a full disk as an error that says where.

Folders of files that belong together are `checkpoint.py`'s.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from sampo_cli.errors import SampoError, UsageError

FULL_BYTES = 2**16
"""A disk with less than this left is taken to be the reason why a write failed; libraries seldom say."""


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def expanded(path: str | Path) -> Path:
    """The path with somebody's home for ~.

    Raises:
        UsageError: there is nobody of that name.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{path}: there is no home of that name", hint="write the folder's whole path") from error


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def is_writable(folder: Path) -> bool:
    """True for a folder that is there and may be written into."""
    return folder.is_dir() and os.access(folder, os.W_OK)


def is_full(error: BaseException, path: Path) -> bool:
    """True if a write to `path` failed for want of room, which Python, Rust and C++ each put in their own way."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    said = any(text in str(error) for text in ("No space left", "os error 28", "quota exceeded"))
    return said or shutil.disk_usage(existing(path)).free < FULL_BYTES


@contextmanager
def writing(path: Path, needed: int = 0, help: str = "") -> Iterator[None]:
    """Around everything that writes `path`.

    Args:
        needed: bytes, to be named if they are not there.
        help: what else can be done than to make room.

    Raises:
        SampoError: the disk is full, however the library that was writing put it.
    """
    try:
        yield
    except SampoError:
        raise
    except Exception as error:
        if not is_full(error, path):
            raise
        room = f"make room{f' for {megabytes(needed)}' if needed else ''}"
        hint = f"{room}{f' ({help})' if help else ''}; what was there before is untouched"
        raise SampoError(f"no space left on the disk while writing {path}", hint=hint) from error


@contextmanager
def whole_file(path: Path, needed: int = 0) -> Iterator[TextIO]:
    """A new text file that takes its name when it is on the disk: a reader sees the old one or the whole new one.

    Args:
        needed: bytes, to be named if they are not there.

    Raises:
        SampoError: the disk is full; the old file is as it was.
    """
    aside = path.with_name(f".{path.name}.tmp")
    with writing(path, needed):
        try:
            with aside.open("w", encoding="utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Give a file this content, as `whole_file` does."""
    with whole_file(path, len(text)) as file:
        file.write(text)


def flush(path: Path) -> None:
    """Have the system put a file, or a folder's list of names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_room(path: Path, needed: int, what: str, hint: str) -> None:
    """Stop before something is begun that the disk has no room for.

    Raises:
        SampoError: fewer than `needed` bytes are free where `path` will be.
    """
    place = existing(path)
    total, _, free = shutil.disk_usage(place)
    if total and free < needed:  # some file systems do not say how large they are
        raise SampoError(
            f"no space left for {what}: {megabytes(needed)} are needed, {megabytes(free)} are free on {place}",
            hint=hint,
        )


def folder_bytes(folder: Path) -> int:
    """What a folder takes on the disk; a file with several names counts once."""
    sizes = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            stat = path.stat()
            sizes[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(sizes.values())
