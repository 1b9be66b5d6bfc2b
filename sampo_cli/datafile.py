"""One file of a source: its name in messages, its bytes, its digest; what the disk refuses becomes a `DataError`.

How rows are read from it is in `readers.py`, where it came from in `sources.py`.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import cast

from sampo_cli.errors import DataError
from sampo_cli.remote import first_line

BOM = b"\xef\xbb\xbf"

_BLOCK = 1 << 20
_PACK_AGAIN = "fetch or pack the file again"
CONVERT = "convert it to UTF-8, for example with: iconv -f latin1 -t utf-8 (or -f utf-16)"


@dataclass(frozen=True)
class DataFile:
    """One file of a source.

    Attributes:
        path: where it is.
        name: how messages call it.
        source: the data set on the Hub that it is part of, None for a local file.
        by_line: True where `read_rows` numbers lines, False where it numbers rows.
    """

    path: Path
    name: str
    source: str | None
    by_line: bool

    @property
    def format(self) -> str:
        """The suffix without `.gz`."""
        return format_of(self.path)

    def place(self, number: int) -> str:
        """Where a row is: "file.jsonl:17", "file.parquet row 17" or, counted over the split, "owner/name row 17"."""
        if self.source is not None:
            return f"{self.source} row {number}"
        return f"{self.name}:{number}" if self.by_line else f"{self.name} row {number}"


Stamp = tuple[int, int, int]


def format_of(path: Path) -> str:
    """A file's suffix in small letters, without `.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def is_array(path: Path, name: str) -> bool:
    """True for a file that holds one JSON array. Raises DataError where it cannot be read."""
    with opened(path, name) as handle:
        return handle.read(_BLOCK).removeprefix(BOM).lstrip().startswith(b"[")


def digest(file: DataFile) -> tuple[str, int | None]:
    """SHA-256 of a file's bytes, and its number of lines where a row is a line of the file."""
    sha, lines = hashlib.sha256(), 0
    with opened(file.path, file.name, unpack=False) as handle:
        while block := handle.read(_BLOCK):
            sha.update(block)
            lines += block.count(b"\n")
    return sha.hexdigest(), lines if file.path.suffix == ".jsonl" else None


def stamp(file: DataFile) -> Stamp:
    """What changes when a file is written to or replaced: inode, size, time. Raises DataError where it is gone."""
    try:
        found = os.stat(file.path)
    except OSError as error:
        raise DataError(f"{file.name}: {error.strerror or first_line(error)}") from error
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def opened(
    path: Path, name: str, *, unpack: bool = True, where: Callable[[], str] = lambda: ""
) -> Iterator[BufferedReader]:
    """The file's bytes, unpacked if it is a .gz; failures to read become a `DataError` that says `where` it was."""
    packed = unpack and path.suffix.lower() == ".gz"
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as handle:
            yield cast(BufferedReader, handle)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name}{where()}: broken gzip: {first_line(error)}", hint=_PACK_AGAIN) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{_first_bad_byte(path, name)}: not UTF-8: {error.reason}", hint=CONVERT) from error
    except OSError as error:
        raise DataError(f"{name}: {error.strerror or first_line(error)}") from error


def _first_bad_byte(path: Path, name: str) -> str:
    """ "file:line:column" of the first byte that is not UTF-8; text is decoded in blocks, which does not say it."""
    with opened(path, name) as handle:
        for number, line in enumerate(handle, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"{name}:{number}:{error.start + 1}"
    return name
