"""Commands that look at runs: `runs`, `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sampo_cli import api_files, completion, console
from sampo_cli.options import RUN, Debug, Json, Quiet, option


def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to look, and below.")] = Path("outputs"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the runs in a folder: method, data, steps, what they reached, state."""
    from sampo_cli.tables_report import print_runs

    found = api_files.runs(folder)
    if as_json:
        console.print_json(found)
    else:
        print_runs(found, folder)


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Folders of runs, shown over each other.", autocompletion=completion.runs),
    ],
    output: Annotated[Optional[Path], option("--output", "Where to; the run's own report/ if not given.", RUN)] = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw one page about one or several runs, and its figures as PNG files."""
    files = api_files.report(folders, output=output)
    if as_json:
        console.print_json([str(path) for path in files])
    elif not quiet:
        facts = {"page": files[0], "figures": f"{len(files) - 1} PNG files beside it"}
        console.print_facts("report", facts)
