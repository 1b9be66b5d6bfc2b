"""The command line: which commands there are, and how a `SampoError` becomes a panel and an exit code.

Only this module exits. The commands parse and call one function each; what that needs is imported inside them, so that
`--help` answers at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from sampo_cli import (
    __version__,
    commands_chat,
    commands_data,
    commands_doctor,
    commands_eval,
    commands_recipes,
    commands_report,
    commands_share,
    commands_sweep,
    commands_train,
    console,
)
from sampo_cli.calls import libraries_warn
from sampo_cli.errors import ExitCode, shown_failure
from sampo_cli.ranks import beside_another
from sampo_cli.secrets_scan import mask
from sampo_cli.trust import CONTROL

app = typer.Typer(
    name="sampo",
    help="Preference-tune a chat model with SamPO on one GPU, without making it verbose.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("train")(commands_train.train)
app.command("data")(commands_data.show_data)
app.command("eval")(commands_eval.evaluate)
app.command("chat")(commands_chat.chat)
app.command("merge")(commands_share.merge)
app.command("push-to-hub")(commands_share.push_to_hub)
app.command("methods")(commands_data.methods)
app.command("recipes")(commands_recipes.recipes)
app.command("runs")(commands_report.runs)
app.command("sweep")(commands_sweep.sweep)
app.command("report")(commands_report.report)
app.command("doctor")(commands_doctor.doctor)
app.add_typer(commands_data.cache, name="cache")


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


def _fit_to_show(text: str) -> str:
    """The text without secrets, and without what a terminal obeys: it may quote a file or a server."""
    return "\n".join(CONTROL.sub("�", line) for line in mask(text).split("\n"))


def _tame_libraries(*, debug: bool, bars: bool) -> None:
    """Their warnings only with --debug, their progress bars only on a terminal. Before any of them is imported.

    A process that a launcher has started beside a first one gives no warnings at all: the first gives the same.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    libraries_warn.set(debug)
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    words = sys.argv[1:] if args is None else list(args)
    bars = sys.stderr.isatty() and "--quiet" not in words and not beside_another()
    _tame_libraries(debug="--debug" in words, bars=bars)
    try:
        app(words)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except Exception as error:
        if "--debug" in words:
            sys.stderr.write(_fit_to_show(traceback.format_exc()))
        failure = shown_failure(error)
        failure.message, failure.hint = _fit_to_show(failure.message), failure.hint and _fit_to_show(failure.hint)
        console.show_error(failure)
        sys.exit(failure.exit_code)
    sys.exit(ExitCode.OK)
