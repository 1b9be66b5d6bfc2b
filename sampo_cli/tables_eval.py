"""What `sampo eval` prints on stdout: tables, and answers side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from sampo_cli.console import stdout
from sampo_cli.estimate import Estimate
from sampo_cli.eval_generate import GenerationReport
from sampo_cli.eval_subject import Evaluation
from sampo_cli.formats import printable
from sampo_cli.length_bias import BUCKETS
from sampo_cli.pair_report import PairReport
from sampo_cli.suites import Result, Suite

STYLE: dict[str, Any] = {"box": None, "header_style": "bold", "title_justify": "left"}

EXAMPLES = 3
EXAMPLE_CHARACTERS = 400

TITLES = {"sample": "sampled (SamPO)", "sum": "sum (DPO)", "mean": "mean per token"}
BASE_TITLES = {"sum": "sum", "mean": "mean per token"}


def print_evaluation(done: Evaluation) -> None:
    """Everything that was measured, and where the files are."""
    if done.pairs:
        stdout.print(rewards_table(done.pairs, f"{done.data}, 95 % intervals"))
        stdout.print(likelihood_table(done.pairs))
    if done.generation:
        stdout.print(generation_table(done.generation))
        for example in done.examples[:EXAMPLES]:
            stdout.print(example_table(example))
    if done.judge:
        stdout.print(judge_table(done.judge))
    if done.suite:
        stdout.print(suite_table(done.suite, done.results, done.subject.name))
        for line in remarks(done.suite, done.results):
            stdout.print(line, markup=False)
    stdout.print(f"written: {done.folder}", markup=False, soft_wrap=True)


def number(found: Estimate, form: str) -> str:
    """`value [low, high]`, or a dash where it is undefined. `form`: a format such as `.2f`."""
    if found.value is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.value:{form}}"
    return f"{found.value:{form}} \\[{found.low:{form}}, {found.high:{form}}]"


def rewards_table(report: PairReport, title: str) -> Table:
    """A column a reward: accuracy, margin, length bias."""
    factor = "log-probs, chosen minus rejected" if report.beta is None else f"beta {report.beta:g}"
    table = Table(title=f"{title}; {factor}", **STYLE)
    table.add_column("")
    titles = TITLES if report.beta is not None else BASE_TITLES
    for name in report.rewards:
        table.add_column(titles.get(name, f"{report.method}'s own"))
    rewards = report.rewards.values()
    table.add_row("accuracy", *(number(reward.accuracy, ".2f") for reward in rewards))
    table.add_row("margin", *(number(reward.margin, "+.2g") for reward in rewards))
    table.add_row("Spearman with gap", *(number(reward.spearman, "+.2f") for reward in rewards), end_section=True)
    table.add_row("[dim]chosen is[/]", *("[dim]accuracy[/]" for _ in rewards))
    for place, name in enumerate(BUCKETS):
        cells = [number(reward.buckets[place].accuracy, ".2f") for reward in rewards]
        pairs = next(iter(rewards)).buckets[place].pairs
        table.add_row(f"{name} ({pairs})", *cells)
    return table


def likelihood_table(report: PairReport) -> Table:
    """Log-probs of both sides, the run's loss and the KL."""
    table = Table("nats", "model", "base", "difference", **STYLE)
    for side, logps in report.logps.items():
        base = number(logps.base, ".0f") if logps.base else ""
        difference = number(logps.difference, "+.2f") if logps.difference else ""
        table.add_row(f"log-prob, {side}", number(logps.model, ".0f"), base, difference)
    if report.loss:
        table.add_row(f"loss ({report.method})", number(report.loss, ".4f"), "", "")
    if report.kl:
        table.add_row("KL a token (exact)", "", "", number(report.kl, ".4f"))
    return table


def generation_table(report: GenerationReport) -> Table:
    """A column a model: lengths, ends, repetition."""
    decoding = report.decoding
    how = f"temperature {decoding.temperature:g}, seed {decoding.seed}" if decoding.temperature else "greedy"
    title = f"answers to {report.prompts} prompts, {how}, at most {decoding.max_new_tokens:,} new tokens"
    table = Table("", *report.models, *(["difference"] if report.mean_difference else []), title=title, **STYLE)
    lines = [
        ("mean tokens", "mean_tokens", ".1f", report.mean_difference),
        ("median tokens", "median_tokens", ".1f", report.median_difference),
        ("share that ends", "ended", ".2f", None),
        ("repeated 4-grams", "repetition", ".3f", None),
    ]
    for label, name, form, difference in lines:
        cells = [number(getattr(model, name), form) for model in report.models.values()]
        table.add_row(label, *cells, *([number(difference, "+.1f")] if difference else []))
    return table


def example_table(example: Mapping[str, Any]) -> Table:
    """A prompt and what was answered to it, side by side, cut to a few lines."""
    models = [name for name in example if name != "instruction"]
    heads = [f"{name} ({example[name]['tokens']}{'' if example[name]['ended'] else '+'} tokens)" for name in models]
    table = Table(*heads, title=_shown(example["instruction"]), title_justify="left")
    table.add_row(*(_shown(example[name]["text"]) for name in models))
    return table


def _shown(text: str) -> str:
    lines = [printable(line) for line in text[:EXAMPLE_CHARACTERS].splitlines()]
    return escape("\n".join(lines)) + ("…" if len(text) > EXAMPLE_CHARACTERS else "")


def judge_table(verdict: Mapping[str, Any]) -> Table:
    """The adapter's win rates over the base, in percent."""
    table = Table("judge", "adapter over base, %", **STYLE)
    for title, key in (("win rate", "win_rate"), ("length-controlled win rate", "length_controlled_winrate")):
        value = verdict.get(key)
        table.add_row(title, f"{value:.2f}" if value is not None else escape(str(verdict.get("note", "-"))))
    return table


def suite_table(suite: Suite, rows: list[Result], name: str) -> Table:
    """A row a metric, published numbers beside the measured one; accuracies in percent."""
    published = list(dict.fromkeys(model for row in rows for model in row.published))
    title = f"{suite.name}{f' ({suite.about})' if suite.about else ''}"
    table = Table("benchmark", "metric", "shots", "examples", escape(name), title=escape(title), **STYLE)
    for model in published:
        table.add_column(escape(model), style="dim")
    for row in rows:
        asked = f" ({row.claimed_shots} claimed)" if row.shots_ignored else ""
        shots = f"{'mixed' if row.shots is None else row.shots}{asked}"
        error = f" ± {100 * row.stderr:.2f}" if row.stderr is not None else ""
        cells = [f"{row.published[model]:.2f}" if model in row.published else "" for model in published]
        table.add_row(
            escape(row.title), escape(row.metric), shots, f"{row.examples:,}", f"{100 * row.value:.2f}{error}", *cells
        )
    return table


def remarks(suite: Suite, rows: list[Result]) -> list[str]:
    """What a reader of the table should know."""
    lines = [f"{row.title}: {row.remark}" for row in rows if row.remark]
    lines += [
        f"{row.title}: {row.claimed_shots} shots are claimed, but the task has its own number, {row.shots}"
        for row in rows
        if row.shots_ignored
    ]
    if any(row.limited for row in rows):
        lines.append("only a part of the examples was run: these numbers are not to be compared with others")
    if suite.claims and not any(row.published for row in rows):
        lines.append("no published numbers are known for this suite")
    return lines
