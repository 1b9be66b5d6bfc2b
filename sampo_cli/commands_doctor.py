"""The command that looks at the machine: `sampo doctor`."""

from __future__ import annotations

from typing import Annotated

from rich.markup import escape
from rich.table import Table

from sampo_cli import api_files, console
from sampo_cli.errors import SampoError
from sampo_cli.options import RUN, Debug, Json, option

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    offline: Annotated[bool, option("--offline", "Do not ask the Hub.", RUN)] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check this machine: Python, packages, card, quantization, attention, kernels, disks, the Hub.

    Exit code 0 if nothing failed, warnings allowed; 1 otherwise.
    """
    diagnosis = api_files.doctor(offline=offline)
    if as_json:
        console.print_json(diagnosis.to_dict())
    else:
        table = Table(box=None, header_style="bold")
        for heading in ("", "check", "found"):
            table.add_column(heading, overflow="fold")
        for check in diagnosis.checks:
            table.add_row(f"[{STYLES[check.state]}]{check.state}[/]", check.name, escape(check.found))
            if check.advice:
                table.add_row("", "", f"[dim]→ {escape(check.advice)}[/]")
        console.stdout.print(table)
    if diagnosis.failed:
        hint = "what to do is beside each; then run sampo doctor again"
        raise SampoError(f"failed: {', '.join(diagnosis.failed)}", hint=hint)
