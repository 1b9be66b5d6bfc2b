"""Writes the tables of docs/experiments/length.md, and its figure, from the lines that `length_experiment.py` left.

    python -m scripts.length_page

Intervals are percentile bootstrap ones over seeds and prompts: the same prompts for adapter, base and every method, and
the same seeds for methods on the same pairs. Legend: S seeds, Q prompts.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sampo_cli import metrics
from scripts.length_experiment import (
    BASE,
    EARLY,
    EARLY_PART,
    METHODS,
    PARTS,
    RESULTS,
    ROOT,
    SEEDS,
    SETTING,
    all_cells,
)

PAGE = ROOT / "docs" / "experiments" / "length.md"
FIGURE = ROOT / "docs" / "images" / "length.png"
BEGIN, END = "<!-- made by: python -m scripts.length_page -->", "<!-- end -->"
DRAWS = 2000
OWN_REWARD = {"dpo": "sum", EARLY: "sum", "sampo": "sample", "expected": "own", "simpo": "own"}
"""Which of `sampo eval`'s rewards a method was trained with."""

COLORS = {"dpo": "#D55E00", EARLY: "#E69F00", "sampo": "#0072B2", "expected": "#009E73", "simpo": "#CC79A7"}
MARKERS = {"longer": "^", "shorter": "v", "whole": "o"}
Lengths = NDArray[np.float64]


@dataclass(frozen=True)
class Results:
    """Runs by part and method in the order of their seeds, those that are there, and the base's answers.

    Attributes:
        lengths: of the answers in tokens, [S, Q] for each part and method.
        base: the base's, [Q].
    """

    runs: Mapping[tuple[str, str], list[dict[str, Any]]]
    lengths: Mapping[tuple[str, str], Lengths]
    base: Lengths
    base_row: dict[str, Any]


def read_results(path: Path) -> Results:
    """Raises: SystemExit if the base or every run is missing."""
    rows = metrics.read(path)
    found = [row for row in rows if row["method"] == BASE]
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for part in PARTS:
        for method in METHODS:
            mine = [row for row in rows if row["method"] == method and row["part"] == part]
            if mine:
                runs[part, method] = sorted(mine, key=lambda row: row["seed"])
    if not found or not runs:
        raise SystemExit("nothing to show yet; run scripts.length_experiment")
    lengths = {cell: np.array([row["answers"]["tokens"] for row in rows], float) for cell, rows in runs.items()}
    return Results(runs, lengths, np.array(found[0]["answers"]["tokens"], float), found[0])


def interval(groups: Sequence[Lengths], statistic: Any, *, paired: bool = False) -> tuple[float, float, float]:
    """A statistic of several [S, Q] arrays, and its 95 % interval over seeds and prompts.

    Args:
        paired: row s of all arrays is of the same seed and is drawn together; else each array's seeds are.
    """
    generator = np.random.default_rng(0)
    prompts, found = groups[0].shape[1], []
    for _ in range(DRAWS):
        drawn = generator.integers(0, prompts, prompts)
        seeds = [generator.integers(0, len(group), len(group)) for group in groups]
        rows = seeds[:1] * len(groups) if paired else seeds
        found.append(statistic([group[row][:, drawn] for group, row in zip(groups, rows, strict=True)]))
    low, high = np.percentile(found, [2.5, 97.5])
    return statistic(groups), float(low), float(high)


def shown(estimate: tuple[float, float, float], form: str = "+.0f") -> str:
    value, low, high = estimate
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def over_seeds(values: Sequence[float | None], digits: int) -> str:
    """The mean over seeds, with the lowest and the highest."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{np.mean(known):.{digits}f}"
    return text if len(known) == 1 else f"{text} ({min(known):.{digits}f} to {max(known):.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def difference(some: Lengths, others: Lengths, *, paired: bool = False) -> tuple[float, float, float]:
    """Mean length of some runs' answers minus that of others', tokens."""
    return interval([some, others], lambda groups: float(groups[0].mean() - groups[1].mean()), paired=paired)


def ratio(some: Lengths, others: Lengths, *, paired: bool = False) -> tuple[float, float, float]:
    """The same as a ratio of geometric means: what happens to the usual answer, which the few at the cap hide."""
    logs = [np.log(some), np.log(others)]
    return interval(logs, lambda groups: float(np.exp(groups[0].mean() - groups[1].mean())), paired=paired)


def runs_table(results: Results) -> str:
    rows = []
    base = results.base[None]
    for (part, method), runs in results.runs.items():
        reward = [run["pairs"]["rewards"][OWN_REWARD[method]] for run in runs]
        answers = [run["answers"] for run in runs]
        mine = results.lengths[part, method]
        rows.append(
            [
                part,
                f"`{method}`",
                over_seeds([run["train_margin"] for run in runs], 2),
                over_seeds([one["accuracy"]["value"] for one in reward], 2),
                over_seeds([one["spearman"]["value"] for one in reward], 2),
                over_seeds([run["pairs"]["kl"]["value"] for run in runs], 3),
                shown(difference(mine, base)),
                shown(ratio(mine, base), ".2f"),
                over_seeds([float(np.mean(one["ended"])) for one in answers], 2),
                over_seeds([float(np.mean(one["repetition"])) for one in answers], 2),
            ]
        )
    header = ["pairs", "method", "margin in training", "held-out accuracy", "Spearman of margin and gap"]
    header += ["KL a token", "tokens against the base", "times the base", "answers that end", "repetition"]
    return table(header, rows)


def spread_table(results: Results) -> str:
    """How far apart a method's answers are after pairs that prefer longer and pairs that prefer shorter responses."""
    rows = []
    for method, on_shorter in [("dpo", EARLY), *((one, one) for one in METHODS if one != EARLY)]:
        cells = ("longer", method), ("shorter", on_shorter)
        if not set(cells) <= results.runs.keys():
            continue
        kls = [over_seeds([run["pairs"]["kl"]["value"] for run in results.runs[cell]], 3) for cell in cells]
        longer, shorter = (results.lengths[cell] for cell in cells)
        name = f"`{method}`" if method == on_shorter else f"`{method}`, on shorter `{on_shorter}`"
        rows.append([name, *kls, shown(difference(longer, shorter)), shown(ratio(longer, shorter), ".1f")])
    header = ["method", "KL a token, longer", "KL a token, shorter"]
    return table([*header, "longer minus shorter, tokens", "longer over shorter, times"], rows)


def contrast_table(results: Results) -> str:
    """Each method's answers against DPO's after the same pairs and steps."""
    others = [method for method in METHODS if method not in ("dpo", EARLY)]
    rows = [[part, *(_contrast(results, part, method, "dpo") for method in others)] for part in PARTS]
    return table(["pairs", *(f"`{method}` against `dpo`" for method in others)], rows)


def _contrast(results: Results, part: str, method: str, other: str) -> str:
    """Two methods on the same pairs: the seeds that both have."""
    cells = [(part, method), (part, other)]
    seeds = [[run["seed"] for run in results.runs.get(cell, [])] for cell in cells]
    common = [seed for seed in SEEDS if all(seed in known for known in seeds)]
    if not common:
        return "-"
    rows = [[known.index(seed) for seed in common] for known in seeds]
    some, others = (results.lengths[cell][row] for cell, row in zip(cells, rows, strict=True))
    return f"{shown(difference(some, others, paired=True))}; {shown(ratio(some, others, paired=True), '.2f')}"


def early_table(results: Results) -> str:
    """Every method on the pairs that DPO goes far with, against DPO stopped where it has gone as far as SamPO."""
    rows = []
    for (part, method), runs in results.runs.items():
        if part == EARLY_PART:
            kls = over_seeds([run["pairs"]["kl"]["value"] for run in runs], 3)
            against = "" if method == EARLY else _contrast(results, part, method, EARLY)
            rows.append([f"`{method}`", str(runs[0]["step"]), kls, against])
    return table(["method", "steps", "KL a token", f"against `{EARLY}`"], rows)


def draw(results: Results, path: Path) -> None:
    """Change of length against KL, a point a run: methods at the same distance from the base stand above each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color="#56606B", linewidth=1)
    for (part, method), runs in results.runs.items():
        kls = [run["pairs"]["kl"]["value"] for run in runs]
        changes = results.lengths[part, method].mean(1) - results.base.mean()
        style = {"color": COLORS[method], "marker": MARKERS[part], "s": 46, "alpha": 0.85}
        axes.scatter(kls, changes, label=f"{method}, {part}", **style)
    axes.set_xlabel("KL(base || adapter) a token on held-out responses, nats")
    axes.set_ylabel("mean answer, tokens more than the base")
    axes.set_title("Every run: how far from the base, and how much longer", loc="left")
    axes.legend(ncols=4, fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def tables(results: Results) -> str:
    base, answers = results.base, results.base_row["answers"]
    low, high = np.percentile(
        [np.random.default_rng(n).choice(base, len(base)).mean() for n in range(DRAWS)], [2.5, 97.5]
    )
    seconds = [run["cpu_seconds"] for runs in results.runs.values() for run in runs]
    capped = np.mean([np.mean(run == SETTING.max_new_tokens) for run in [base, *results.lengths.values()]])
    first = next(iter(results.runs.values()))[0]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    facts = (
        f"{first['step']} steps of {SETTING.batch_pairs} pairs, learning rate {SETTING.learning_rate:g}; "
        f"{first['pairs']['pairs']} held-out pairs; {len(base)} prompts. "
        f"**{len(seconds)} of the {len(all_cells())} runs are there**, {len(SEEDS)} seeds for each row in the end. "
        f"The base's answers: {base.mean():.0f} tokens ({low:.0f} to {high:.0f}), median {np.median(base):.0f}, "
        f"{np.mean(answers['ended']):.0%} end. At the cap of {SETTING.max_new_tokens:,}: {capped:.1%} of all answers. "
        f"{np.mean(seconds):.0f} CPU seconds a run. Python {platform.python_version()}, {packages}."
    )
    parts = [facts, runs_table(results)]
    if {("longer", "dpo"), ("shorter", "dpo")} <= results.runs.keys():
        parts += ["### Pairs that prefer longer against pairs that prefer shorter", spread_table(results)]
    parts += ["### Against DPO on the same pairs", contrast_table(results)]
    if (EARLY_PART, EARLY) in results.runs:
        parts += ["### At the same distance from the base: pairs that prefer shorter", early_table(results)]
    parts.append("![Change of answer length against KL, a point a run](../images/length.png)")
    return "\n\n".join(parts)


def main() -> None:
    results = read_results(RESULTS)
    draw(results, FIGURE)
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables(results)}\n\n{END}{after}", encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
