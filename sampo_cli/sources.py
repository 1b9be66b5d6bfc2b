"""Where pairs come from: a source's name to files, and a file to its rows, one after the other.

Rows are read one at a time, whatever the format, so a file never has to fit into memory. What the rows mean is not
known here. A row that cannot be parsed is handed on as `Broken`; a file that cannot be read is a `DataError`.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from sampo_cli.errors import DataError
from sampo_cli.remote import DATA_FILES, fetch, first_line, is_path_like

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
PREFERRED_SPLITS = ("train", "train_prefs")

_BLOCK = 1 << 20
_PARQUET_ROWS = 256
_CSV_FIELD_LIMIT = (1 << 31) - 1
_BETWEEN_ELEMENTS = re.compile(r"[\s,]*")


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
        """The suffix without `.gz`, one of `FORMATS`."""
        return _format(self.path)

    def place(self, number: int) -> str:
        """Where a row is: "file.jsonl:17", "file.parquet row 17" or, counted over the split, "owner/name row 17"."""
        if self.source is not None:
            return f"{self.source} row {number}"
        return f"{self.name}:{number}" if self.by_line else f"{self.name} row {number}"


@dataclass(frozen=True)
class Broken:
    """A row that cannot be parsed: `problem` names file, line and column."""

    problem: str


Rows = Iterator[tuple[int, Any]]


def find(source: str, revision: str | None = None) -> list[DataFile]:
    """The files of a source: a file, a folder, or a name on the Hub; the last two with `:split` or `:config:split`.

    Raises:
        DataError: no such file or folder, no data in it, no such split.
        HubError: no network, no access, no such data set.
    """
    local = Path(source).expanduser()
    if local.is_file():
        return [_data_file(local, source)]
    name, config, split = (source, None, None) if local.is_dir() else _parse(source)
    folder = Path(name).expanduser()
    if folder.is_dir():
        paths = _split_files(folder, name, config, split)
        return [_data_file(path, str(Path(name) / path.relative_to(folder.resolve()))) for path in paths]
    if is_path_like(name):
        raise DataError(f"data not found: there is no file or folder '{name}'", hint="check the path")
    folder = fetch(name, "dataset", revision=revision, patterns=DATA_FILES)
    paths = _split_files(folder, name, config, split)
    return [_data_file(path, f"{name}/{path.relative_to(folder.resolve())}", name) for path in paths]


def _parse(source: str) -> tuple[str, str | None, str | None]:
    """Name, config and split of `name`, `name:split` or `name:config:split`."""
    name, *rest = source.split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise DataError(f"data '{source}': expected a file, a folder, 'name', 'name:split' or 'name:config:split'")
    return name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else None


def _format(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _data_file(path: Path, name: str, source: str | None = None) -> DataFile:
    suffix = _format(path)
    if suffix not in FORMATS:
        raise DataError(f"{name}: not a format that is read", hint=f"use {', '.join(FORMATS)}, each also as .gz")
    by_line = suffix in (".jsonl", ".csv") or (suffix == ".json" and not _is_array(path, name))
    return DataFile(path, name, source, by_line)


def _split_files(folder: Path, name: str, config: str | None, split: str | None) -> list[Path]:
    """The files of one split of a folder, found by the rules of the datasets library (README, names, subfolders)."""
    from datasets import load_dataset_builder

    folder = folder.resolve()
    if not folder.is_dir():
        raise DataError(f"data '{name}': it has no {', '.join(FORMATS)} files")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            builder = load_dataset_builder(str(folder), name=config, cache_dir=scratch)
        except Exception as error:  # whatever the folder's README makes the library raise
            reason = " ".join(str(error).split())[:300]  # what there is to choose from is on its second line
            raise DataError(
                f"data '{name}': {reason}", hint=f"put {', '.join(FORMATS)} files into it, or name one file"
            ) from error
    splits = {str(key): [Path(path) for path in paths] for key, paths in (builder.config.data_files or {}).items()}
    wanted = split or next((known for known in PREFERRED_SPLITS if known in splits), None)
    if wanted is None and len(splits) == 1:
        (wanted,) = splits
    if wanted not in splits:
        problem = f"no split '{split}'" if split else "no split 'train'"
        raise DataError(f"data '{name}': {problem}; it has {', '.join(sorted(splits))}", hint=f"write '{name}:SPLIT'")
    outside = [path for path in splits[wanted] if not path.is_relative_to(folder) or ".." in path.parts]
    if outside:
        raise DataError(f"data '{name}': its README names a file outside of it: {outside[0]}")
    return splits[wanted]


def digest(file: DataFile) -> tuple[str, int | None]:
    """SHA-256 of a file's bytes, and its number of lines where a row is a line of the file."""
    sha, lines = hashlib.sha256(), 0
    with _opened(file.path, file.name, unpack=False) as handle:
        while block := handle.read(_BLOCK):
            sha.update(block)
            lines += block.count(b"\n")
    return sha.hexdigest(), lines if file.path.suffix == ".jsonl" else None


def read_rows(file: DataFile) -> Rows:
    """Pairs of (number, row): a row is what the format gives, or `Broken`. Numbers start at 1; see `by_line`.

    Raises:
        DataError: the file is missing, unreadable, cut short, in another encoding or another format.
    """
    if file.format == ".csv":
        return _csv_rows(file)
    if file.format == ".parquet":
        return _parquet_rows(file)
    return _line_rows(file) if file.by_line else _array_rows(file)


@contextmanager
def _opened(path: Path, name: str, *, unpack: bool = True) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked if it is a .gz; failures to read become a `DataError`."""
    packed = unpack and path.suffix.lower() == ".gz"
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as handle:
            yield cast(BinaryIO, handle)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name}: broken gzip: {first_line(error)}", hint="fetch or pack the file again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8: {error.reason}", hint="convert it to UTF-8") from error
    except OSError as error:
        raise DataError(f"{name}: {error.strerror or first_line(error)}") from error


def _is_array(path: Path, name: str) -> bool:
    with _opened(path, name) as handle:
        return handle.read(_BLOCK).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _line_rows(file: DataFile) -> Rows:
    with _opened(file.path, file.name) as handle:
        for number, line in enumerate(handle, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                yield number, _parse_line(text, f"{file.name}:{number}")


def _parse_line(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Broken(f"{where}:{error.start + 1}: not UTF-8: {error.reason}")
    except json.JSONDecodeError as error:
        return Broken(f"{where}:{error.pos + 1}: not JSON: {error.msg}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        return Broken(f"{where}:1: {first_line(error)}")


def _array_rows(file: DataFile) -> Rows:
    """The elements of a JSON array, parsed as they come."""
    decoder = json.JSONDecoder()
    with _opened(file.path, file.name) as handle, io.TextIOWrapper(handle, encoding="utf-8-sig") as text:
        buffer, row = text.read(_BLOCK), 0
        at = buffer.index("[") + 1
        while True:
            at = cast(re.Match[str], _BETWEEN_ELEMENTS.match(buffer, at)).end()
            if buffer.startswith("]", at):
                return
            try:
                value, at = decoder.raw_decode(buffer, at)
            except (ValueError, RecursionError) as error:
                more = text.read(max(_BLOCK, len(buffer) - at))
                if not more:
                    raise DataError(f"{file.name} row {row + 1}: not JSON: {first_line(error)}") from error
                buffer, at = buffer[at:] + more, 0
                continue
            row += 1
            yield row, value


def _csv_rows(file: DataFile) -> Rows:
    with _opened(file.path, file.name) as handle, io.TextIOWrapper(handle, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        header = _next_record(reader, file.name)
        if isinstance(header, Broken):
            raise DataError(header.problem)
        if header and len(set(header)) < len(header):
            raise DataError(f"{file.name}:1: two columns have one name: {', '.join(header)}")
        while header is not None:
            line = reader.line_num + 1
            record = _next_record(reader, file.name)
            if record is None:
                return
            if isinstance(record, Broken):
                yield line, record
            elif record and len(record) != len(header):
                problem = f"{file.name}:{line}: {len(record)} fields, but the header has {len(header)}"
                yield line, Broken(problem)
            elif record:
                yield line, dict(zip(header, record, strict=True))


def _next_record(reader: Any, name: str) -> list[str] | Broken | None:
    """The next record, None at the end. The csv module's limit of 131,072 characters a field is lifted meanwhile."""
    line, limit = reader.line_num + 1, csv.field_size_limit(_CSV_FIELD_LIMIT)
    try:
        record: list[str] | None = next(reader, None)
        return record
    except csv.Error as error:
        return Broken(f"{name}:{line}: not CSV: {error}")
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(file: DataFile) -> Rows:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    row = 0
    with _opened(file.path, file.name) as handle, tempfile.TemporaryFile() as unpacked:
        packed = file.path.suffix.lower() == ".gz"
        if packed:  # Parquet is read from its end
            shutil.copyfileobj(handle, unpacked)
        try:
            for batch in ParquetFile(unpacked if packed else handle).iter_batches(batch_size=_PARQUET_ROWS):
                for value in batch.to_pylist():
                    row += 1
                    yield row, value
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:
            raise DataError(f"{file.name} after row {row}: not Parquet: {first_line(error)}") from error
