"""Commands that look at what there is: `data`, `methods`, `cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sampo_cli import api_files, completion, console
from sampo_cli.options import DATA, Debug, Json, Quiet, Set, option

cache = typer.Typer(help="What is kept to save time: tokenized pairs, references.", no_args_is_help=True)


def show_data(
    source: Annotated[list[str], typer.Argument(help="Hub names, files or folders.")],
    model: Annotated[str, option("--model", "Whose tokenizer and template to use.", DATA)],
    max_length: Annotated[Optional[int], option("--max-length", "Tokens of prompt plus response.", DATA)] = None,
    row: Annotated[
        Optional[int], option("--row", "The row to show token by token, from 1; the first usable otherwise.", DATA)
    ] = None,
    plot: Annotated[Optional[Path], option("--plot", "Draw PNG files into this folder.", DATA, "DIR")] = None,
    balance: Annotated[
        Optional[Path],
        option("--balance", "Write a subset that prefers neither length to this new file.", DATA, "FILE.jsonl"),
    ] = None,
    settings: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a model would really see of some pairs: counts, lengths, what labels say of length, one pair."""
    from sampo_cli.tables import print_balanced, print_data_report

    found = api_files.data(
        source, model=model, max_length=max_length, row=row, plot=plot, balance=balance, settings=settings
    )
    if as_json:
        console.print_json(found.to_dict())
    elif not quiet:
        print_data_report(found.summary, found.tokens, found.where)
        if found.plots:
            console.print_facts("plots", {path.stem: path for path in found.plots})
        if found.balanced:
            print_balanced(found.balanced)


def methods(
    name: Annotated[
        Optional[str],
        typer.Argument(help="Show one method with its citation.", autocompletion=completion.words(*completion.METHODS)),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the methods that `train` knows: formula, reference, reduction, defaults, paper."""
    from sampo_cli.tables import print_method, print_methods

    chosen = api_files.methods(name)
    if as_json:
        console.print_json([method.to_dict() for method in chosen])
    elif name:
        print_method(chosen[0])
    else:
        print_methods(chosen)


@cache.command("list")
def list_cache(as_json: Json = False, debug: Debug = False) -> None:
    """Show everything in the cache, newest first."""
    from sampo_cli.tables import print_cache

    found = api_files.cache_list()
    if as_json:
        console.print_json([entry.to_dict() for entry in found])
    else:
        print_cache(found)


@cache.command("clear")
def clear_cache(
    keys: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="KEY", help="Only entries whose keys begin so.", autocompletion=completion.cached),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Delete what is in the cache; it is made again when it is needed."""
    gone = api_files.cache_clear(keys or ())
    if as_json:
        console.print_json([entry.to_dict() for entry in gone])
    elif not quiet:
        console.print_facts("cleared", {"entries": len(gone), "bytes": sum(entry.bytes for entry in gone)})
