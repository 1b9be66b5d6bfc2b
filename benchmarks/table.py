"""A report of `benchmarks.step` as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table

COLUMNS = (
    ("pairs/s", "pairs_per_second", "{:.3g}"),
    ("pairs/CPU s", "pairs_per_cpu_second", "{:.3g}"),
    ("s/step", "seconds_per_step", "{:.3g}"),
    ("reference s", "reference_seconds", "{:.1f}"),
    ("computed / needed", "computed_per_needed", "{:.3f}"),
    ("peak MiB", "peak_mib", "{:,.0f}"),
    ("above model", "peak_above_model_mib", "{:,.0f}"),
)


def report_table(report: Mapping[str, Any]) -> RenderableType:
    """One row for each contender; ratios of pairs per second and of memory, with the least and the most of any step."""
    contenders = report["contenders"]
    table = Table(title=_title(report["settings"]), title_justify="left")
    for heading in ("", *(heading for heading, _, _ in COLUMNS)):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    against = {"ratio": "trl"} if report["opponent"] else {}
    ours = [contender["name"] for contender in contenders if contender["name"] != report["opponent"]]
    against |= {"ratio_to_first": ours[0]} if len(ours) > 1 else {}
    for name in against.values():
        for heading in (f"times {name}: wall", "CPU", "memory"):
            table.add_column(heading, justify="right", no_wrap=True)
    for contender in contenders:
        cells = [form.format(contender[key]) for _, key, form in COLUMNS]
        table.add_row(contender["name"], *cells, *(cell for key in against for cell in _ratio_cells(contender[key])))
    return Group(table, *_below(report))


def _title(settings: Mapping[str, Any]) -> str:
    epochs = f", {settings['epochs']} epochs" if settings["epochs"] > 1 else ""
    return (
        f"{settings['steps']} steps of {settings['pairs_per_step']} pairs{epochs}, at most "
        f"{settings['pairs_per_microbatch']} pairs in a forward pass"
    )


def _ratio_cells(ratio: Mapping[str, Any] | None) -> list[str]:
    if ratio is None:
        return ["1", "1", "1"]
    cells = []
    for key in ("pairs_per_second", "pairs_per_cpu_second"):
        least, most = ratio[f"{key}_spread"]
        cells.append(f"{ratio[key]:.2f} [{least:.2f}..{most:.2f}]")
    return [*cells, f"{ratio['peak_above_model']:.2f}"]


def _below(report: Mapping[str, Any]) -> list[str]:
    """Lines under the table: how well losses agree, and on what all this was measured."""
    lines = [
        f"{contender['name']} against trl: losses differ by {found['first']:.1g} before the first update and "
        f"{found['second']:.1g} after it, margins (times beta) {found['margin']:.4f} and {found['their_margin']:.4f}; "
        f"{found['expected']}"
        for contender in report["contenders"]
        if (found := contender["agreement"])
    ]
    return lines + machine_lines(report)


def machine_lines(report: Mapping[str, Any]) -> list[str]:
    """Command, machine and versions, without which no figure means anything."""
    machine = dict(report["machine"])
    packages = machine.pop("versions")
    return [
        f"command: {report['command']}",
        "machine: " + ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None),
        "versions: " + ", ".join(f"{name} {number}" for name, number in packages.items()),
    ]


def wide_console() -> Console:
    """stdout, as wide as a terminal, or wide enough for the tables where there is none."""
    return Console(width=None if Console().is_terminal else 240, highlight=False, markup=False)


def show(report: Mapping[str, Any]) -> None:
    """Print the table on stdout."""
    wide_console().print(report_table(report))
