"""Draws the pictures of docs/how-sampo-works.md: docs/images/sampo-*.svg.

    python -m scripts.make_figures

What they show is computed by sampo's own functions (`sampling`, `batch`, `attention`, `scores`, `losses`); so are the
numbers that the page names (`facts`). Token log-probs are made up where the page says so; no model runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from sampo_cli.attention import pair_mask
from sampo_cli.batch import CHOSEN, PROMPT, REJECTED, Draw, Pair, PairBatch, collate
from sampo_cli.charts import Chart, svg
from sampo_cli.losses import dpo
from sampo_cli.method_table import METHODS
from sampo_cli.plots import COLORS, axes_of
from sampo_cli.sampling import Reduction, Sampling
from sampo_cli.scores import pair_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
SEED = 42
BETA: float = METHODS["sampo"].defaults["method"]["beta"]
DRAWN, LOST = COLORS["accent"], "#8B949E"
SCHEMES = (
    "<style>svg{color:#24292f;--grid:#d8dee4}"
    "@media(prefers-color-scheme:dark){svg{color:#e6edf3;--grid:#3d444d}}</style>"
)


def pair_of(prompt: int, chosen: int, rejected: int) -> Pair:
    """A pair of these lengths; which tokens it has does not matter here."""
    return Pair(0, *(np.ones(length, np.int32) for length in (prompt, chosen, rejected)))


def margin(batch: PairBatch, log_ratios: NDArray[np.float64], reference: NDArray[np.float64] | None = None) -> float:
    """beta * (c - r) of a batch of one pair: its tokens' log-ratios are [N], or those of policy minus `reference`."""
    policy = torch.from_numpy(log_ratios if reference is None else log_ratios + reference)
    out = dpo(
        pair_scores(batch, policy, torch.zeros_like(policy) if reference is None else torch.from_numpy(reference)),
        beta=BETA,
    )
    return float(out.chosen_rewards - out.rejected_rewards)


def batch_of(
    pair: Pair, reduction: Reduction, epoch: int = 0, sampling: Sampling = "paired", draws: int = 1
) -> PairBatch:
    return collate([pair], Draw(reduction, SEED, epoch, sampling, draws=draws), every_token=True)


# --- Which tokens count --------------------------------------------------------------------------------------------

KEPT = pair_of(1, 26, 10)
KEPT_ROWS: tuple[tuple[str, Reduction, int], ...] = (
    ("DPO: every token", "sum", 0),
    ("SamPO, epoch 0", "sample", 0),
    ("SamPO, epoch 1", "sample", 1),
    ("SamPO, epoch 2", "sample", 2),
    ("its mean over all epochs", "expected", 0),
)


def kept_tokens() -> Figure:
    """Each response as a row of boxes, filled by the weight of its tokens."""
    from matplotlib.patches import Rectangle

    figure, axes = axes_of("Which tokens of a pair count", "", "")
    for line, (name, reduction, epoch) in enumerate(KEPT_ROWS):
        batch = batch_of(KEPT, reduction, epoch)
        for owner, place, color in ((0, 0.0, COLORS["chosen"]), (1, 0.42, COLORS["rejected"])):
            weights = batch.weights[batch.owner == owner].tolist()
            for token, weight in enumerate(weights):
                corner = (token, line * 1.35 + place)
                axes.add_patch(Rectangle(corner, 0.82, 0.32, facecolor=color, alpha=weight, linewidth=0))
                axes.add_patch(Rectangle(corner, 0.82, 0.32, fill=False, edgecolor=color, linewidth=1))
            axes.text(26.6, line * 1.35 + place + 0.18, f"counts as {sum(weights):g}", va="center", fontsize=9)
        axes.text(-0.6, line * 1.35 + 0.38, name, va="center", ha="right", fontsize=10)
    axes.set(xlim=(-9.5, 32), ylim=(len(KEPT_ROWS) * 1.35 - 0.3, -0.4))
    _bare(axes)
    return figure


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)


# --- The margin by length ------------------------------------------------------------------------------------------

OTHER, RATIO = 200, 0.05
LENGTHS = range(20, 601, 20)


def margins_by_length(reduction: Reduction, chosen_ratio: float, rejected_ratio: float) -> list[float]:
    """Margins of pairs whose chosen response has so many tokens, each with the same log-ratio."""
    found = []
    for length in LENGTHS:
        batch = batch_of(pair_of(1, length, OTHER), reduction)
        found.append(margin(batch, np.repeat([chosen_ratio, rejected_ratio], [length, OTHER])))
    return found


def margin_by_length() -> Figure:
    """Two panels: nothing was learned but to be likelier; every token was learned alike."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    cases = (
        (RATIO, RATIO, f"Each token of both: r = +{RATIO:g}"),
        (RATIO, -RATIO, f"chosen r = +{RATIO:g}, rejected r = -{RATIO:g}"),
    )
    for axes, (chosen, rejected, title) in zip(panels, cases, strict=True):
        for reduction, name, color in (("sum", "DPO", COLORS["rejected"]), ("sample", "SamPO", DRAWN)):
            axes.plot(LENGTHS, margins_by_length(reduction, chosen, rejected), color=color, linewidth=2, label=name)
        axes.axvline(OTHER, color=LOST, linestyle=":", linewidth=1.2, label=f"rejected has {OTHER} tokens")
        axes.set(title=title, xlabel="tokens of the chosen response", ylabel=f"margin, beta = {BETA:g}")
        axes.legend()
    return figure


# --- What a draw costs ---------------------------------------------------------------------------------------------

LONG, SHORT, EPOCHS = 400, 150, 400
DRAWS = (1, 2, 4, 8)


@cache
def made_up(epochs: int = EPOCHS) -> Mapping[str, list[float]]:
    """Margins over epochs, of one pair of LONG and SHORT tokens.

    The reference's token log-probs are minus exponentials of mean 1 nat. `paired` and `independent`: the policy is
    the reference. `draws K`: it is not, token log-ratios are normal with deviation 0.2.
    """
    generator = np.random.default_rng(SEED)
    pair = pair_of(1, LONG, SHORT)
    reference = -generator.exponential(1.0, LONG + SHORT)
    same, other = np.zeros(LONG + SHORT), generator.normal(0.0, 0.2, LONG + SHORT)
    found = {
        sampling: [margin(batch_of(pair, "sample", epoch, sampling), same, reference) for epoch in range(epochs)]
        for sampling in ("paired", "independent")
    }
    for draws in DRAWS:
        found[f"draws {draws}"] = [
            margin(batch_of(pair, "sample", epoch, draws=draws), other) for epoch in range(epochs)
        ]
    found["expected"] = [margin(batch_of(pair, "expected"), other)]
    return found


def two_draws() -> Figure:
    """Margins where there is nothing to find, and how averaging draws narrows them where there is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    found = made_up()
    spread = {sampling: float(np.std(found[sampling])) for sampling in ("paired", "independent")}
    label = f"independent: deviation {spread['independent']:.2f}"
    left.hist(found["independent"], 40, color=COLORS["rejected"], alpha=0.8, label=label)
    left.axvline(np.mean(found["paired"]), color=DRAWN, linewidth=2.5, label=f"paired: deviation {spread['paired']:g}")
    left.set(title="Policy is the reference", xlabel=f"margin, beta = {BETA:g}", ylabel="epochs")
    left.set_ylim(top=1.25 * left.get_ylim()[1])
    left.legend(loc="upper left")
    deviations = [np.std(found[f"draws {draws}"]) for draws in DRAWS]
    right.plot(DRAWS, deviations, "o-", color=DRAWN, label="measured over epochs")
    right.plot(DRAWS, deviations[0] / np.sqrt(DRAWS), ":", color=LOST, label="1 / sqrt(K)")
    right.set(title="Averaging K draws", xlabel="method.draws", ylabel="deviation of the margin", xticks=DRAWS, ylim=0)
    right.legend()
    return figure


# --- One row per pair ----------------------------------------------------------------------------------------------

ROW = pair_of(6, 8, 5)
PARTS = (
    (PROMPT, "prompt", LOST),
    (CHOSEN, "chosen", COLORS["chosen"]),
    (REJECTED, "rejected", COLORS["rejected"]),
)


def one_row() -> Figure:
    """The mask of a pair's row: who may look at whom."""
    from matplotlib.patches import Rectangle

    batch = batch_of(ROW, "sample")
    mask, segments = pair_mask(batch.segments, batch.position_ids)[0, 0], batch.segments[0].tolist()
    size, colors = len(segments), {part: color for part, _, color in PARTS}
    figure, axes = axes_of("Who sees whom in a pair's row", "", "")
    figure.set_size_inches(6.2, 5.6)
    for query in range(size):
        for key in range(size):
            shown = {"facecolor": colors[segments[key]], "alpha": 0.85} if mask[query, key] else {"facecolor": "none"}
            axes.add_patch(Rectangle((key, query), 0.86, 0.86, linewidth=0.4, edgecolor=LOST, **shown))
    for place, position in enumerate(batch.position_ids[0].tolist()):
        axes.text(place + 0.43, -0.35, str(position), ha="center", fontsize=8)
    axes.text(-0.4, -0.35, "position id", ha="right", fontsize=9)
    for part, name, color in PARTS:
        places = [place for place, segment in enumerate(segments) if segment == part]
        axes.text(np.mean(places) + 0.43, size + 0.7, name, ha="center", color=color, fontsize=10)
        axes.text(-0.4, np.mean(places) + 0.43, name, ha="right", va="center", color=color, fontsize=10)
    axes.set(xlim=(-4, size + 0.2), ylim=(size + 1.2, -1.0), aspect="equal")
    _bare(axes)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "sampo-tokens": kept_tokens,
    "sampo-margin": margin_by_length,
    "sampo-draws": two_draws,
    "sampo-row": one_row,
}


def picture(name: str) -> str:
    """The figure as SVG that follows the reader's light or dark scheme."""
    text = svg(Chart(name, name, "", FIGURES[name]))
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert found, "matplotlib writes a viewBox"
    size = f'width="{found[1]}" height="{found[2]}" '
    opening, rest = text.split(">", 1)
    return f"{opening.replace('<svg ', f'<svg {size}', 1)}>{SCHEMES}{rest}"


def facts() -> dict[str, str]:
    """The numbers that the page names, as it writes them."""
    weights = batch_of(KEPT, "expected").weights
    alike = dict(zip(LENGTHS, margins_by_length("sum", RATIO, RATIO), strict=True))
    learned = {
        kind: dict(zip(LENGTHS, margins_by_length(kind, RATIO, -RATIO), strict=True)) for kind in ("sum", "sample")
    }
    found = made_up()
    row = batch_of(ROW, "sample")
    return {
        "expected weight": f"{float(weights[0]):.2f}",
        "DPO, nothing learned, 600 tokens": f"{alike[600]:+.1f}",
        "DPO, nothing learned, 20 tokens": f"{alike[20]:+.1f}",
        "DPO, learned, 600 tokens": f"{learned['sum'][600]:+.1f}",
        "SamPO, learned, 600 tokens": f"{learned['sample'][600]:+.1f}",
        "deviation, independent": f"{np.std(found['independent']):.2f}",
        "deviation, paired": f"{np.std(found['paired']):g}",
        "deviation, 1 draw": f"{np.std(found['draws 1']):.3f}",
        "deviation, 4 draws": f"{np.std(found['draws 4']):.3f}",
        "positions of the row": str(row.segments.shape[1]),
        "positions of two rows": str(sum(ROW.row_lengths("separate"))),
    }


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name in FIGURES:
        (IMAGES / f"{name}.svg").write_text(picture(name), encoding="utf-8")
        print(f"wrote {IMAGES / name}.svg")
    for name, value in facts().items():
        print(f"{name}: {value}")
