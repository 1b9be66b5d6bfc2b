"""Answers to prompts in numbers with intervals: how long, whether they end, how much they repeat themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sampo_cli.estimate import Estimate, estimate, mean_of, median_of
from sampo_cli.generate import Completion, Decoding


@dataclass(frozen=True)
class Answering:
    """A model's answers in numbers, with 95 % bootstrap intervals over the prompts; lengths in tokens."""

    mean_tokens: Estimate
    median_tokens: Estimate
    ended: Estimate
    repetition: Estimate


@dataclass(frozen=True)
class GenerationReport:
    """Answers to the same prompts.

    Attributes:
        models: "adapter" and "base", or "base" alone.
        mean_difference, median_difference: adapter minus base, of mean and of median tokens.
    """

    prompts: int
    decoding: Decoding
    models: dict[str, Answering]
    mean_difference: Estimate | None
    median_difference: Estimate | None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return asdict(self)


def summarise(answers: dict[str, list[Completion]], decoding: Decoding) -> GenerationReport:
    """The answers of "base" and, if there is one, "adapter", to the same prompts in the same order."""
    lengths = {name: _column([answer.tokens for answer in given]) for name, given in answers.items()}
    models = {
        name: Answering(
            mean_of(lengths[name]),
            median_of(lengths[name]),
            mean_of(_column([answer.ended for answer in given])),
            mean_of(_column([answer.repetition for answer in given])),
        )
        for name, given in answers.items()
    }
    return GenerationReport(
        prompts=len(answers["base"]),
        decoding=decoding,
        models=models,
        mean_difference=_difference(lengths, np.mean),
        median_difference=_difference(lengths, np.median),
    )


def _difference(lengths: dict[str, NDArray[np.float64]], average: Callable[..., Any]) -> Estimate | None:
    """Adapter minus base; the same prompts are drawn for both."""
    if "adapter" not in lengths:
        return None
    adapter, base = lengths["adapter"], lengths["base"]
    return estimate(lambda drawn: float(average(adapter[drawn]) - average(base[drawn])), len(base))


def _column(values: Sequence[float]) -> NDArray[np.float64]:
    return np.asarray(values, np.float64)
