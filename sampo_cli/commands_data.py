"""Commands that look at what there is: `data`, `methods`, `cache`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from sampo_cli import console
from sampo_cli.options import DATA, Debug, Json, Quiet, Set, option, recipe_tree

if TYPE_CHECKING:
    from sampo_cli.data_report import Summary
    from sampo_cli.dataset import PairDataset

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
    tree = recipe_tree(None, {"model": model, "data": source, "max_length": max_length}, settings)
    from sampo_cli import plan as plans
    from sampo_cli.balance import check_target, write_balanced
    from sampo_cli.data_report import summarise
    from sampo_cli.disk import expanded
    from sampo_cli.plots import check_plots
    from sampo_cli.tables import print_balanced, print_data_report

    target, folder = balance and expanded(balance), plot and expanded(plot)
    if target:
        check_target(target)
    if folder:
        check_plots(folder)
    with console.run_view(quiet=True) as view:
        plan = plans.make_plan(plans.resolve_recipe(tree), view)
    recipe = plan.recipe
    shown = plans.inspect_pair(plan, row)
    summary = summarise(plan.dataset)
    pictures = _draw(plan.dataset, summary, folder) if folder else []
    written = write_balanced(plan.dataset, target, recipe.train.seed, recipe.data.columns) if target else None
    if as_json:
        more = {"plots": [str(path) for path in pictures], "balanced": written and written.to_dict()}
        console.print_json(summary.to_dict() | more)
    elif not quiet:
        print_data_report(summary, *shown)
        if pictures:
            console.print_facts("plots", {path.stem: path for path in pictures})
        if written:
            print_balanced(written)


def _draw(dataset: PairDataset, summary: Summary, folder: Path) -> list[Path]:
    """The figures of `--plot`. Returns the files."""
    from sampo_cli import plots

    labels, steps = summary.labels, summary.longer_wins_by_gap
    gap = dataset.chosen_tokens - dataset.rejected_tokens
    figures = {
        "gap": lambda: plots.gap_figure(gap, labels.mean_gap, labels.median_gap),
        "lengths": lambda: plots.lengths_figure(dataset.chosen_tokens, dataset.rejected_tokens),
    }
    if steps:
        figures["longer-wins"] = lambda: plots.longer_wins_figure(steps, labels.model.slope)
    return plots.write_figures(figures, folder)


def methods(
    name: Annotated[Optional[str], typer.Argument(help="Show one method with its citation.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the methods that `train` knows: formula, reference, reduction, defaults, paper."""
    from sampo_cli.method_table import METHODS, find
    from sampo_cli.tables import print_method, print_methods

    chosen = [find(name)] if name else list(METHODS.values())
    if as_json:
        console.print_json([method.to_dict() for method in chosen])
    elif name:
        print_method(chosen[0])
    else:
        print_methods(chosen)


@cache.command("list")
def list_cache(as_json: Json = False, debug: Debug = False) -> None:
    """Show everything in the cache, newest first."""
    from sampo_cli.cache import entries
    from sampo_cli.tables import print_cache

    found = entries()
    if as_json:
        console.print_json([entry.to_dict() for entry in found])
    else:
        print_cache(found)


@cache.command("clear")
def clear_cache(
    keys: Annotated[
        Optional[list[str]], typer.Argument(metavar="[KEY]...", help="Only entries whose keys begin so.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Delete what is in the cache; it is made again when it is needed."""
    from sampo_cli.cache import clear

    gone = clear(keys or ())
    if as_json:
        console.print_json([entry.to_dict() for entry in gone])
    elif not quiet:
        console.print_facts("cleared", {"entries": len(gone), "bytes": sum(entry.bytes for entry in gone)})
