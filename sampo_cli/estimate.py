"""A number and how sure it is: a statistic of pairs with its bootstrap interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sampo_cli.length_bias import interval

Statistic = Callable[[NDArray[np.int64]], float | None]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; None where it is undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None


def estimate(statistic: Statistic, size: int) -> Estimate:
    """A statistic of all of `size` pairs (or answers), and its percentile bootstrap interval over them.

    Args:
        statistic: of those with the given indices, int64 [size].
    """
    value = statistic(np.arange(size))
    found = interval(statistic, size) if value is not None else None
    return Estimate(value, *found) if found else Estimate(value)


def mean_of(values: NDArray[np.float64]) -> Estimate:
    """The mean of one number for each pair, [P]."""
    return estimate(lambda drawn: float(values[drawn].mean()), len(values))


def median_of(values: NDArray[np.float64]) -> Estimate:
    """The median of one number for each pair, [P]."""
    return estimate(lambda drawn: float(np.median(values[drawn])), len(values))
