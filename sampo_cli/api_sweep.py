"""Sweeps from Python: `sampo_cli.sweep`. The command parses, calls it, and prints what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sampo_cli.calls import Place, interface, text, texts


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep.

    Attributes:
        metric: what they are compared by, on held-out pairs: `output.best_metric`.
        runs: of this call and earlier ones, the best first: name, folder, settings, state, exit code, what it reached.
        unfinished: those of this call that are not finished, by name with their state.
        report: the page about all of them, if it was drawn.
        commands: what is still to be run, a command line each.
        notes: what to mind when comparing.
    """

    folder: Path
    metric: str
    runs: list[dict[str, Any]] = field(repr=False)
    unfinished: Mapping[str, str] = field(default_factory=dict)
    report: Path | None = None
    commands: Sequence[str] = ()
    notes: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        report = self.report and str(self.report)
        return {**vars(self), "folder": str(self.folder), "report": report, "commands": list(self.commands)}


@interface
def sweep(
    recipe: Place | None = None,
    *,
    settings: Mapping[str, Any] | Sequence[str] | None = None,
    model: Place | None = None,
    data: Place | Sequence[Place] | None = None,
    method: str | None = None,
    output: Place | None = None,
    print_commands: bool = False,
    retry_failed: bool = False,
    quiet: bool = False,
) -> Sweep:
    """Train once for each combination of values, in turn, and compare.

    Each run is a process and has a folder of its own in the sweep's. The same call goes on where an earlier one
    stopped: what is finished stays, what was interrupted is resumed, and values may be added.

    Args:
        recipe: what the runs share; a shipped recipe's name or a YAML file.
        settings: what varies and what is fixed, `{"method.beta": [0.05, 0.1], "train.epochs": 1}`.
        model: base model; a name on the Hub or a folder.
        data: pairs; names on the Hub, files or folders.
        method: a name that `methods()` has.
        output: the sweep's folder.
        print_commands: start nothing; `commands` of the result has what is to be run.
        retry_failed: run again what failed.
        quiet: no progress, only warnings.

    Raises:
        Interrupted: a signal asked for an end; the run that went has saved itself.
        SampoError: a recipe with problems, or a folder that cannot be used. Runs that fail are in the result.
    """
    from sampo_cli.console import run_view
    from sampo_cli.disk import expanded
    from sampo_cli.lock import held
    from sampo_cli.options import recipe_tree
    from sampo_cli.plan import check_trackers, folder_of, resolve_recipe
    from sampo_cli.sweep_plan import check_folder, plan_runs, read_axes, write_plan
    from sampo_cli.sweep_runs import command_of, commands_to_run, run_all

    axes = read_axes(settings or {})
    flags = {"model": text(model), "data": texts(data), "method": method}
    tree = recipe_tree(text(recipe), flags, {key: values[0] for key, values in axes.items()})
    first = resolve_recipe(tree)
    check_trackers(first)
    place = expanded(text(output) or first.output.dir or folder_of(first, "sweep-{model}-{data}"))
    place = place.absolute() if print_commands else place  # a scheduler starts them anywhere
    check_folder(place)
    shared, runs = plan_runs(tree, axes, place)
    place.mkdir(parents=True, exist_ok=True)
    with held(place), run_view(quiet=quiet) as view:
        plan = write_plan(place, shared, list(runs[0].settings), runs)
        todo = commands_to_run(runs, plan, retry_failed=retry_failed)
        if not print_commands:
            run_all(place, plan, todo, view.note, quiet=quiet)
    commands = [command_of(words) for words in todo.values()] if print_commands else []
    return _compared(place, plan, [run.name for run in runs], first.output.best_metric, commands)


def _compared(
    folder: Path, plan: Mapping[str, Any], asked: Sequence[str], metric: str, commands: Sequence[str]
) -> Sweep:
    """All runs of the plan as they are now; a page about them if nothing is left to somebody else."""
    from sampo_cli.sweep_compare import caveats, draw, outcome_of, ranked

    known = plan["runs"].items()
    outcomes = [outcome_of(folder / name, run["settings"], run["exit_code"]) for name, run in known]
    outcomes = ranked(outcomes, metric)
    states = {one["name"]: one["state"] for one in outcomes if one["name"] in asked and one["state"] != "finished"}
    report = None if commands else draw(folder, outcomes)
    return Sweep(folder, metric, outcomes, states, report, commands, caveats(plan["keys"], metric))
