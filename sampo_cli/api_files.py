"""Functions that look at what there is: pairs, methods, runs, the cache, the machine.

Each gives what the command of its name shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sampo_cli.calls import Place, interface, text, texts
from sampo_cli.errors import UsageError

if TYPE_CHECKING:
    from sampo_cli.balance import Balanced
    from sampo_cli.cache import Entry
    from sampo_cli.data_report import Summary, Token
    from sampo_cli.dataset import PairDataset
    from sampo_cli.diagnosis import Diagnosis
    from sampo_cli.method_table import Method
    from sampo_cli.recipe_files import Shipped
    from sampo_cli.settings import Settings


@dataclass(frozen=True)
class DataReport:
    """What a model would see of some pairs.

    Attributes:
        summary: counts, lengths, what the labels say of length.
        tokens: one pair, token by token.
        where: that pair's file and row.
        plots: the files that were drawn.
        balanced: the subset that was written.
    """

    summary: Summary
    tokens: Sequence[Token] = field(repr=False)
    where: str
    plots: Sequence[Path] = ()
    balanced: Balanced | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pair, as JSON can hold it."""
        more = {"plots": [str(path) for path in self.plots], "balanced": self.balanced and self.balanced.to_dict()}
        return self.summary.to_dict() | more


@interface
def data(
    source: Place | Sequence[Place],
    *,
    model: Place,
    max_length: int | None = None,
    row: int | None = None,
    plot: Place | None = None,
    balance: Place | None = None,
    settings: Settings | None = None,
) -> DataReport:
    """What a model would really see of some pairs.

    Args:
        source: names on the Hub, files or folders.
        model: whose tokenizer and template to use.
        max_length: tokens of prompt plus response.
        row: the pair to take apart, from 1; the first usable one if not given.
        plot: a folder for figures as PNG files.
        balance: a new file for a subset whose labels prefer neither length.
        settings: any other key of a recipe, `{"data.columns.prompt": "question"}`.

    Raises:
        DataError, ModelError, UsageError, HubError: pairs or tokenizer cannot be found or used.
    """
    from sampo_cli import plan as plans
    from sampo_cli.balance import check_target, write_balanced
    from sampo_cli.console import run_view
    from sampo_cli.data_report import summarise
    from sampo_cli.disk import expanded
    from sampo_cli.options import recipe_tree
    from sampo_cli.plots import check_plots

    flags = {"model": text(model), "data": texts(source), "max_length": max_length}
    tree = recipe_tree(None, flags, settings)
    target, folder = balance and expanded(balance), plot and expanded(plot)
    if target:
        check_target(target)
    if folder:
        check_plots(folder)
    with run_view(quiet=True) as view:
        plan = plans.make_plan(plans.resolve_recipe(tree), view)
    recipe = plan.recipe
    tokens, where = plans.inspect_pair(plan, row)
    summary = summarise(plan.dataset)
    pictures = _draw(plan.dataset, summary, folder) if folder else []
    written = write_balanced(plan.dataset, target, recipe.train.seed, recipe.data.columns) if target else None
    return DataReport(summary, tokens, where, pictures, written)


def _draw(dataset: PairDataset, summary: Summary, folder: Path) -> list[Path]:
    """The figures of `plot`. Returns the files."""
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


@interface
def methods(name: str | None = None) -> list[Method]:
    """The methods that `train` knows, or the one of that name.

    Raises:
        UsageError: there is none of that name.
    """
    from sampo_cli.method_table import METHODS, find

    return [find(name)] if name else list(METHODS.values())


@interface
def recipes(name: str | None = None, *, copy: Place | None = None) -> list[Shipped]:
    """The recipes that ship, those for a card such as `16gb`, or the one of that name.

    Args:
        copy: write that one to this new `.yaml` file, or into this folder; what was written is in `copied`.

    Raises:
        UsageError: there is none of that name, or it cannot be written there.
        SampoError: the disk is full.
    """
    from sampo_cli.disk import expanded
    from sampo_cli.recipe_files import copy_recipe, describe, shipped_recipes

    names = [other for other in shipped_recipes() if not name or other.startswith(f"{name}/")] or [str(name)]
    if copy is None:
        return [describe(other) for other in names]
    if name is None or names != [name]:
        raise UsageError("--copy needs the name of one recipe", hint="`sampo recipes` lists them")
    recipe = describe(name)
    return [replace(recipe, copied=copy_recipe(recipe, expanded(copy)))]


@interface
def runs(folder: Place = "outputs") -> list[dict[str, Any]]:
    """The runs in a folder and below, newest first: method, data, steps, what they reached, state.

    Raises:
        UsageError: there is no such folder.
    """
    from sampo_cli.disk import expanded
    from sampo_cli.run_files import find_runs, headline

    return [headline(run) for run in find_runs(expanded(folder))]


@interface
def report(folders: Place | Sequence[Place], *, output: Place | None = None) -> list[Path]:
    """Draw one page about one or several runs, and its figures. Returns the files, the page first.

    Args:
        folders: of runs, shown over each other.
        output: where to; `report/` in the first run if not given.

    Raises:
        UsageError: not a run's folder, or no package to draw with.
        ModelError: a file of a run is broken.
    """
    from sampo_cli.disk import expanded
    from sampo_cli.plots import check_plots
    from sampo_cli.run_report import write_report

    places = [expanded(folder) for folder in texts(folders) or ()]
    if not places:
        raise UsageError("no run to report on", hint="give the folder of one or more")
    place = expanded(output) if output else places[0] / "report"
    check_plots(place)
    return write_report(places, place)


@interface
def cache_list() -> list[Entry]:
    """Everything in the cache, newest first."""
    from sampo_cli.cache import entries

    return entries()


@interface
def cache_clear(keys: str | Sequence[str] = ()) -> list[Entry]:
    """Delete the entries whose keys begin so, or all. Returns what was deleted.

    Raises:
        UsageError: nothing begins so.
    """
    from sampo_cli.cache import clear

    return clear([keys] if isinstance(keys, str) else keys)


@interface
def doctor(*, offline: bool = False) -> Diagnosis:
    """What this machine has and lacks for a run, each thing tried, with what to do.

    Failures are in what it returns; only the command ends with an exit code.

    Args:
        offline: do not ask the Hub.
    """
    from sampo_cli.diagnosis import diagnose

    return diagnose(offline=offline)
