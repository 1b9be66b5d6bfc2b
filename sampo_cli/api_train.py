"""Training from Python: `sampo_cli.train`. The command parses, calls it, and prints what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sampo_cli import ranks
from sampo_cli.calls import Place, frees_models, interface, text, texts
from sampo_cli.errors import UsageError
from sampo_cli.joining import joined

if TYPE_CHECKING:
    from sampo_cli.settings import Settings


LISTS = ("data", "report_to")


@dataclass(frozen=True)
class Run:
    """A run that came to its end, or with `dry_run` one that could be.

    Attributes:
        folder: of the run, with `adapter/` and all that the README lists.
        summary: what its `summary.json` says; of a dry run, what would happen and what it needs.
    """

    folder: Path
    summary: dict[str, Any] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Folder and summary, as JSON can hold them."""
        return {"folder": str(self.folder), **self.summary}


@interface
@frees_models
def train(
    recipe: Place | None = None,
    *,
    model: Place | None = None,
    data: Place | Sequence[Place] | None = None,
    method: str | None = None,
    output: Place | None = None,
    adapter: Place | None = None,
    iterations: int | None = None,
    epochs: float | None = None,
    max_steps: int | None = None,
    learning_rate: float | None = None,
    beta: float | None = None,
    batch_pairs: int | None = None,
    max_length: int | None = None,
    lora_r: int | None = None,
    lora_alpha: int | None = None,
    quantization: str | None = None,
    eval_fraction: float | None = None,
    save_every: int | None = None,
    resume: Place | None = None,
    seed: int | None = None,
    report_to: str | Sequence[str] | None = None,
    cache_reference: str | None = None,
    dry_run: bool = False,
    gpu_memory: str | None = None,
    num_processes: int | None = None,
    accelerate_config: Place | None = None,
    settings: Settings | None = None,
    quiet: bool = False,
) -> Run:
    """Train an adapter on preference pairs, as `sampo train` does.

    Progress goes to stderr, in a notebook into the cell. Ctrl-C, or a notebook's interrupt, finishes the step, saves,
    and raises `Interrupted`; `resume` goes on.

    Args:
        recipe: a shipped recipe's name or a YAML file. What is given beside it wins.
        model: base model; a name on the Hub or a folder.
        data: pairs; names on the Hub, files or folders.
        method: a name that `methods()` has; sampo if not given.
        output: the run's new folder.
        adapter: a LoRA adapter to go on from.
        iterations: rounds with a renewed reference.
        epochs: passes over the pairs.
        max_steps: optimizer steps, instead of epochs.
        learning_rate: the peak.
        beta: strength of the reference.
        batch_pairs: pairs per optimizer step.
        max_length: tokens of prompt plus response.
        lora_r: rank of the adapter.
        lora_alpha: scale of the adapter.
        quantization: of the base: nf4, int8 or none.
        eval_fraction: share of pairs held out.
        save_every: steps between checkpoints.
        resume: a run's folder or one of its checkpoints, to go on from.
        seed: of everything random.
        report_to: trackers.
        cache_reference: keep the reference's log-probs on disk: auto, on or off.
        dry_run: say what would happen; load no weights.
        gpu_memory: with `dry_run`, for a card of so much memory, such as "24GB".
        num_processes: processes, one for each GPU; they are started by accelerate's launcher.
        accelerate_config: how they work together: an accelerate config that ships, or a file.
        settings: any other key of a recipe, `{"train.scheduler": "cosine"}`.
        quiet: no progress, only warnings.

    Raises:
        SampoError: of the kind that `sampo train` would end with.
    """
    return _train(locals())


def _train(asked: Mapping[str, Any]) -> Run:
    """Train as the arguments of `train` ask for."""
    from sampo_cli.options import FLAGS, recipe_tree

    if asked["gpu_memory"] and not asked["dry_run"]:
        raise UsageError("--gpu-memory goes with --dry-run", hint="a run uses the device that is here")
    processes, config = asked["num_processes"], text(asked["accelerate_config"])
    if (processes or config) and not asked["dry_run"]:
        from sampo_cli import launch

        if launch.is_wanted(processes, config):
            told = launch.launch(launch.words_of("train", asked), processes, config)
            return Run(Path(told.pop("folder")), told)
    given = {name: _plain(name, asked[name]) for name in FLAGS}
    tree = recipe_tree(text(asked["recipe"]), given, asked["settings"])
    from sampo_cli import plan as plans
    from sampo_cli import run as runs
    from sampo_cli.console import run_view
    from sampo_cli.dry_run import dry_run, parse_memory

    memory = parse_memory(asked["gpu_memory"]) if asked["gpu_memory"] else None
    with joined():
        if asked["resume"]:
            recipe, found = runs.resume(Path(asked["resume"]), tree)
            folder = found.parent.parent
        else:
            recipe, found = plans.resolve_recipe(tree), None
            folder = ranks.from_first(lambda: plans.new_folder(recipe))
        with run_view(quiet=asked["quiet"]) as view:
            if asked["dry_run"]:
                together = processes or ranks.count()
                return Run(folder, ranks.from_first(lambda: dry_run(recipe, view, folder, memory, together)))
            run = Run(folder, runs.train(recipe, view, folder, found))
        if ranks.is_first():
            ranks.tell_launcher(run.to_dict())
    return run


def _plain(name: str, value: Any) -> Any:
    """An argument as a recipe has it: lists of text, text."""
    if name in LISTS:
        return texts(value)
    return str(value) if isinstance(value, Path) else value
