"""Figures as PNG files, drawn with matplotlib where it is installed: one style, and what `sampo data --plot` shows.

A figure is made from numbers and returned; nothing is read here, and no window is opened (no pyplot).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from sampo_cli.disk import existing, is_writable, writing
from sampo_cli.errors import UsageError
from sampo_cli.label_bias import GapStep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"chosen": "#009E73", "rejected": "#D55E00", "neutral": "#56606B", "accent": "#0072B2"}
"""Okabe and Ito's, which colour-blind readers tell apart."""

STYLE: dict[str, Any] = {
    "figure.figsize": (7.5, 4.4),
    "figure.dpi": 140,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 12,
    "axes.labelsize": 10.5,
    "grid.color": "#E3E6EA",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}

_BINS, _SIDE_BINS = 40, 20


def check_plots(folder: Path) -> None:
    """Refuse early what could not be drawn or not be written.

    Raises:
        UsageError: matplotlib is not installed, or the folder cannot be made.
    """
    if not is_installed():
        raise UsageError(
            "--plot: matplotlib is not installed", hint="pip install matplotlib (the extra 'report' has it)"
        )
    place = existing(folder)
    if not is_writable(place):
        raise UsageError(f"--plot {folder}: {place} is no folder that can be written", hint="name another folder")


def is_installed() -> bool:
    """True where figures can be drawn."""
    return find_spec("matplotlib") is not None


def png(draw: Callable[[], Figure]) -> bytes:
    """A figure in our style."""
    from matplotlib.style import context

    written = io.BytesIO()
    with context(["default", STYLE, {"text.parse_math": False}]):
        draw().savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()


def write_figures(figures: Mapping[str, Callable[[], Figure]], folder: Path) -> list[Path]:
    """Draw each figure in our style and save it as NAME.png, which replaces one of that name. Returns the files."""
    files = []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in figures.items():
            files.append(folder / f"{name}.png")
            files[-1].write_bytes(png(draw))
    return files


def axes_of(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """An empty figure with titled axes. `x`, `y`: what is along them, with the unit."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    return figure, axes


def gap_figure(gaps: ArrayLike, mean: float, median: float) -> Figure:
    """A histogram of gaps, [P]: chosen minus rejected tokens. What lies beyond 98 % of them is in the outer bars."""
    gap_P = np.asarray(gaps)
    x = "chosen minus rejected, tokens (the outer bars hold what lies beyond)"
    figure, axes = axes_of("How much longer the chosen response is", x, "pairs")
    width = max(1, int(np.ceil(np.percentile(np.abs(gap_P), 98) / _SIDE_BINS)))
    for sign, side, name in ((-1, "rejected", "chosen is shorter"), (1, "chosen", "chosen is longer")):
        size = sign * gap_P[sign * gap_P > 0]
        bins = np.bincount(np.minimum((size - 1) // width, _SIDE_BINS - 1), minlength=_SIDE_BINS)
        label = f"{name}: {len(size) / len(gap_P):.1%}"
        axes.bar(
            sign * width * (np.arange(_SIDE_BINS) + 0.5), bins, width=0.92 * width, color=COLORS[side], label=label
        )
    for value, name, line in ((mean, "mean", "--"), (median, "median", ":")):
        axes.axvline(value, color="black", linestyle=line, linewidth=1.2, label=f"{name}: {value:+,.1f} tokens")
    axes.grid(axis="x", visible=False)
    axes.legend(title=f"as long: {(gap_P == 0).mean():.1%} (not drawn)", alignment="left")
    return figure


def lengths_figure(chosen_tokens: ArrayLike, rejected_tokens: ArrayLike) -> Figure:
    """Histograms of both responses' lengths, [P] each, in tokens. The longest 1 % are counted at the end."""
    sides = {"chosen": np.asarray(chosen_tokens), "rejected": np.asarray(rejected_tokens)}
    x = "length of the response, tokens (the last bar holds longer ones)"
    figure, axes = axes_of("How long responses are", x, "pairs")
    most = float(np.percentile(np.concatenate(list(sides.values())), 99))
    edges = np.linspace(0, max(most, 1), _BINS + 1)
    for name, tokens in sides.items():
        counts, _ = np.histogram(np.minimum(tokens, edges[-1]), bins=edges)
        label = f"{name}: mean {tokens.mean():,.0f}, median {np.median(tokens):,.0f}"
        axes.stairs(counts, edges, color=COLORS[name], linewidth=1.8, label=label)
        axes.stairs(counts, edges, color=COLORS[name], alpha=0.15, fill=True)
    axes.set_xlim(0, edges[-1])
    axes.legend()
    return figure


def longer_wins_figure(steps: Sequence[GapStep], slope: float) -> Figure:
    """How often the longer response is chosen, by how much longer it is, with 95 % intervals; the regression's line."""
    from matplotlib.ticker import LogLocator, NullFormatter

    title = "How often the longer response is the chosen one"
    figure, axes = axes_of(title, "how much longer it is, tokens (logarithmic)", "share of pairs, %")
    x = np.array([step.median for step in steps])
    share = 100 * np.array([step.longer_wins for step in steps])
    ends = 100 * np.array([step.interval for step in steps]).T
    axes.errorbar(
        x, share, np.abs(ends - share), fmt="o", color=COLORS["accent"], capsize=3, label="pairs, 95 % interval"
    )
    line = np.geomspace(x.min(), x.max(), 100)
    axes.plot(line, 100 / (1 + np.exp(-slope * line)), color=COLORS["neutral"], label="logistic regression on the gap")
    axes.axhline(50, color="black", linewidth=1, linestyle=":", label="no preference")
    axes.set(xscale="log", ylim=(0, 100))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend()
    return figure
