"""What `sampo data` shows, as plain data: counts, lengths, the bias towards long or short answers, one pair by token.

Nothing is drawn or printed here. All but the search for repeats (`repeats.py`) reads lengths only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedTokenizerBase

from sampo_cli.batch import Pair
from sampo_cli.dataset import PairDataset
from sampo_cli.label_bias import (
    GapHistogram,
    GapStep,
    LabelBias,
    advice,
    gap_histogram,
    label_bias,
    longer_wins_by_gap,
)
from sampo_cli.pair_builder import Counts
from sampo_cli.repeats import Repeats, find_repeats

Kind = Literal["prompt", "chosen", "rejected"]
Token = tuple[str, Kind, bool]

BINS = 12
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class Lengths:
    """Tokens of one part over all pairs."""

    mean: float
    median: float
    p90: float
    max: int


@dataclass(frozen=True)
class Histogram:
    """Pairs by response length: `chosen[i]` of them have edges[i] <= tokens < edges[i + 1]; the last edge counts."""

    edges: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Summary:
    """A data set in numbers.

    Attributes:
        counts: what became of the rows.
        max_length: tokens of prompt plus response, at most.
        lengths: by part, "prompt", "chosen", "rejected".
        histogram: of response lengths.
        labels: how they go with length.
        gap_histogram: of chosen minus rejected tokens.
        longer_wins_by_gap: how often the longer response is chosen, by how much longer it is.
        repeats: identical and nearly identical ones.
        truncated_share: by part, of the kept pairs.
        kept_share: of response tokens under down-sampling to the shorter response, sum of 2 T_m / sum of (T_w + T_l).
        advice: what it means for the choice of method, a sentence.
    """

    counts: Counts
    max_length: int
    lengths: dict[str, Lengths]
    histogram: Histogram
    labels: LabelBias
    gap_histogram: GapHistogram
    longer_wins_by_gap: list[GapStep]
    repeats: Repeats
    truncated_share: dict[str, float]
    kept_share: float
    advice: str

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain numbers, for JSON."""
        return asdict(self)


def summarise(dataset: PairDataset) -> Summary:
    """The numbers of a data set of at least one pair."""
    chosen, rejected = (tokens.astype(np.int64) for tokens in (dataset.chosen_tokens, dataset.rejected_tokens))
    gap = chosen - rejected
    labels = label_bias(gap)
    kept_share = float(2 * np.minimum(chosen, rejected).sum() / (chosen + rejected).sum())
    return Summary(
        counts=dataset.counts,
        max_length=dataset.max_length,
        lengths={"prompt": _lengths(dataset.prompt_tokens), "chosen": _lengths(chosen), "rejected": _lengths(rejected)},
        histogram=_histogram(chosen, rejected),
        labels=labels,
        gap_histogram=gap_histogram(gap),
        longer_wins_by_gap=longer_wins_by_gap(gap),
        repeats=find_repeats(dataset),
        truncated_share={part: cut / len(dataset) for part, cut in dataset.counts.truncated.items()},
        kept_share=kept_share,
        advice=advice(labels, kept_share),
    )


def _lengths(tokens: NDArray[Any]) -> Lengths:
    return Lengths(
        mean=float(tokens.mean()),
        median=float(np.median(tokens)),
        p90=float(np.percentile(tokens, 90)),
        max=int(tokens.max()),
    )


def _histogram(chosen: NDArray[Any], rejected: NDArray[Any]) -> Histogram:
    """At most `BINS` bins of one whole width for both sides, from 0 to the longest response."""
    longest = int(max(chosen.max(), rejected.max()))
    width = -(-longest // BINS)
    edges = np.arange(0, longest + width, width)
    counts = [np.histogram(side, bins=edges)[0].tolist() for side in (chosen, rejected)]
    return Histogram(edges.tolist(), counts[0], counts[1])


def token_view(
    pair: Pair, tokenizer: PreTrainedTokenizerBase, keep: tuple[ArrayLike, ArrayLike] | None = None
) -> list[Token]:
    """The pair token by token: (text, part it belongs to, whether it is scored).

    Args:
        pair: one pair of a `PairDataset`.
        tokenizer: the one that it was made with.
        keep: weights (or booleans) of chosen tokens, shape [T_w], and of rejected ones, [T_l], as `pair_weights`
            gives them; a token of weight 0 is not scored. None scores them all.

    The texts of a part, joined, are the part's text: a character made of several tokens is the last one's.
    """
    scored = [np.zeros(len(pair.prompt), bool)]
    for side, ids in enumerate((pair.chosen, pair.rejected)):
        scored.append(np.ones(len(ids), bool) if keep is None else np.asarray(keep[side]) != 0)
    view: list[Token] = []
    parts: tuple[Kind, ...] = ("prompt", "chosen", "rejected")
    for kind, ids, marks in zip(parts, (pair.prompt, pair.chosen, pair.rejected), scored, strict=True):
        view += [(text, kind, bool(mark)) for text, mark in zip(_texts(ids.tolist(), tokenizer), marks, strict=True)]
    return view


def _texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text that each token adds, decoded behind the tokens before it, so that spaces are where they belong."""

    def decode(start: int, stop: int) -> str:
        return str(tokenizer.decode(list(ids[start:stop]), clean_up_tokenization_spaces=False))

    texts: list[str] = []
    start = pending = 0  # `pending`: the first token whose text is not given yet; `start`: some complete text before it
    for stop in range(1, len(ids) + 1):
        before, now = decode(start, pending), decode(start, stop)
        complete = not now.endswith(_INCOMPLETE) or stop - pending > _LONGEST_CHARACTER or stop == len(ids)
        texts.append(now[len(before) :] if complete else "")
        if complete:
            start, pending = pending, stop
    return texts


_LONGEST_CHARACTER = 4  # bytes in UTF-8, a token each at worst
