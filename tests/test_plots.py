"""Figures: their numbers, their words, and that they are files that open."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure
from PIL import Image

from sampo_cli import plots
from sampo_cli.errors import UsageError
from sampo_cli.label_bias import longer_wins_by_gap

GAPS = np.array([-7, -2, -2, 0, 1, 1, 3, 5, 5, 40])


def heights(figure: Figure) -> list[float]:
    return [patch.get_height() for patch in figure.axes[0].patches]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_gap_figure() -> None:
    """20 bars a side, each 2 tokens wide: 98 % of the sizes are within 34.06. All pairs are drawn but the tie."""
    figure = plots.gap_figure(GAPS, mean=4.4, median=1.0)
    (axes,) = figure.axes
    assert sum(heights(figure)) == 9
    bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes.patches if bar.get_height()}
    assert bars == {-7: 1, -1: 2, 1: 2, 3: 1, 5: 2, 39: 1}
    assert {"chosen is longer: 60.0%", "chosen is shorter: 30.0%", "mean: +4.4 tokens"} <= set(legend(figure))
    assert axes.get_legend().get_title().get_text() == "as long: 10.0% (not drawn)"
    assert all("tokens" in label or label == "pairs" for label in (axes.get_xlabel(), axes.get_ylabel()))
    assert axes.get_title(loc="left") or axes.get_title()


def test_lengths_figure() -> None:
    figure = plots.lengths_figure([2, 4, 5, 25], [3, 4, 2, 13])
    assert legend(figure) == ["chosen: mean 9, median 4", "rejected: mean 6, median 4"]
    drawn = [patch.get_data().values.sum() for patch in figure.axes[0].patches]
    assert drawn == [4, 4, 4, 4]  # a line and a filling for each side; the longest is in the last bar


def test_longer_wins_figure() -> None:
    steps = longer_wins_by_gap(GAPS)
    figure = plots.longer_wins_figure(steps, slope=0.1)
    (curve,) = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 100]
    assert curve.get_ydata()[0] == pytest.approx(100 / (1 + np.exp(-0.1 * steps[0].median)))
    (points,) = figure.axes[0].containers
    assert list(points.lines[0].get_ydata()) == [100 * step.longer_wins for step in steps]


@pytest.mark.parametrize("gaps", [[0], [0, 0, 0], [5], [-3000, 1]])
def test_any_pairs_can_be_drawn(tmp_path: Path, gaps: list[int]) -> None:
    lengths = np.full(len(gaps), 4000)
    steps = longer_wins_by_gap(gaps)
    figures = {
        "gap": lambda: plots.gap_figure(gaps, 0.0, 0.0),
        "lengths": lambda: plots.lengths_figure(lengths + gaps, lengths),
    }
    if steps:
        figures["wins"] = lambda: plots.longer_wins_figure(steps, 0.0)
    before = {key: rcParams[key] for key in plots.STYLE}
    files = plots.write_figures(figures, tmp_path / "new" / "folder")
    assert {key: rcParams[key] for key in plots.STYLE} == before != plots.STYLE
    assert [path.name for path in files] == [f"{name}.png" for name in figures]
    for path in files:
        with Image.open(path) as image:
            assert image.size == (1050, 616)
            assert len(set(image.convert("L").tobytes())) > 20  # not blank


def test_two_drawings_are_the_same_file(tmp_path: Path) -> None:
    figures = {"gap": lambda: plots.gap_figure(GAPS, 4.4, 1.0)}
    (first,), (second,) = (plots.write_figures(figures, tmp_path / name) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_what_cannot_be_drawn_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots.check_plots(tmp_path / "new" / "folder")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="no folder that can be written"):
        plots.check_plots(tmp_path / "file" / "folder")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="matplotlib is not installed") as refusal:
        plots.check_plots(tmp_path)
    assert refusal.value.hint is not None
    assert "pip install matplotlib" in refusal.value.hint
