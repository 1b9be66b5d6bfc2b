"""Sources to tokenised pairs, memory-mapped from a cache on disk.

The cache's key is a hash of all that the tokens depend on, so the same data is tokenised once, wherever it lies. Rows
are read (`sources.py`), understood (`formats.py`), encoded (`template.py`) and counted (`pair_builder.py`) elsewhere,
and so are batches made.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from sampo_cli.batch import Pair, TokenIds
from sampo_cli.cache import UNFINISHED, cache_folder, is_complete, lock, remove_unfinished
from sampo_cli.config import DataConfig
from sampo_cli.datafile import DataFile, Stamp, digest, stamp
from sampo_cli.errors import DataError, UsageError
from sampo_cli.pair_builder import INDEX, Counts, Progress, StoreBuilder
from sampo_cli.readers import read_rows
from sampo_cli.sampling import SPLIT
from sampo_cli.sources import find
from sampo_cli.template import PairEncoder

STORE_FORMAT = 2

_PARTS = ("prompt", "chosen", "rejected")


class PairDataset:
    """Tokenised pairs, read from disk as they are asked for.

    Attributes:
        counts: what became of the rows.
        fingerprint: hex; changes with the data, the tokenizer, the template and the settings of `DataConfig`.
        max_length: tokens of the prompt plus the longer response, at most.
        cached: True where nothing had to be tokenised.
        prompt_tokens, chosen_tokens, rejected_tokens: int32 [n], lengths.
        pair_ids: int64 [n], the row's number over all sources, from 0, counted before any is dropped.
    """

    def __init__(
        self, folder: Path, files: Sequence[DataFile], stamps: Sequence[Stamp], max_length: int, *, cached: bool
    ) -> None:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.counts = Counts(**meta["counts"])
        self.fingerprint = folder.name
        self.max_length = max_length
        self.cached = cached
        self._files, self._stamps = files, stamps
        self._tokens = np.memmap(folder / "tokens.bin", np.int32, "r")
        self._index = np.memmap(folder / "index.bin", INDEX, "r")
        self.prompt_tokens, self.chosen_tokens, self.rejected_tokens = (
            np.ascontiguousarray(self._index[part]) for part in _PARTS
        )
        self.pair_ids: NDArray[np.int64] = np.ascontiguousarray(self._index["pair_id"])

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Pair:
        record = self._index[index]
        lengths = [int(record[part]) for part in _PARTS]
        start = int(record["start"])
        tokens = np.array(self._tokens[start : start + sum(lengths)])
        prompt, chosen, rejected = np.split(tokens, np.cumsum(lengths)[:-1])
        return Pair(int(record["pair_id"]), prompt, chosen, rejected)

    def tokens(self, first: int, last: int) -> TokenIds:
        """The ids of pairs first to last - 1, one after the other, each as prompt, chosen, rejected."""
        record = self._index[last - 1]
        stop = int(record["start"]) + sum(int(record[part]) for part in _PARTS)
        return np.array(self._tokens[int(self._index[first]["start"]) : stop])

    def source_rows(self, columns: Collection[str]) -> Iterator[Any]:
        """Every row of the sources, read again, in the order of pair ids; `columns` as `read_rows` takes them.

        Raises:
            DataError: a file was written to since it was tokenised, said after the last row, or it cannot be read.
        """
        rows = chain.from_iterable(read_rows(file, columns) for file in self._files)
        for _, row in islice(rows, self.counts.rows):
            yield row
        _refuse_changed(self._files, self._stamps)

    def where(self, pair_id: int) -> str:
        """Where the pair of that id came from, for messages."""
        return self.location(int(np.searchsorted(self.pair_ids, pair_id)))

    def location(self, index: int) -> str:
        """Where pair `index` came from: "file.jsonl:17", "file.parquet row 17" or "owner/name row 17", from 1."""
        record = self._index[index]
        return self._files[int(record["file"])].place(int(record["number"]))


def prepare(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int | None = None,
    progress: Progress | None = None,
) -> PairDataset:
    """The pairs of `config.sources`, tokenised, or found in the cache.

    Args:
        config: sources and settings.
        tokenizer: with a chat template, from `load_tokenizer`.
        context: the model's longest sequence; `max_length` is not above it.
        progress: called with rows done and rows in all (None where unknown).

    Raises:
        DataError: a source that is missing, unreadable, in no known format, or written to meanwhile; a bad row under
            `on_bad_row="error"`; no usable pair.
        HubError: a source on the Hub that cannot be fetched.
        ModelError: a chat template that cannot be used.
        UsageError: settings that leave no room.
    """
    max_length = min(config.max_length, context or config.max_length)
    if max_length < 2:
        raise UsageError("data.max_length must be at least 2: a token of prompt and one of response")
    encoder = PairEncoder(tokenizer, config.template_date)
    sources = [find(source, config.revision) for source in config.sources]
    files = [file for source in sources for file in source]
    stamps = [stamp(file) for file in files]
    digests = {file.path: digest(file) for file in files}
    content = [[(digests[file.path][0], file.format) for file in source] for source in sources]
    folder = cache_folder() / "pairs" / _key(content, encoder, config, max_length)
    cached = is_complete(folder)
    if not cached:
        lines = [digests[file.path][1] for file in files]
        total = None if None in lines else sum(count or 0 for count in lines)
        builder = StoreBuilder(config, encoder, max_length, progress, total)
        _build(folder, builder, sources, stamps)
    return PairDataset(folder, files, stamps, max_length, cached=cached)


def split(pairs: int, eval_fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the pairs to train on and of those held out, both ascending, drawn with `seed`.

    At least one pair is held out where a fraction is asked for and there are two; never all of them.
    """
    held_out = min(max(round(pairs * eval_fraction), 1), pairs - 1) if eval_fraction > 0 and pairs > 1 else 0
    order = np.random.default_rng((seed, 0, 0, SPLIT)).permutation(pairs)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _key(content: list[list[tuple[str, str]]], encoder: PairEncoder, config: DataConfig, max_length: int) -> str:
    """Hash of all that a store depends on, 32 hex digits. `content`: digest and format of each file of each source."""
    parts = {
        "format": STORE_FORMAT,
        "content": content,
        "tokenizer": _tokenizer_digest(encoder.tokenizer),
        "template": encoder.template,
        "date": config.template_date,
        "columns": config.columns,
        "max_length": max_length,
        "min_prompt_tokens": config.min_prompt_tokens,
        "on_bad_row": config.on_bad_row,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    named: dict[str, Any] = {"special": tokenizer.special_tokens_map}
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        backend.no_padding()  # what an earlier call left switched on does not change our tokens
        backend.no_truncation()
        named["backend"] = backend.to_str()
    else:
        named |= {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def _build(folder: Path, builder: StoreBuilder, sources: Sequence[Sequence[DataFile]], stamps: Sequence[Stamp]) -> None:
    """Build a store aside, under the lock of its key, then give it its name. The lock dies with its process.

    A second process that wants the same store waits for the first.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left_over in folder.parent.glob(f"{UNFINISHED}*"):
            remove_unfinished(left_over)
        with lock("pairs", folder.name):
            if is_complete(folder):
                return
            aside = folder.parent / f"{UNFINISHED}{folder.name}"
            for old in (folder, aside):  # damaged, or left by a process that was killed
                shutil.rmtree(old, ignore_errors=True)
            aside.mkdir()
            try:
                builder.build(aside, sources)
                _refuse_changed([file for source in sources for file in source], stamps)
                aside.rename(folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"cannot write the cache of tokenised pairs in {folder.parent}: {error.strerror or error}",
            hint="make room, or set SAMPO_CACHE to a folder that can be written",
        ) from error


def _refuse_changed(files: Sequence[DataFile], stamps: Sequence[Stamp]) -> None:
    """A file that was written to between its digest and its last row would be kept under the wrong key."""
    for file, before in zip(files, stamps, strict=True):
        if stamp(file) != before:
            raise DataError(f"{file.name}: it was written to while it was read", hint="run again when it is finished")
