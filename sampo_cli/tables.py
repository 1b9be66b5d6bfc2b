"""What commands print on stdout: tables, and one pair token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sampo_cli.balance import Balanced
from sampo_cli.cache import Entry, cache_folder
from sampo_cli.console import print_facts, stdout
from sampo_cli.data_report import Summary, Token
from sampo_cli.formats import printable
from sampo_cli.hub import PushPlan
from sampo_cli.label_bias import LabelBias
from sampo_cli.method_table import Method

BAR = 24
STYLES = {"prompt": "dim", "chosen": "green", "rejected": "red"}


def print_data_report(summary: Summary, tokens: Sequence[Token], where: str) -> None:
    """Counts, lengths, histograms, what labels say of length, and the pair at `where`."""
    stdout.print(counts_table(summary))
    stdout.print(lengths_table(summary))
    stdout.print(histogram_table(summary))
    stdout.print(gap_table(summary))
    stdout.print(labels_table(summary.labels))
    stdout.print(f"down-sampling to the shorter response keeps {summary.kept_share:.1%} of response tokens")
    stdout.print(f"[bold]{escape(summary.advice)}[/bold]\n")
    stdout.print(f"[bold]{escape(where)}[/bold], token by token; a token that counts in the first epoch ends in │")
    stdout.print(token_text(tokens), soft_wrap=True)


def counts_table(summary: Summary) -> Table:
    counts = summary.counts
    table = Table("rows", "number", title=f"pairs, at most {summary.max_length:,} tokens a side", title_justify="left")
    table.add_row("read", f"{counts.rows:,}")
    table.add_row("usable", f"{counts.kept:,}")
    for reason, number in counts.dropped.items():
        table.add_row(f"dropped: {escape(reason)}", f"{number:,}")
    for part, number in counts.truncated.items():
        table.add_row(f"truncated: {part}", f"{number:,} ({summary.truncated_share[part]:.1%})")
    repeats = summary.repeats
    table.add_row("of the usable ones", "")
    table.add_row("identical to an earlier pair", _of(repeats.identical_pairs, counts.kept))
    table.add_row("with the prompt of an earlier pair", _of(repeats.identical_prompts, counts.kept))
    table.add_row("chosen and rejected nearly identical", _of(repeats.near_identical, counts.kept))
    return table


def _of(number: int, pairs: int) -> str:
    return f"{number:,} ({number / pairs:.1%})"


def lengths_table(summary: Summary) -> Table:
    table = Table("tokens", "mean", "median", "p90", "longest", title="lengths", title_justify="left")
    for part, lengths in summary.lengths.items():
        numbers = (f"{lengths.mean:,.1f}", f"{lengths.median:,.0f}", f"{lengths.p90:,.0f}", f"{lengths.max:,}")
        table.add_row(f"[{STYLES[part]}]{part}[/]", *numbers)
    return table


def histogram_table(summary: Summary) -> Table:
    histogram = summary.histogram
    table = Table("tokens", "chosen", "rejected", title="response lengths", title_justify="left")
    most = max(*histogram.chosen, *histogram.rejected, 1)
    bins = zip(histogram.edges, histogram.edges[1:], histogram.chosen, histogram.rejected, strict=False)
    for low, high, *numbers in bins:
        bars = [f"{'█' * round(BAR * number / most)} {number or ''}" for number in numbers]
        table.add_row(f"{low}-{high - 1}", f"[green]{bars[0]}[/]", f"[red]{bars[1]}[/]")
    return table


def gap_table(summary: Summary) -> Table:
    histogram = summary.gap_histogram
    table = Table("chosen - rejected", "pairs", title="length gap, tokens", title_justify="left")
    most = max(histogram.pairs)
    for low, high, number in zip(histogram.edges, histogram.edges[1:], histogram.pairs, strict=False):
        style = "dim" if low == 0 else "green" if low > 0 else "red"
        span = f"{low:+,}" if high == low + 1 else f"{low:+,} to {high - 1:+,}"
        table.add_row("0" if low == 0 else span, f"[{style}]{'█' * round(BAR * number / most)}[/] {number or ''}")
    return table


def labels_table(labels: LabelBias) -> Table:
    table = Table("chosen against rejected", "", title="what labels say of length", title_justify="left")
    for name, number in _bias_rows(labels).items():
        table.add_row(name, number)
    return table


def print_balanced(written: Balanced) -> None:
    """How many rows were kept, and the bias before and after."""
    table = Table("pairs", "all", "balanced", title="a balanced subset", title_justify="left")
    table.add_row("number", f"{written.pairs:,}", _of(written.kept, written.pairs))
    after = _bias_rows(written.after)
    for name, number in _bias_rows(written.before).items():
        table.add_row(name, number, after[name])
    stdout.print(table)
    stdout.print(f"written to {written.path}", markup=False, soft_wrap=True)


def _bias_rows(labels: LabelBias) -> dict[str, str]:
    """The bias as texts by name."""
    low, high = labels.interval
    return {
        "chosen is longer": f"{labels.chosen_longer:.1%}",
        "as long": f"{labels.equal_length:.1%}",
        "gap, mean": f"{labels.mean_gap:+,.1f} tokens",
        "gap, median": f"{labels.median_gap:+,.1f} tokens",
        "'longer wins' is right": f"{labels.longer_wins:.1%} ({low:.1%} to {high:.1%})",
        "regression is right": f"{labels.model.accuracy:.1%}",
        "log-odds per 100 tokens": f"{100 * labels.model.slope:+.2f}",
    }


def token_text(tokens: Sequence[Token]) -> Text:
    """The pair as coloured text; each part on a line of its own, scored tokens end in │, others in ·."""
    text = Text()
    before = ""
    for token, kind, scored in tokens:
        if kind != before:
            text.append(f"{'' if not before else chr(10)}{kind}: ", style="bold")
        shown = printable(token.replace("\n", "⏎"))
        text.append(shown, style=f"{STYLES[kind]} {'underline' if scored else ''}")
        text.append("│" if scored else "·", style="bright_black")
        before = kind
    return text


def print_push_plan(plan: PushPlan) -> None:
    """The files that would be sent, and the card."""
    visibility = "private" if plan.private else "public"
    table = Table("file", "bytes", title=f"to {escape(plan.repo)} ({visibility})", title_justify="left")
    for file in plan.files:
        table.add_row(escape(file.path), f"{file.size:,}")
    stdout.print(table)
    for note in plan.notes:
        stdout.print(note, markup=False)
    stdout.print("README.md:", style="bold")
    stdout.print(plan.card, markup=False, soft_wrap=True)


def print_dry_run(result: Mapping[str, Any]) -> None:
    """What a run would do, the memory that it needs, and what to change where that is too much."""
    facts = {key: value for key, value in result.items() if key not in ("memory", "changes") and value is not None}
    facts["truncated"] = ", ".join(f"{part} {share:.1%}" for part, share in facts["truncated"].items())
    for key in ("tokens per pair", "processes", "tokens", "parameters"):
        if key in facts:
            facts[key] = ", ".join(f"{name} {value:,}" for name, value in facts[key].items())
    print_facts("dry run", facts)
    memory = result["memory"]
    if memory is not None:
        _print_memory(memory)
    if result["changes"]:
        stdout.print(_changes_table(result["changes"]))
        if not any(change["fits"] for change in result["changes"]):
            stdout.print("nothing of this is enough: take a smaller model or more memory")


def _print_memory(memory: Mapping[str, Any]) -> None:
    table = Table("most memory of a step", "MiB")
    for part, size in memory["parts"].items():
        if size >= 2**19:
            table.add_row(part, f"{size / 2**20:,.0f}")
    table.add_row("in all", f"{memory['needed'] / 2**20:,.0f}", style="bold")
    there_is, usable = (f"{memory[key] / 2**20:,.0f}" for key in ("there is", "usable"))
    table.add_row(f"of {there_is} on {escape(memory['device'])}, usable", usable)
    stdout.print(table)
    rows, positions = memory["largest micro-batch"].values()
    verdict = "fits" if memory["fits"] else "does not fit"
    stdout.print(
        f"{verdict} with {memory['tokens per micro-batch']:,} tokens a micro-batch "
        f"(the largest has {rows:,} x {positions:,})"
    )


def _changes_table(changes: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("with this change", "MiB", "")
    for change in changes:
        fits = "[green]fits[/]" if change["fits"] else "[red]too much[/]"
        table.add_row(escape(change["change"]), f"{change['needed'] / 2**20:,.0f}", fits)
    return table


def print_methods(methods: Sequence[Method]) -> None:
    """A row a method, and under it its formula."""
    table = Table("method", "reference", "reduction", "defaults", "paper", box=None, header_style="bold")
    for method in methods:
        needs = "yes" if method.needs_reference else "no"
        table.add_row(f"[bold]{method.name}[/]", needs, method.reduction, _defaults(method), method.paper)
    stdout.print(table)
    stdout.print("\nloss of a pair", style="bold")
    for method in methods:
        formula = method.formula.partition("\n")[0]
        stdout.print(f"  [bold]{method.name:<10}[/]  {escape(formula)}", soft_wrap=True)
    stdout.print("\n`sampo methods NAME` explains the symbols and gives the citation.", markup=False)


def print_method(method: Method) -> None:
    """One method whole, with its citation."""
    facts = {
        "loss of a pair": method.formula,
        "reference": "yes" if method.needs_reference else "none is computed",
        "reduction": f"{method.reduction} (takes {', '.join(method.reductions)})",
        "defaults": _defaults(method),
        "paper": method.paper,
    }
    print_facts(method.name, facts)
    stdout.print(method.citation, markup=False, soft_wrap=True)


def _defaults(method: Method) -> str:
    sections = method.recipe_defaults()
    values = {**sections["method"], **sections.get("train", {})}
    shown = {key: value for key, value in values.items() if key != "reduction" and value}
    return ", ".join(f"{key} {value:g}" for key, value in shown.items())


def print_cache(entries: Sequence[Entry]) -> None:
    """A row an entry; what is unfinished or broken says so."""
    if not entries:
        stdout.print(f"nothing in {cache_folder()}", markup=False, soft_wrap=True)
        return
    table = Table("kind", "key", "MiB", "written (UTC)", "of", box=None, header_style="bold")
    for entry in entries:
        of = entry.of if entry.state == "whole" else f"{entry.of} ({entry.state})".strip()
        mebibytes = f"{entry.bytes / 2**20:,.1f}"
        table.add_row(
            entry.kind, entry.key.lstrip(".")[:12], mebibytes, entry.written[:16].replace("T", " "), escape(of)
        )
    stdout.print(table)
    total = sum(entry.bytes for entry in entries)
    stdout.print(f"{total / 2**20:,.1f} MiB in {cache_folder()}", markup=False, soft_wrap=True)
