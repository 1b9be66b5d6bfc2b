"""A file to its rows, one after the other, so that a file never has to fit into memory.

What the rows mean is not known here, nor where files come from (`sources.py`). A row that cannot be parsed is handed
on as `Broken`; a file that cannot be read on is a `DataError`.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from io import BufferedReader, TextIOWrapper
from typing import Any, TextIO, cast

from sampo_cli.datafile import BOM, CONVERT, DataFile, opened
from sampo_cli.errors import DataError
from sampo_cli.formats import printable
from sampo_cli.remote import first_line

_BLOCK = 1 << 20
_PARQUET_ROWS = 256
_CSV_FIELD_LIMIT = (1 << 31) - 1
_LONGEST_WORD = len("-Infinity")
_SPACE = re.compile(r"\s*")
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Broken:
    """A row that cannot be parsed: `problem` names file, line and column."""

    problem: str


Rows = Iterator[tuple[int, Any]]


def read_rows(file: DataFile, columns: Collection[str] | None = None) -> Rows:
    """Pairs of (number, row): a row is what the format gives, or `Broken`. Numbers start at 1; see `by_line`.

    Args:
        file: what to read.
        columns: those that matter, None for all. In Parquet, where columns lie apart, the others are not read and
            their values are None.

    Raises:
        DataError: the file is missing, unreadable, cut short, in another encoding or another format.
    """
    reached = 0
    with opened(file.path, file.name, where=lambda: f" after {'line' if file.by_line else 'row'} {reached}") as handle:
        if file.format != ".parquet" and handle.peek(2).startswith(_UTF_16):
            raise DataError(f"{file.name}:1:1: not UTF-8: it begins like UTF-16", hint=CONVERT)
        for reached, row in _rows_of(file, handle, columns):
            yield reached, row


def _rows_of(file: DataFile, handle: BufferedReader, columns: Collection[str] | None) -> Rows:
    if file.format == ".parquet":
        return _parquet_rows(file, handle, columns)
    if file.format == ".csv":
        return _csv_rows(file, handle)
    return _line_rows(file, handle) if file.by_line else _array_rows(file, handle)


# JSON ----------------------------------------------------------------------------------------------------------------


class _Decoder(json.JSONDecoder):
    """Also remembers a key that an object had twice, of which JSON keeps one value without a word.

    Attributes:
        repeated: such a key in what was decoded since it was last None.
    """

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self.repeated: str | None = None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            keys = [key for key, _ in pairs]
            self.repeated = next(key for key in keys if keys.count(key) > 1)
        return fields

    def checked(self, value: Any, where: str) -> Any:
        """The value that was just decoded, `Broken` if it lost one of its own."""
        repeated, self.repeated = self.repeated, None
        return value if repeated is None else Broken(f"{where}: the key {json.dumps(repeated[:40])} is there twice")


def _line_rows(file: DataFile, handle: BufferedReader) -> Rows:
    decoder = _Decoder()
    for number, line in enumerate(handle, 1):
        text = line.removeprefix(BOM)  # also where files were joined
        if number == 1 and (text.strip() == b"[" or text.lstrip().startswith(b"[{")):
            raise DataError(f"{file.name}:1: a JSON array, where an object a line is expected", hint="name it .json")
        if text.strip():
            yield number, _parse_line(text, f"{file.name}:{number}", decoder)


def _parse_line(line: bytes, where: str, decoder: _Decoder) -> Any:
    decoder.repeated = None  # what a broken line left behind
    try:
        return decoder.checked(decoder.decode(line.decode("utf-8")), where)
    except UnicodeDecodeError as error:
        return Broken(f"{where}:{error.start + 1}: not UTF-8: {error.reason}")
    except json.JSONDecodeError as error:
        return Broken(f"{where}:{error.pos + 1}: not JSON: {error.msg}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        return Broken(f"{where}:1: {first_line(error)}")


class _Array:
    """The text of a JSON array, a buffer at a time.

    Args:
        text: the file.
        name: how messages call it.
    """

    def __init__(self, text: TextIO, name: str) -> None:
        self._text, self._name = text, name
        self._buffer, self._at, self._lines = "", 0, 0
        self._decoder = _Decoder()

    def rows(self) -> Rows:
        """Raises DataError where the array is broken: what follows cannot be told apart."""
        self._take("[", 0)
        row = 0
        while (found := self._next()) != "]":
            if row and found != ",":
                raise self._problem("expected a comma or the closing bracket", row + 1)
            if row:
                self._take(",", row)
            row += 1
            line = self._line()
            yield row, self._decoder.checked(self._value(row), f"{self._name}:{line}")
        self._take("]", row)
        if self._next():
            raise self._problem("something follows the closing bracket", row)

    def _more(self) -> bool:
        """Read on; what was used is forgotten. False at the end of the file."""
        read = self._text.read(max(_BLOCK, len(self._buffer) - self._at))
        if read:
            self._lines += self._buffer.count("\n", 0, self._at)
            self._buffer, self._at = self._buffer[self._at :] + read, 0
        return bool(read)

    def _next(self) -> str:
        """The next character that is not white space, which is not taken; empty at the end of the file."""
        while True:
            self._at = cast(re.Match[str], _SPACE.match(self._buffer, self._at)).end()
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def _take(self, character: str, row: int) -> None:
        if self._next() != character:
            raise self._problem(f"expected '{character}'", row)
        self._at += 1

    def _value(self, row: int) -> Any:
        self._next()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                near_the_end = error.pos >= len(self._buffer) - _LONGEST_WORD or error.msg.startswith("Unterminated")
                if not near_the_end or not self._more():
                    raise self._problem(error.msg, row, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self._problem(first_line(error), row) from error
            else:
                if end == len(self._buffer) and self._more():  # a number may go on
                    continue
                self._at = end
                return value

    def _line(self, position: int | None = None) -> int:
        return self._lines + self._buffer.count("\n", 0, self._at if position is None else position) + 1

    def _problem(self, what: str, row: int, position: int | None = None) -> DataError:
        return DataError(f"{self._name}:{self._line(position)}: row {row}: not JSON: {what}")


def _array_rows(file: DataFile, handle: BufferedReader) -> Rows:
    with TextIOWrapper(handle, encoding="utf-8-sig") as text:
        yield from _Array(text, file.name).rows()


# CSV and Parquet -----------------------------------------------------------------------------------------------------


def _csv_rows(file: DataFile, handle: BufferedReader) -> Rows:
    with TextIOWrapper(handle, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        header: list[str] = []
        while not header:
            record = _next_record(reader, file.name)
            if record is None:
                return
            if isinstance(record, Broken):
                raise DataError(record.problem)
            header = record
        _refuse_repeated(header, f"{file.name}:{reader.line_num}")
        while True:
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


def _refuse_repeated(columns: list[str], where: str) -> None:
    if len(set(columns)) < len(columns):
        raise DataError(f"{where}: two columns have one name: {printable(', '.join(columns)[:200])}")


def _next_record(reader: Any, name: str) -> list[str] | Broken | None:
    """The next record, None at the end. The csv module's limit of 131,072 characters a field is lifted meanwhile.

    Raises:
        DataError: a quote was opened and never closed, which swallows all the lines behind it.
    """
    line, limit = reader.line_num + 1, csv.field_size_limit(_CSV_FIELD_LIMIT)
    try:
        record: list[str] | None = next(reader, None)
        return record
    except csv.Error as error:
        lost = reader.line_num - line
        if lost and "unexpected end" in str(error):
            problem = (
                f"{name}:{line}: not CSV: a quote opens in this record and is not closed in the {lost} lines behind"
            )
            raise DataError(problem, hint="close it, or double it within a quoted field") from error
        return Broken(f"{name}:{line}: not CSV: {error}")
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(file: DataFile, handle: BufferedReader, columns: Collection[str] | None) -> Rows:
    from pyarrow.parquet import ParquetFile

    row = 0
    with tempfile.TemporaryFile() as unpacked:
        packed = file.path.suffix.lower() == ".gz"
        if packed:  # Parquet is read from its end
            shutil.copyfileobj(handle, unpacked)
        try:
            parquet = ParquetFile(unpacked if packed else handle, page_checksum_verification=True)
            names = parquet.schema_arrow.names
            _refuse_repeated(names, file.name)
            needed = [name for name in names if columns is None or name in columns]
            others = dict.fromkeys(name for name in names if name not in needed)
            for batch in parquet.iter_batches(batch_size=_PARQUET_ROWS, columns=needed):
                for value in batch.to_pylist():
                    row += 1
                    yield row, others | value
        except DataError:
            raise
        except Exception as error:  # whatever the file's bytes make pyarrow raise
            raise DataError(f"{file.name} after row {row}: not Parquet: {first_line(error)}") from error
