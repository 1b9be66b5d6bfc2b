"""What is printed while and after something runs: lines, panels, the live view. stdout is data, stderr is talk."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel

from sampo_cli import ranks
from sampo_cli.errors import Interrupted, SampoError
from sampo_cli.live_view import LiveView
from sampo_cli.metrics import read
from sampo_cli.notebook import Cell


class _Talk(Console):
    """Talk never ends a run: where nobody listens any more (a closed terminal, a pipe to `head`), it goes nowhere."""

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # or Python's own last flush fails at the exit


stderr = _Talk(stderr=True, highlight=False)
stdout = Console(highlight=False)


def say(text: str) -> None:
    """A line of talk, never broken and never read as markup."""
    stderr.print(text, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_raw(text: str) -> None:
    """Text on stdout as it is: a file's content, lines for another program."""
    sys.stdout.write(text)


def show_error(error: SampoError) -> None:
    """What is wrong and what to do next: a panel on a terminal, lines elsewhere."""
    title, style = ("stopped", "yellow") if isinstance(error, Interrupted) else ("error", "red")
    if stderr.is_terminal:
        hint = f"\n[dim]{escape(error.hint)}[/dim]" if error.hint else ""
        stderr.print(Panel(escape(error.message) + hint, title=title, title_align="left", border_style=style))
        return
    say(f"{title}: {error.message}")
    if error.hint:
        say(f"hint: {error.hint}")


def print_facts(title: str, facts: Mapping[str, Any], console: Console = stdout) -> None:
    """A handful of facts, a line each; long ones are not broken, so that paths and commands can be copied."""
    console.print(title, style="bold", markup=False)
    width = max(map(len, facts))
    for key, value in facts.items():
        console.print(f"  [dim]{escape(key):<{width}}[/dim]  {escape(str(value))}", soft_wrap=True)


def train_line(row: Mapping[str, Any], steps: int) -> str:
    norm = "skipped" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"
    return (
        f"step {row['step']}/{steps}  loss {row['loss']:.4f}  margin {row['margin']:+.3f}  "
        f"accuracy {row['accuracy']:.2f}  kept {row['kept_tokens']}/{row['response_tokens']} tokens  "
        f"lr {row['learning_rate']:.2e}  grad {norm}  {row['tokens_per_second']:,.0f} tokens/s"
    )


def eval_line(row: Mapping[str, Any]) -> str:
    biases = [(row[key] or {}).get("spearman") for key in ("length_bias", "sum_length_bias")]
    said = ["none" if bias is None else f"{bias:+.2f}" for bias in biases]
    kl = "" if row["kl_per_token"] is None else f"KL (estimated) {row['kl_per_token']:.4f} a token  "
    return (
        f"evaluation after step {row['step']}: loss {row['loss']:.4f}  margin {row['margin']:+.3f}  "
        f"accuracy {row['accuracy']:.2f}  length bias {said[0]} (DPO's sum {said[1]})  {kl}"
        f"({row['pairs']} held-out pairs)"
    )


def generate_line(row: Mapping[str, Any]) -> str:
    return (
        f"answers after step {row['step']}: {row['tokens']:.0f} tokens, the base's {row['base_tokens']:.0f} "
        f"(ratio {row['length_ratio']:.2f})  ended {row['ended']:.0%}  repetition {row['repetition']:.0%}  "
        f"({row['prompts']} prompts)"
    )


class Screen(Protocol):
    """Where a live view is shown, and what is said beside it."""

    def start(self, shown: LiveView) -> None: ...
    def changed(self) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


class Terminal:
    """The live view at the bottom of a terminal, drawn anew several times a second; notes scroll past above it."""

    def __init__(self) -> None:
        self.live: Live | None = None

    def start(self, shown: LiveView) -> None:
        self.live = Live(shown, console=stderr, transient=True)
        self.live.start()

    def changed(self) -> None:
        """It is drawn anew anyway."""

    def note(self, text: str) -> None:
        say(text)

    def stop(self) -> None:
        if self.live:
            self.live.stop()


class RunView:
    """Progress of a training run, on stderr and in the run's `run.log`.

    Args:
        quiet: nothing on stderr but warnings; the log is written all the same.
        screen: for a live view instead of a line per step.
    """

    def __init__(self, *, quiet: bool = False, screen: Screen | None = None) -> None:
        self.quiet = quiet
        self.steps = 0
        self._log: BinaryIO | None = None
        self._logs = True
        self._unlogged: list[str] = []
        self._screen = screen
        self._shown = LiveView() if screen and not quiet else None

    def _write(self, line: str) -> None:
        if self._log is None:
            self._unlogged.append(line) if self._logs else None
            return
        try:
            self._log.write((line + "\n").encode("utf-8", "replace"))
        except OSError as error:
            name, self._log, self._logs = self._log.name, None, False
            self.note(f"warning: {name} cannot be written any more: {error.strerror}; the run goes on")

    def note(self, text: str) -> None:
        self._write(text)
        if not self.quiet or text.startswith("warning"):
            (self._screen.note if self._screen else say)(text)

    def begin(self, folder: Path, steps: int, done: int) -> None:
        self.steps = steps
        self._log = (folder / "run.log").open("ab", buffering=0)
        before, self._unlogged = self._unlogged, []
        for line in before:
            self._write(line)
        finished = f"all {steps} steps are done in {folder}"
        self.note(finished if done == steps else f"training {steps - done} steps into {folder}")
        if self._shown and self._screen:
            for row in read(folder / "metrics.jsonl"):
                self._shown.add(row)
            self._shown.begin(steps, done)
            self._screen.start(self._shown)

    def train_row(self, row: Mapping[str, Any]) -> None:
        line = train_line(row, self.steps)
        self._write(line)
        self._show(row)
        if not self._screen and not self.quiet:
            say(line)

    def eval_row(self, row: Mapping[str, Any]) -> None:
        self._show(row)
        self.note(eval_line(row))

    def generate_row(self, row: Mapping[str, Any]) -> None:
        self._show(row)
        self.note(generate_line(row))

    def _show(self, row: Mapping[str, Any]) -> None:
        if self._shown and self._screen:
            self._shown.add(row)
            self._screen.changed()

    def close(self) -> None:
        if self._screen:
            self._screen.stop()
        if self._log:
            self._log.close()


def _screen() -> Screen | None:
    if stderr.is_jupyter:
        return Cell()
    return Terminal() if stderr.is_terminal and not stderr.is_dumb_terminal else None


class NoView:
    """Of a process that has another to speak for it: nothing is said, nothing is logged."""

    def _nothing(self, *about: Any) -> None:
        """There is nobody to tell."""

    note = begin = train_row = eval_row = generate_row = _nothing


@contextmanager
def run_view(*, quiet: bool) -> Iterator[RunView | NoView]:
    """The view that fits where stderr goes: live on a terminal or in a notebook, plain lines otherwise.

    A process that has another to speak for it has none.
    """
    if not ranks.is_first():
        yield NoView()
        return
    view = RunView(quiet=quiet, screen=_screen())
    try:
        yield view
    finally:
        view.close()


def print_summary(summary: Mapping[str, Any], folder: Path) -> None:
    """The end of a run: what was reached and what to do next."""
    evaluation = summary["evaluation"] or {}
    facts = {
        "steps": f"{summary['steps']['done']} in {summary['seconds']:.0f} s",
        **{f"held-out {key}": f"{evaluation[key]:.4f}" for key in ("loss", "accuracy", "margin") if key in evaluation},
        **({"stopped early": summary["stopped_early"]} if summary["stopped_early"] else {}),
        "adapter": f"{folder / 'adapter'} (of step {summary['adapter_step']})",
        "next": f"sampo merge {folder}",
    }
    print_facts("finished", facts, stderr)
