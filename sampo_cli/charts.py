"""The figures of a report: curves of several runs over each other, and for each what it shows in words and numbers.

Drawn with matplotlib in the style of `plots.py`, as SVG for the page and as PNG.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sampo_cli.plots import STYLE, axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#4B9CD3")
"""After Okabe and Ito, dark enough for a white page and light enough for a dark one. From the seventh run on again."""

MOST_ROWS = 12
"""Rows of the table under a curve."""

_INK, _GRID = "#010203", "#040506"
_SVG_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sampo",
    "savefig.transparent": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), _INK),
    "grid.color": _GRID,
}


@dataclass(frozen=True)
class Curve:
    """One run's numbers by step: `steps` and `values` of training steps, and of evaluations where there are any.

    `base_of`: it is dashed, and in the colour of the run with this place among the runs.
    """

    run: str
    steps: Sequence[float] = ()
    values: Sequence[float] = ()
    held_out_steps: Sequence[float] = ()
    held_out: Sequence[float] = ()
    base_of: int | None = None


@dataclass(frozen=True)
class Chart:
    """A figure and what stands for it where it cannot be seen.

    Attributes:
        key: its file's name.
        alt: what it shows, in a sentence or two.
        headings, rows: its numbers, or a selection of them.
    """

    key: str
    title: str
    alt: str
    draw: Callable[[], Figure] = field(repr=False)
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def svg(chart: Chart) -> str:
    """The figure as SVG for a page, in the page's own colour of text; no scripts, no files besides."""
    from matplotlib.style import context

    written = io.StringIO()
    with context(["default", STYLE, _SVG_STYLE, {"text.parse_math": False}]):
        chart.draw().savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    opening, rest = text[: text.index(">")], text[text.index(">") :]
    return re.sub(r' (width|height)="[^"]*"', "", opening) + rest  # as wide as the page lets it


def curves(key: str, title: str, unit: str, runs: Sequence[Curve], *, logarithmic: bool = False) -> Chart:
    """Values by step; evaluations as dots. A noisy curve is drawn pale, and its moving mean over it."""
    shown = [run for run in runs if len(run.values) or len(run.held_out)]

    def draw() -> Figure:
        figure, axes = axes_of(title, "optimizer step", unit)
        own = [run for run in runs if run.base_of is None]
        for run in runs:
            place = own.index(run) if run.base_of is None else run.base_of
            _draw_curve(axes, run, PALETTE[place % len(PALETTE)])
        if logarithmic:
            axes.set_yscale("log")
        axes.legend()
        return figure

    alt = f"{title} by optimizer step. " + " ".join(map(_in_words, shown))
    headings = ["step", *(f"{run.run}{kind}" for run in shown for kind in _kinds(run))]
    return Chart(key, title, alt.strip(), draw, headings, _rows(shown))


def _kinds(run: Curve) -> list[str]:
    """Endings of the names of a run's curves."""
    return [""] if bool(len(run.values)) != bool(len(run.held_out)) else ["", " (held out)"]


def _draw_curve(axes: Axes, run: Curve, color: str) -> None:
    if len(run.values):
        axes.plot(run.steps, run.values, color=color, alpha=0.3, linewidth=1)
        axes.plot(run.steps, smoothed(run.values), color=color, linewidth=1.8, label=run.run)
    if len(run.held_out):
        label = f"{run.run}{_kinds(run)[-1]}"
        base: dict[str, Any] = {"linestyle": "--", "alpha": 0.8}
        look = {"marker": "o", "markersize": 4.5} if run.base_of is None else base
        axes.plot(run.held_out_steps, run.held_out, color=color, linewidth=1, label=label, **look)


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and those before it, as many as a twentieth of all and at most 50."""
    window = min(max(len(values) // 20, 1), 50)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - window, 0)
    mean: list[float] = ((sums[ends] - sums[begins]) / (ends - begins)).tolist()
    return mean


def _in_words(run: Curve) -> str:
    parts = []
    held_out = " on held-out pairs" if len(run.values) else ""
    for name, steps, values in (("", run.steps, run.values), (held_out, run.held_out_steps, run.held_out)):
        if len(values):
            first, last = (f"{number(values[end])} at step {steps[end]:g}" for end in (0, -1))
            parts.append(f"{first} to {last}{name}")
    return f"{run.run}: from {', and from '.join(parts)}."


def _rows(runs: Sequence[Curve]) -> list[list[str]]:
    """Every evaluation, or if there are none, steps at equal distances; a column for each curve."""
    known: list[dict[float, float]] = []
    for run in runs:
        known += [dict(zip(run.steps, run.values, strict=True))] * bool(len(run.values))
        known += [dict(zip(run.held_out_steps, run.held_out, strict=True))] * bool(len(run.held_out))
    steps = sorted({step for run in runs for step in (run.held_out_steps or run.steps)})
    places: list[int] = np.unique(np.linspace(0, len(steps) - 1, MOST_ROWS).astype(int)).tolist() if steps else []
    return [[f"{steps[place]:g}", *(number(values.get(steps[place])) for values in known)] for place in places]


def number(value: float | None) -> str:
    """For people: four digits, more for what is large; "none" for nothing."""
    if value is None:
        return "none"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def bars(key: str, title: str, unit: str, groups: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> Chart:
    """A bar for each group and series; a line at one half."""

    def draw() -> Figure:
        figure, axes = axes_of(title, "chosen response is …", unit)
        width = 0.8 / max(len(series), 1)
        for place, (name, values) in enumerate(series.items()):
            at = np.arange(len(groups)) + width * (place - (len(series) - 1) / 2)
            heights = [value if value is not None else 0.0 for value in values]
            axes.bar(at, heights, 0.92 * width, color=PALETTE[place % len(PALETTE)], label=name)
        axes.axhline(0.5, color=_INK, linewidth=1, linestyle=":")
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylim(0, 1)
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside lower center", ncols=2)
        return figure

    words = "; ".join(
        f"{name}: " + ", ".join(f"{group} {number(value)}" for group, value in zip(groups, values, strict=True))
        for name, values in series.items()
    )
    rows = [[name, *map(number, values)] for name, values in series.items()]
    return Chart(key, title, f"{title}. {words}.", draw, ["", *groups], rows)


def scatter(key: str, title: str, runs: Mapping[str, tuple[Sequence[float], Sequence[float]]], y: str) -> Chart:
    """Margins by length gap, a dot for each pair, and a straight line through them (least squares)."""
    lines = {name: _line(*points) for name, points in runs.items()}

    def draw() -> Figure:
        figure, axes = axes_of(title, "chosen minus rejected, tokens", y)
        for place, (name, (gaps, margins)) in enumerate(runs.items()):
            color = PALETTE[place % len(PALETTE)]
            size = min(max(3000 / len(gaps), 9), 30)  # few dots are drawn larger
            axes.scatter(gaps, margins, s=size, color=color, alpha=0.45, linewidths=0)
            slope, offset = lines[name]
            ends = np.array([min(gaps), max(gaps)])
            axes.plot(ends, slope * ends + offset, color=color, linewidth=1.8, label=name)
        axes.axhline(0, color=_INK, linewidth=1, linestyle=":")
        axes.legend()
        return figure

    words = "; ".join(f"{name}: {100 * slope:+.3g} per 100 tokens" for name, (slope, _) in lines.items())
    rows = [
        [name, f"{len(runs[name][0]):,}", f"{100 * slope:+.3g}", f"{offset:+.3g}"]
        for name, (slope, offset) in lines.items()
    ]
    headings = ["", "pairs", "slope per 100 tokens", "at equal lengths"]
    return Chart(key, title, f"{title}. Slope of the straight line: {words}.", draw, headings, rows)


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and offset of the least-squares line; flat where x is constant."""
    centred = np.asarray(x, float) - np.mean(x)
    spread = float((centred**2).sum())
    slope = float((centred * np.asarray(y, float)).sum()) / spread if spread else 0.0
    return slope, float(np.mean(y)) - slope * float(np.mean(x))


def as_figures(charts: Sequence[Chart]) -> dict[str, Callable[[], Any]]:
    """What `plots.write_figures` draws."""
    return {chart.key: chart.draw for chart in charts}
