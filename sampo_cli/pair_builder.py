"""Rows to a store of token ids: one pass over the sources, with a count of everything that is dropped or cut.

A store is two flat files, so it is written as rows come and memory-mapped afterwards: `tokens.bin` holds the pairs'
prompt, chosen and rejected ids one after the other, `index.bin` a record for each pair. Where a store lies and when
it is built is decided in `dataset.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sampo_cli.config import DataConfig
from sampo_cli.datafile import DataFile
from sampo_cli.errors import DataError
from sampo_cli.formats import (
    ACCEPTED,
    NOT_AN_OBJECT,
    NOT_RECOGNISED,
    Conversation,
    Unusable,
    known_columns,
    printable,
    read_row,
)
from sampo_cli.readers import Broken, read_rows
from sampo_cli.template import NOT_A_PREFIX, Encoded, PairEncoder

Progress = Callable[[int, int | None], None]

BROKEN = "cannot be parsed"
IDENTICAL_AFTER_CUT = "identical after truncation"
CHUNK_ROWS = 1000
CHUNK_CHARACTERS = 8_000_000

_BAD_ROWS = (BROKEN, NOT_AN_OBJECT, NOT_A_PREFIX)
_MOST_SHOWN = 300
_DROP_HINT = "fix the row, or drop and count such rows with data.on_bad_row=drop"

INDEX = np.dtype(
    [
        ("pair_id", "<i8"),
        ("start", "<i8"),
        ("file", "<i4"),
        ("number", "<i8"),
        ("prompt", "<i4"),
        ("chosen", "<i4"),
        ("rejected", "<i4"),
    ]
)


@dataclass(frozen=True)
class Counts:
    """What became of the rows. `dropped` is by reason; `truncated` counts kept pairs by the part that was cut."""

    rows: int
    kept: int
    dropped: dict[str, int]
    truncated: dict[str, int]


def truncate(pair: Encoded, max_length: int, min_prompt: int, bos: int | None) -> tuple[Encoded, list[str]]:
    """The pair cut to `max_length` tokens of prompt plus longer response, and the names of the parts that were cut.

    The prompt gives way first, from its left and behind its BOS, down to `min_prompt` (half of `max_length` if that
    is less); then responses, from their right. Each part keeps at least one token.
    """
    floor = max(1, min(min_prompt, max_length // 2))
    room = max_length - max(len(pair.chosen), len(pair.rejected))
    length = min(len(pair.prompt), max(floor, room))
    prompt = pair.prompt[len(pair.prompt) - length :]
    if length < len(pair.prompt) and length > 1 and pair.prompt[0] == bos:
        prompt = [bos, *prompt[1:]]
    left = max_length - length
    shorter = Encoded(prompt, pair.chosen[:left], pair.rejected[:left])
    cut = [name for name in ("prompt", "chosen", "rejected") if len(getattr(shorter, name)) < len(getattr(pair, name))]
    return shorter, cut


@dataclass(frozen=True)
class _Row:
    """A row on its way: its conversation, its pair id, its file's index and its number in there."""

    conversation: Conversation
    pair_id: int
    file: int
    number: int


@dataclass
class StoreBuilder:
    """One pass over the sources. Holds the counts and a chunk of rows, never more.

    Args:
        config: sources and settings.
        encoder: turns conversations into token ids.
        max_length: tokens of the prompt plus the longer response, at most.
        progress: called after each chunk with rows done and `total`.
        total: rows in all, None where unknown.
    """

    config: DataConfig
    encoder: PairEncoder
    max_length: int
    progress: Progress | None = None
    total: int | None = None
    rows: int = field(default=0, init=False)
    kept: int = field(default=0, init=False)
    tokens: int = field(default=0, init=False)
    dropped: Counter[str] = field(default_factory=Counter, init=False)
    truncated: Counter[str] = field(default_factory=lambda: Counter(prompt=0, chosen=0, rejected=0), init=False)
    first_of: dict[str, str] = field(default_factory=dict, init=False)
    files: list[DataFile] = field(default_factory=list, init=False)

    def build(self, folder: Path, sources: Sequence[Sequence[DataFile]]) -> None:
        """Write tokens.bin, index.bin and meta.json into `folder`.

        Raises:
            DataError: a source is empty, unreadable or in no known format; a bad row; no usable pair.
            OSError: the disk does not take it.
        """
        with (folder / "tokens.bin").open("wb") as tokens, (folder / "index.bin").open("wb") as index:
            for name, source in zip(self.config.sources, sources, strict=True):
                for chunk in _chunks(self._source_rows(name, source)):
                    self._write(chunk, tokens, index)
                    if self.progress is not None:
                        self.progress(self.rows, self.total)
        if not self.kept:
            raise DataError(f"no usable pair in {self.rows} rows: {self._reasons()}", hint=f"accepted: {ACCEPTED}")
        counts = Counts(self.rows, self.kept, dict(self.dropped), dict(self.truncated))
        sizes = {name: (folder / name).stat().st_size for name in ("tokens.bin", "index.bin")}
        meta = {"of": ", ".join(map(printable, self.config.sources)), "counts": asdict(counts), "sizes": sizes}
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")

    def _reasons(self) -> str:
        """Counts by reason with a place for each, the most frequent first."""
        return "; ".join(f"{count} {reason} ({self.first_of[reason]})" for reason, count in self.dropped.most_common())

    def _source_rows(self, name: str, source: Sequence[DataFile]) -> Iterator[_Row]:
        """The usable rows of a source. Raises DataError where it is empty, or no row has a known format."""
        first, unrecognised, columns = self.rows, self.dropped[NOT_RECOGNISED], ""
        needed = known_columns(self.config.columns)
        for file in source:
            self.files.append(file)
            for number, value in read_rows(file, needed):
                place = self.rows - first + 1 if file.source else number
                pair_id = self.rows
                self.rows += 1
                if not columns and isinstance(value, Mapping):
                    columns = printable(", ".join(map(str, value))[:_MOST_SHOWN])
                conversation = self._understood(value, file, place)
                if conversation is not None:
                    yield _Row(conversation, pair_id, len(self.files) - 1, place)
        if self.rows == first:
            raise DataError(f"data '{name}': it is empty")
        if self.dropped[NOT_RECOGNISED] - unrecognised == self.rows - first:
            raise DataError(
                f"data '{name}': no known format; its columns are {columns}",
                hint=f"accepted: {ACCEPTED}. Or name the columns, as in data.columns.prompt=...",
            )

    def _understood(self, value: object, file: DataFile, number: int) -> Conversation | None:
        try:
            if isinstance(value, Broken):
                raise Unusable(BROKEN, value.problem)
            return read_row(value, self.config.columns)
        except Unusable as problem:
            self._drop(problem, file.place(number))
            return None

    def _drop(self, problem: Unusable, place: str) -> None:
        """Count a row that is not used, or stop at it."""
        if problem.reason in _BAD_ROWS and self.config.on_bad_row == "error":
            message = problem.detail if problem.reason == BROKEN else f"{place}: {problem}"
            raise DataError(message, hint=_DROP_HINT)
        self.dropped[problem.reason] += 1
        where = problem.detail if problem.reason == BROKEN else f"{place}: {problem.detail}".removesuffix(": ")
        self.first_of.setdefault(problem.reason, where)

    def _write(self, chunk: Sequence[_Row], tokens: BinaryIO, index: BinaryIO) -> None:
        records = []
        for row, pair in zip(chunk, self.encoder.encode([row.conversation for row in chunk]), strict=True):
            try:
                shorter = self._cut(pair)
            except Unusable as problem:
                self._drop(problem, self.files[row.file].place(row.number))
                continue
            lengths = (len(shorter.prompt), len(shorter.chosen), len(shorter.rejected))
            tokens.write(np.array([*shorter.prompt, *shorter.chosen, *shorter.rejected], np.int32).tobytes())
            records.append((row.pair_id, self.tokens, row.file, row.number, *lengths))
            self.tokens += sum(lengths)
        self.kept += len(records)
        index.write(np.array(records, INDEX).tobytes())

    def _cut(self, pair: Encoded | Unusable) -> Encoded:
        if isinstance(pair, Unusable):
            raise pair
        bos = self.encoder.tokenizer.bos_token_id
        shorter, cut = truncate(pair, self.max_length, self.config.min_prompt_tokens, bos)
        if shorter.chosen == shorter.rejected:
            raise Unusable(IDENTICAL_AFTER_CUT)
        self.truncated.update(cut)
        return shorter


def _chunks(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    """Rows in lists of `CHUNK_ROWS`, less where they are long."""
    chunk: list[_Row] = []
    size = 0
    for row in rows:
        chunk.append(row)
        texts = (row.conversation.chosen, row.conversation.rejected, *(m["content"] for m in row.conversation.prompt))
        size += sum(map(len, texts))
        if len(chunk) == CHUNK_ROWS or size > CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
