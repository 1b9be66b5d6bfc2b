"""The live view of a run: where it is, and its numbers as small curves. Renders; `console.py` prints.

It is drawn anew at every refresh for the width that the terminal has then. Lines are short and never as wide as the
terminal, so that few terminals that are made narrower break them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table

MOST_COLUMNS = 80
CURVE_COLUMNS = 28
LEAST_FOR_REMARKS = 64
"""Columns below which curves stand alone."""

BESIDE, BESIDE_WITH_REMARKS = 23, 53
"""Columns that are not the curve's."""

LEVELS, ASCII_LEVELS = "▁▂▃▄▅▆▇█", "_.-=+*%#"


class Line(NamedTuple):
    """A number as it is now, how it got there, and what is beside it."""

    name: str
    value: str
    history: Sequence[float]
    remark: str = ""


class LiveView:
    """What is known of a run; a Rich renderable.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rows: dict[str, list[Mapping[str, Any]]] = {"train": [], "eval": [], "generate": []}
        self.steps = self.done = self._before = 0
        self._began = clock()

    def begin(self, steps: int, done: int) -> None:
        """A run of `steps` steps, of which `done` were taken earlier."""
        self.steps, self.done, self._before, self._began = steps, done, done, self._clock()

    def add(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl."""
        self._rows[row["kind"]].append(row)
        self.done = max(self.done, row["step"])

    def eta(self) -> str:
        """Hours, minutes and seconds to go at the pace so far, evaluations and answers included."""
        taken = self.done - self._before
        if not taken:
            return "-:--:--"
        seconds = (self._clock() - self._began) / taken * (self.steps - self.done)
        return str(timedelta(seconds=round(seconds)))

    def lines(self) -> list[Line]:
        """The numbers that there are."""
        found = []
        for name, form in (("loss", ".4f"), ("margin", "+.3f"), ("accuracy", ".2f")):
            history, held_out = self._history("train", name), self._history("eval", name)
            if history:
                remark = f"held out {held_out[-1]:{form}}" if held_out else ""
                found.append(Line(name, f"{history[-1]:{form}}", history, remark))
        bias, of_sum = self._history("eval", "length_bias"), self._history("eval", "sum_length_bias")
        if bias:
            remark = f"of DPO's sum {of_sum[-1]:+.2f}" if of_sum else ""
            found.append(Line("length bias", f"{bias[-1]:+.2f}", bias, remark))
        lengths = self._history("generate", "tokens")
        if lengths:
            newest = self._rows["generate"][-1]
            remark = f"tokens; base {newest['base_tokens']:.0f}, ratio {newest['length_ratio']:.2f}"
            found.append(Line("answers", f"{lengths[-1]:.0f}", lengths, remark))
        speeds = self._history("train", "tokens_per_second")
        if speeds:
            memory = f"memory {self._rows['train'][-1]['memory_bytes'] / 2**30:.1f} GiB"
            found.append(Line("tokens/s", f"{speeds[-1]:,.0f}", speeds, memory))
        return found

    def _history(self, kind: str, key: str) -> list[float]:
        """The numbers of the rows of a kind that have one; of a length bias, its correlation."""
        values = [row[key] for row in list(self._rows[kind])]
        numbers = [value["spearman"] if isinstance(value, Mapping) else value for value in values]
        return [number for number in numbers if number is not None]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, min(MOST_COLUMNS, options.max_width - 1))
        remarks = width >= LEAST_FOR_REMARKS
        columns = max(4, min(CURVE_COLUMNS, width - (BESIDE_WITH_REMARKS if remarks else BESIDE)))
        levels = ASCII_LEVELS if options.ascii_only else LEVELS
        for table in (self._head(width, columns), self._body(columns, levels, remarks=remarks)):
            yield from console.render(table, options.update(width=width))

    def _head(self, width: int, columns: int) -> Table:
        place, share = f"step {self.done}/{self.steps}", self.done / self.steps if self.steps else 0.0
        rest = f"{share:.0%}", f"ETA {self.eta()}"
        room = width - len(place) - sum(map(len, rest)) - 3
        bar = ProgressBar(total=max(self.steps, 1), completed=self.done, width=max(1, min(columns, room)))
        head = Table.grid(padding=(0, 1))
        for style in ("bold", "", "", "cyan"):
            head.add_column(style=style, no_wrap=True)
        head.add_row(place, bar, *rest)
        return head

    def _body(self, columns: int, levels: str, *, remarks: bool) -> Table:
        body = Table.grid(padding=(0, 1))
        body.add_column(style="dim", no_wrap=True, width=11)
        body.add_column(justify="right", no_wrap=True, width=9)
        body.add_column(style="green", no_wrap=True, width=columns)
        body.add_column(style="dim", no_wrap=True)
        for line in self.lines():
            body.add_row(line.name, line.value, curve(line.history, columns, levels), line.remark if remarks else "")
        return body


def curve(values: Sequence[float], columns: int, levels: str = LEVELS) -> str:
    """At most `columns` characters between the least and the largest of some values; means, where there are more."""
    if not values:
        return ""
    count = min(columns, len(values))
    edges = [round(place * len(values) / count) for place in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return levels[len(levels) // 2] * count
    return "".join(levels[round((mean - low) / (high - low) * (len(levels) - 1))] for mean in means)
