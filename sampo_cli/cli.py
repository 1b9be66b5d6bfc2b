"""The commands: parse, call one function, turn a `SampoError` into a panel and an exit code.

Only this module exits. What a command needs is imported inside it, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer

from sampo_cli import __version__, console
from sampo_cli.errors import ExitCode, OutOfMemory, SampoError

app = typer.Typer(
    name="sampo",
    help="Preference-tune a chat model with SamPO on one GPU, without making it verbose.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MODEL, DATA, TRAINING, RUN = "Model", "Data", "Training", "Run"
# Where a flag of `train` goes in the recipe.
FLAGS = {
    "model": "model.name",
    "adapter": "model.adapter",
    "quantization": "model.quantization",
    "data": "data.sources",
    "max_length": "data.max_length",
    "eval_fraction": "data.eval_fraction",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "method": "method.name",
    "beta": "method.beta",
    "epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "learning_rate": "train.learning_rate",
    "batch_pairs": "train.batch_pairs",
    "save_every": "train.save_every",
    "seed": "train.seed",
    "output": "output.dir",
    "report_to": "output.report_to",
    "iterations": "iterations.count",
}


def _option(name: str, text: str, panel: str, metavar: str | None = None) -> Any:
    return typer.Option(name, help=text, rich_help_panel=panel, metavar=metavar)


Set = Annotated[
    Optional[list[str]],
    _option("--set", "Any other key of a recipe; repeatable.", RUN, "SECTION.KEY=VALUE"),
]
Quiet = Annotated[bool, _option("--quiet", "Only warnings and errors.", RUN)]
Json = Annotated[bool, _option("--json", "The result as JSON on stdout.", RUN)]
Debug = Annotated[bool, _option("--debug", "Show the traceback of an error.", RUN)]


def _tree(recipe: str | None, flags: dict[str, Any], settings: Sequence[str] | None) -> dict[str, Any]:
    """The recipe file, overwritten by the flags that were given, overwritten by --set."""
    from sampo_cli.config import apply_settings, put
    from sampo_cli.recipes import load_recipe

    tree = load_recipe(recipe) if recipe else {}
    for flag, value in flags.items():
        if value is not None:
            section, key = FLAGS[flag].split(".")
            put(tree, section, key, value)
    if flags.get("epochs") is not None and flags.get("max_steps") is None:
        put(tree, "train", "max_steps", None)
    apply_settings(tree, settings or [])
    return tree


@app.command()
def train(
    recipe: Annotated[Optional[str], _option("--recipe", "A shipped recipe or a YAML file.", RUN, "NAME|PATH")] = None,
    model: Annotated[Optional[str], _option("--model", "Base model: a Hub name or a folder.", MODEL)] = None,
    data: Annotated[Optional[list[str]], _option("--data", "Pairs: Hub name, file, folder; repeatable.", DATA)] = None,
    method: Annotated[
        Optional[str], _option("--method", "One of `sampo methods`; sampo if not given.", TRAINING)
    ] = None,
    output: Annotated[Optional[str], _option("--output", "The run's folder.", RUN, "DIR")] = None,
    adapter: Annotated[Optional[str], _option("--adapter", "Go on from this LoRA adapter.", MODEL)] = None,
    iterations: Annotated[Optional[int], _option("--iterations", "Rounds with a renewed reference.", TRAINING)] = None,
    epochs: Annotated[Optional[float], _option("--epochs", "Passes over the pairs.", TRAINING)] = None,
    max_steps: Annotated[Optional[int], _option("--max-steps", "Optimizer steps, instead of epochs.", TRAINING)] = None,
    learning_rate: Annotated[Optional[float], _option("--learning-rate", "Peak learning rate.", TRAINING)] = None,
    beta: Annotated[Optional[float], _option("--beta", "Strength of the reference.", TRAINING)] = None,
    batch_pairs: Annotated[Optional[int], _option("--batch-pairs", "Pairs per optimizer step.", TRAINING)] = None,
    max_length: Annotated[Optional[int], _option("--max-length", "Tokens of prompt plus response.", DATA)] = None,
    lora_r: Annotated[Optional[int], _option("--lora-r", "Rank of the adapter.", MODEL)] = None,
    lora_alpha: Annotated[Optional[int], _option("--lora-alpha", "Scale of the adapter.", MODEL)] = None,
    quantization: Annotated[Optional[str], _option("--quantization", "Of the base.", MODEL, "nf4|int8|none")] = None,
    eval_fraction: Annotated[Optional[float], _option("--eval-fraction", "Share of pairs held out.", DATA)] = None,
    save_every: Annotated[Optional[int], _option("--save-every", "Steps between checkpoints.", RUN)] = None,
    resume: Annotated[Optional[Path], _option("--resume", "Go on with a run or from its checkpoint.", RUN)] = None,
    seed: Annotated[Optional[int], _option("--seed", "Of everything random.", TRAINING)] = None,
    report_to: Annotated[
        Optional[list[str]], _option("--report-to", "tensorboard, wandb; repeatable.", RUN, "TRACKER")
    ] = None,
    dry_run: Annotated[bool, _option("--dry-run", "Say what would happen; load no weights.", RUN)] = False,
    settings: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train an adapter on preference pairs.

    sampo train --model meta-llama/Meta-Llama-3-8B-Instruct --data Intel/orca_dpo_pairs --method sampo
    """
    given = {name: value for name, value in locals().items() if name in FLAGS}
    tree = _tree(recipe, given, settings)
    from sampo_cli import plan as plans
    from sampo_cli import run as runs

    if resume:
        the_recipe, found = runs.resume(resume, tree)
        folder = found.parent.parent
    else:
        the_recipe, found = plans.resolve_recipe(tree), None
        folder = plans.new_folder(the_recipe)
    with console.run_view(quiet=quiet) as view:
        result = plans.dry_run(the_recipe, view, folder) if dry_run else runs.train(the_recipe, view, folder, found)
    if as_json:
        console.print_json(result)
    elif dry_run:
        console.print_facts("dry run", result)
    elif not quiet:
        console.print_summary(result, folder)


@app.command("data")
def show_data(
    source: Annotated[list[str], typer.Argument(help="Hub names, files or folders.")],
    model: Annotated[str, _option("--model", "Whose tokenizer and template to use.", DATA)],
    max_length: Annotated[Optional[int], _option("--max-length", "Tokens of prompt plus response.", DATA)] = None,
    row: Annotated[
        Optional[int], _option("--row", "The row to show token by token, from 1; the first usable otherwise.", DATA)
    ] = None,
    settings: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a model would really see of some pairs: counts, lengths, one pair token by token."""
    tree = _tree(None, {"model": model, "data": source, "max_length": max_length}, settings)
    from sampo_cli import plan as plans
    from sampo_cli.data_report import summarise
    from sampo_cli.tables import print_data_report

    with console.run_view(quiet=True) as view:
        plan = plans.make_plan(plans.resolve_recipe(tree), view)
    summary = summarise(plan.dataset)
    if as_json:
        console.print_json(summary.to_dict())
    elif not quiet:
        print_data_report(summary, *plans.inspect_pair(plan, row))


@app.command()
def merge(
    source: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="A run's folder or an adapter's.")],
    base: Annotated[Optional[str], _option("--base", "The 16-bit base, if not the recorded one.", RUN)] = None,
    output: Annotated[Optional[Path], _option("--output", "Default: RUN/merged.", RUN, "DIR")] = None,
    dtype: Annotated[str, _option("--dtype", "bfloat16, float16 or float32.", RUN)] = "bfloat16",
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into its 16-bit base: a plain model for vLLM, llama.cpp, transformers."""
    from sampo_cli.merge import merge as merge_adapter

    result = merge_adapter(source, base=base, output=output, dtype=dtype)
    if as_json:
        console.print_json(result.to_dict())
    elif not quiet:
        console.print_facts("merged", result.facts())


@app.command()
def methods(
    name: Annotated[Optional[str], typer.Argument(help="Show one method with its citation.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the methods that `train` knows: formula, reference, reduction, defaults, paper."""
    from sampo_cli.methods import METHODS, find
    from sampo_cli.tables import print_method, print_methods

    chosen = [find(name)] if name else list(METHODS.values())
    if as_json:
        console.print_json([method.to_dict() for method in chosen])
    elif name:
        print_method(chosen[0])
    else:
        print_methods(chosen)


@app.command("push-to-hub")
def push_to_hub(
    source: Annotated[Path, typer.Argument(metavar="RUN|DIR", help="A run, an adapter or a merged model.")],
    repo: Annotated[str, _option("--repo", "Where to: user/name.", RUN)],
    merged: Annotated[bool, _option("--merged", "The run's merged model instead of its adapter.", RUN)] = False,
    public: Annotated[bool, _option("--public", "Visible to everybody; private otherwise.", RUN)] = False,
    dry_run: Annotated[bool, _option("--dry-run", "List the files and show the card; send nothing.", RUN)] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Publish an adapter or a merged model with a card made from the run."""
    from sampo_cli import hub

    the_plan = hub.plan(source, repo=repo, merged=merged, public=public)
    result = the_plan if dry_run else hub.push(the_plan)
    if as_json:
        console.print_json(result.to_dict())
    elif dry_run:
        from sampo_cli.tables import print_push_plan

        print_push_plan(the_plan)
    elif not quiet:
        console.print_facts("published", result.to_dict())


def _version(value: bool) -> None:
    if value:
        typer.echo(f"sampo {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Preference-tune a chat model with SamPO on one GPU, without making it verbose."""


def _known_failure(error: BaseException) -> SampoError:
    """The error to show for any exception that a command let through."""
    if isinstance(error, SampoError):
        return error
    no_room = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
    if no_room or type(error).__name__ == "OutOfMemoryError":
        hint = "lower train.tokens_per_microbatch or --max-length; the last checkpoint is usable"
        return OutOfMemory("out of memory", hint=hint)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return SampoError(f"no space left on the disk: {error.filename or error}", hint="free some and --resume")
    return SampoError(
        f"unexpected {type(error).__name__}: {error}", hint="run again with --debug and report the traceback"
    )


def _tame_libraries(*, debug: bool, bars: bool) -> None:
    """Their warnings only with --debug, their progress bars only on a terminal. Before any of them is imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    words = sys.argv[1:] if args is None else list(args)
    _tame_libraries(debug="--debug" in words, bars=sys.stderr.isatty() and "--quiet" not in words)
    try:
        app(words)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        failure = _known_failure(error)
        console.show_error(failure)
        sys.exit(failure.exit_code)
    sys.exit(ExitCode.OK)
