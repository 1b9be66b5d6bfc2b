"""A subset of the pairs in which neither length is preferred, written as rows that can be read again.

Which pairs: as many as there are whose gap (chosen minus rejected tokens) is mirrored by that of another one.

Legend: P pairs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sampo_cli.dataset import PairDataset
from sampo_cli.disk import is_writable, whole_file
from sampo_cli.errors import DataError, UsageError
from sampo_cli.formats import Conversation, Role, Unusable, known_columns, read_row
from sampo_cli.label_bias import LabelBias, label_bias
from sampo_cli.sampling import BALANCE

GROWTH = 1.25
"""Two gaps are alike if both are in one bin: the upper end of a bin is this many times the lower one."""


@dataclass(frozen=True)
class Balanced:
    """What was written: `kept` of `pairs` pairs to `path`, and how labels go with length in all and in those."""

    path: str
    pairs: int
    kept: int
    before: LabelBias
    after: LabelBias

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain numbers, for JSON."""
        return asdict(self)


def check_target(path: Path) -> None:
    """Refuse early what could not be written, or not be read again.

    Raises:
        UsageError: another suffix, something that is there, or a folder that cannot be written.
    """
    if path.suffix != ".jsonl":
        raise UsageError(f"--balance {path}: its rows are JSON lines", hint="name it .jsonl")
    if path.exists() or path.is_symlink():
        raise UsageError(f"--balance {path}: it is already there", hint="name another file, or delete it")
    if not is_writable(path.parent):
        raise UsageError(f"--balance {path}: {path.parent} is no folder that can be written", hint="make it first")


def write_balanced(dataset: PairDataset, path: Path, seed: int, columns: Mapping[Role, str]) -> Balanced:
    """Choose pairs and write their rows to `path`, in their order.

    Args:
        columns: as the data set was read with.

    Raises:
        DataError: no pair has a counterpart, or a source was written to since it was tokenised.
        UsageError: the file is already there.
    """
    gap_P = dataset.chosen_tokens.astype(np.int64) - dataset.rejected_tokens
    keep_P = mirrored(gap_P, seed)
    if not keep_P.any():
        raise DataError(
            f"--balance: nothing to write: none of the {len(gap_P):,} pairs has a counterpart with the other sign",
            hint="add pairs whose chosen response is the shorter one, or the longer one, whichever are missing",
        )
    check_target(path)
    _write(dataset, dataset.pair_ids[keep_P], path, columns)
    return Balanced(str(path), len(gap_P), int(keep_P.sum()), label_bias(gap_P), label_bias(gap_P[keep_P]))


def mirrored(gaps: ArrayLike, seed: int) -> NDArray[np.bool_]:
    """Which pairs to keep, [P], so that every bin of gaps has as many as the bin of the same gaps with the other sign.

    No larger subset has that property: of two such bins all of the smaller one are kept, and of the other as many,
    drawn at random; and so are all pairs without a gap.

    Args:
        gaps: whole numbers, [P].
        seed: of the draw.
    """
    gap_P = np.asarray(gaps, np.int64)
    size_P = np.abs(gap_P)
    bin_P = np.where(size_P > 0, 1 + np.floor(np.log(np.maximum(size_P, 1)) / np.log(GROWTH)), 0).astype(np.int64)
    signed_P = np.sign(gap_P) * bin_P
    most = int(bin_P.max())
    count = np.bincount(signed_P + most, minlength=2 * most + 1)
    wanted = np.minimum(count, count[::-1])
    order_P = np.random.default_rng((seed, 0, 0, BALANCE)).permutation(len(gap_P))
    order_P = order_P[np.argsort(signed_P[order_P], kind="stable")]
    place_P = np.arange(len(gap_P)) - np.repeat(np.cumsum(count) - count, count)
    keep_P = np.zeros(len(gap_P), bool)
    keep_P[order_P] = place_P < np.repeat(wanted, count)
    return keep_P


def _write(dataset: PairDataset, pair_ids: NDArray[np.int64], path: Path, columns: Mapping[Role, str]) -> None:
    wanted = np.zeros(dataset.counts.rows, bool)
    wanted[pair_ids] = True
    with whole_file(path) as file:
        for pair_id, row in enumerate(dataset.source_rows(known_columns(columns))):
            if wanted[pair_id]:
                file.write(json.dumps(_as_row(row, pair_id, columns, dataset), ensure_ascii=False) + "\n")


def _as_row(row: Any, pair_id: int, columns: Mapping[Role, str], dataset: PairDataset) -> dict[str, Any]:
    """The pair of a row in one of the documented formats: three lists of messages."""
    try:
        pair: Conversation = read_row(row, columns)
    except Unusable as problem:
        where = dataset.where(pair_id)
        raise DataError(f"{where}: {problem}; it was written to while it was read", hint="run again") from problem
    answers = {"chosen": pair.chosen, "rejected": pair.rejected}
    return {"prompt": pair.prompt} | {side: [{"role": "assistant", "content": text}] for side, text in answers.items()}
