"""One page about one or several runs: curves over each other, length bias, answers before and after, what differs.

The page is one file that opens from the disk: figures are inside, nothing is fetched, nothing runs. Whatever comes from
a run's files is text on it. Works on a run that still goes or crashed; what it has not got is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sampo_cli.card_facts import Tree, list_of, tree_of
from sampo_cli.charts import Chart, Curve, as_figures, bars, curves, number, scatter, svg
from sampo_cli.config import leaves
from sampo_cli.disk import write_text
from sampo_cli.length_bias import BUCKETS
from sampo_cli.plots import write_figures
from sampo_cli.run_files import RunFiles, json_lines, number_of, read_run, text_of

TEMPLATE = Path(__file__).parent / "templates" / "report.html"
MOST_ANSWERS = 6

LEARNING = (
    ("loss", "Loss", "nats, mean over pairs"),
    ("margin", "Margin", "chosen reward minus rejected reward"),
    ("accuracy", "Accuracy", "share of pairs with a margin above 0"),
    ("kl_per_token", "KL to the reference", "nats per response token, estimated"),
)
MACHINE = (
    ("learning_rate", "Learning rate", "per step"),
    ("grad_norm", "Gradient norm before clipping", "L2 norm"),
    ("tokens_per_second", "Speed", "tokens per second"),
    ("memory_bytes", "Memory", "GiB, the most so far"),
)
SCALES = {"memory_bytes": 2.0**-30}


@dataclass(frozen=True)
class Section:
    """A part of the page. `figures`: their charts."""

    title: str
    anchor: str
    text: str
    charts: list[Chart] = field(default_factory=list)


def write_report(folders: Sequence[Path], output: Path) -> list[Path]:
    """Write report.html and a PNG for each figure into `output`. Returns the files.

    Raises:
        UsageError: not a run's folder.
        ModelError: a run's file is broken.
        SampoError: the disk is full.
    """
    runs = [read_run(folder) for folder in folders]
    sections = sections_of(runs)
    page = render(runs, sections)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "report.html", page)
    charts = [chart for section in sections for chart in section.charts]
    return [output / "report.html", *write_figures(as_figures(charts), output)]


def names_of(runs: Sequence[RunFiles]) -> list[str]:
    """A name for each run: its folder's, with a number where several have the same."""
    names: list[str] = []
    for run in runs:
        same = sum(name.partition(" (")[0] == run.name for name in names)
        names.append(f"{run.name} ({same + 1})" if same else run.name)
    return names


def sections_of(runs: Sequence[RunFiles]) -> list[Section]:
    """The figures that the runs have numbers for."""
    names = names_of(runs)
    found = [
        Section("Learning", "learning", "Pale: each step. Strong: a moving mean. Dots: held-out pairs.", []),
        Section("Length", "length", "Does the reward follow length, and do answers get longer?", []),
        Section("The machine", "machine", "What the optimizer and the device did.", []),
    ]
    found[0].charts.extend(_curves(runs, names, LEARNING))
    found[1].charts.extend([*_length_bias(runs, names), *_generated(runs, names)])
    found[2].charts.extend(_curves(runs, names, MACHINE))
    return [section for section in found if section.charts]


def _curves(runs: Sequence[RunFiles], names: Sequence[str], metrics: Sequence[tuple[str, str, str]]) -> list[Chart]:
    found = []
    for key, title, unit in metrics:
        lines = [_curve(run, name, key) for run, name in zip(runs, names, strict=True)]
        if any(len(line.values) or len(line.held_out) for line in lines):
            found.append(curves(key, title, unit, lines))
    return found


def _curve(run: RunFiles, name: str, key: str) -> Curve:
    steps, values = series(run.of_kind("train"), key)
    held_out_steps, held_out = series(run.of_kind("eval"), key)
    return Curve(name, steps, values, held_out_steps, held_out)


def series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have a finite number under `key`."""
    pairs = [(number_of(row.get("step")), number_of(row.get(key))) for row in rows]
    known = [(step, value * SCALES.get(key, 1.0)) for step, value in pairs if step is not None and value is not None]
    return [step for step, _ in known], [value for _, value in known]


def _length_bias(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Chart]:
    """Of the last evaluation of each run: by bucket, and over steps."""
    found = []
    shares: dict[str, list[float | None]] = {}
    for run, name in zip(runs, names, strict=True):
        rows = run.of_kind("eval")
        kinds = {"length_bias": name, "sum_length_bias": f"{name}, as DPO's sum"}
        if tree_of(run.summary.get("method")).get("reduction") == "sum":
            del kinds["sum_length_bias"]  # it is its own
        for key, what in kinds.items():
            buckets = list_of(tree_of(rows[-1].get(key)).get("buckets")) if rows else []
            by_bucket = [number_of(tree_of(bucket).get("accuracy")) for bucket in buckets]
            if len(by_bucket) == len(BUCKETS) and any(value is not None for value in by_bucket):
                shares[what] = by_bucket
    if shares:
        title = "Held-out accuracy by how long the chosen response is"
        found.append(bars("accuracy-by-length", title, "share of pairs with a margin above 0", BUCKETS, shares))
    lines = []
    for run, name in zip(runs, names, strict=True):
        rows = [{**row, "bias": tree_of(row.get("length_bias")).get("spearman")} for row in run.of_kind("eval")]
        steps, values = series(rows, "bias")
        lines.append(Curve(name, held_out_steps=steps, held_out=values))
    if any(len(line.held_out) for line in lines):
        title = "Rank correlation of margin and length gap"
        found.append(curves("length-bias", title, "Spearman's rho, held-out pairs", lines))
    return found + _scatter(runs, names)


def _scatter(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Chart]:
    """Margins of held-out pairs by gap, where the run's last evaluation left them."""
    points = {}
    for run, name in zip(runs, names, strict=True):
        rows = [tree_of(row) for row in run.held_out]
        both = [(number_of(row.get("gap")), number_of(row.get("margin"))) for row in rows]
        known = [(gap, margin) for gap, margin in both if gap is not None and margin is not None]
        if known:
            points[name] = [gap for gap, _ in known], [margin for _, margin in known]
    return [scatter("margin-by-gap", "Held-out margin by length gap", points, "margin")] if points else []


def _generated(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Chart]:
    """Mean length of answers over time, the base's beside it."""
    lines = []
    for place, (run, name) in enumerate(zip(runs, names, strict=True)):
        rows = run.of_kind("generate")
        for key, what, base_of in (("tokens", name, None), ("base_tokens", f"{name}, base", place)):
            steps, values = series(rows, key)
            lines.append(Curve(what, held_out_steps=steps, held_out=values, base_of=base_of))
    if not any(len(line.held_out) for line in lines):
        return []
    return [curves("generated-length", "Length of answers", "tokens, mean over prompts", lines)]


def overview(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """The table at the top: a row for each run."""
    headings = [
        "run",
        "method",
        "model",
        "data",
        "steps",
        "state",
        "held-out loss",
        "accuracy",
        "margin",
        "length bias",
    ]
    rows = []
    for run, name in zip(runs, names_of(runs), strict=True):
        steps, last = tree_of(run.summary.get("steps")), tree_of(run.summary.get("evaluation"))
        bias = tree_of(last.get("length_bias")).get("spearman")
        numbers = [
            number(number_of(value)) for value in (last.get("loss"), last.get("accuracy"), last.get("margin"), bias)
        ]
        done = f"{steps.get('done', '?')} of {steps.get('planned', '?')}"
        rows.append([name, run.method, _shown(run.model), _shown(run.data), done, run.state, *numbers])
    return {"caption": "Runs, and the evaluation of the adapter that each kept", "headings": headings, "rows": rows}


def _shown(names: str) -> str:
    """Names on the Hub as they are, local files and folders without the way to them."""
    return ", ".join(Path(name).name if Path(name).is_absolute() else name for name in names.split(", "))


def differences(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """The recipe keys that are not the same in all runs."""
    flat = [leaves(run.recipe) for run in runs]
    keys = [
        key for key in dict.fromkeys(key for one in flat for key in one) if len({str(one.get(key)) for one in flat}) > 1
    ]
    rows = [[key, *(str(one.get(key, "")) for one in flat)] for key in keys]
    return {"caption": "What differs between the recipes", "headings": ["key", *names_of(runs)], "rows": rows}


def render(runs: Sequence[RunFiles], sections: Sequence[Section]) -> str:
    """The page, HTML."""
    from jinja2 import Environment, StrictUndefined

    names = names_of(runs)
    shown = [answer for run, name in zip(runs, names, strict=True) for answer in last_answers(run, name)]
    parts = [("Runs", "runs"), *((section.title, section.anchor) for section in sections)]
    parts += [("Answers", "answers")] * bool(shown) + [("Recipes", "recipes")]
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=names[0] if len(runs) == 1 else f"{len(runs)} runs: {', '.join(names)}",
        subtitle="sampo report",
        parts=parts,
        overview=overview(runs),
        notes=[f"{name}: {_unfinished(run)}" for run, name in zip(runs, names, strict=True) if run.state != "finished"],
        sections=[
            {
                **vars(section),
                "figures": [{**vars(chart), "svg": svg(chart)} for chart in section.charts],
            }
            for section in sections
        ],
        answers=shown,
        answers_text="The newest of each prompt; lengths in tokens.",
        differences=differences(runs) if len(runs) > 1 else {"rows": []},
        recipes=[{"run": name, "text": _recipe_text(run)} for run, name in zip(runs, names, strict=True)],
    )


def _unfinished(run: RunFiles) -> str:
    return (
        f"the run is {run.state}; this is what there is so far." if run.state == "running" else f"the run {run.state}."
    )


def _recipe_text(run: RunFiles) -> str:
    path = run.folder / "recipe.yaml"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def last_answers(run: RunFiles, name: str) -> list[Tree]:
    """The newest answers to the first prompts, of the adapter and of the base."""
    found = {}
    for row in json_lines(run.folder / "generations.jsonl"):
        prompt = text_of(row.get("prompt"))
        if prompt:
            found[prompt] = {
                "run": name,
                "prompt": prompt,
                "base": text_of(row.get("base")),
                "tuned": text_of(row.get("answer")),
                "base_tokens": number(number_of(row.get("base_tokens"))),
                "tuned_tokens": number(number_of(row.get("tokens"))),
            }
    return list(found.values())[:MOST_ANSWERS]
