"""What the pairs of a data set ask, as text: for people and judges. The models get the pairs' own token ids."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sampo_cli.config import DataConfig
from sampo_cli.formats import Message, known_columns, read_row
from sampo_cli.readers import read_rows
from sampo_cli.sources import find


def prompt_texts(config: DataConfig, pair_ids: Collection[int]) -> dict[int, str]:
    """The prompts of usable pairs by pair id, read from the sources once more.

    Args:
        config: the sources that a `PairDataset` was made of.
        pair_ids: numbers of rows over all sources, from 0.

    Raises:
        DataError, HubError: see `sources.find`.
    """
    wanted, last = set(pair_ids), max(pair_ids, default=-1)
    texts: dict[int, str] = {}
    needed = known_columns(config.columns)
    number = -1
    for source in config.sources:
        for file in find(source, config.revision):
            for _, row in read_rows(file, needed):
                number += 1
                if number in wanted:
                    texts[number] = as_text(read_row(row, config.columns).prompt)
                if number == last:
                    return texts
    return texts


def as_text(turns: Sequence[Message]) -> str:
    """A lone question as it is; of a longer conversation, each turn behind the name of who says it."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)
