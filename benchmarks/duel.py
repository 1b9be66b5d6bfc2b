"""The parent: starts the contenders, lets them step in turn, and puts what they report together.

A B A B: step k of every contender comes before step k + 1 of any, so that a machine that slows down or speeds up does
so for all of them.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.contender import Work, compete
from benchmarks.pairs import order_of, pairs_of, step_sizes
from benchmarks.settings import Settings, Variant

OPPONENT = "trl"
DPO = Variant("dpo", "dpo")


class ContenderError(Exception):
    """A contender stopped; the text says which one and why."""


@dataclass
class Contender:
    """A contender as the parent sees it. `rows`: what each step took, the warm-up first."""

    name: str
    method: str
    process: Any
    connection: Connection
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def receive(self, kind: str) -> dict[str, Any]:
        """The next message, which must be of `kind`."""
        try:
            found, content = self.connection.recv()
        except EOFError as error:
            self.process.join()
            code = self.process.exitcode
            raise ContenderError(f"{self.name} ended with exit code {code}; -9: the system took its memory") from error
        if found != kind:
            raise ContenderError(f"{self.name} stopped:\n{content}")
        return content

    def step(self) -> dict[str, Any]:
        self.connection.send("go")
        row = self.receive("step")
        self.rows.append(row)
        return row


def run_duel(
    settings: Settings, variants: Sequence[Variant], opponent: str, say: Callable[[str], None]
) -> list[Contender]:
    """Every contender with its rows, trl first where it takes part.

    Raises:
        ContenderError: one of them failed.
        SampoError: see `pairs_of`.
    """
    pairs, order = pairs_of(settings), order_of(settings)
    sizes = [step_sizes([pairs[index] for index in indices]) for _, indices in order]
    plan = [("ours", variant.name, variant) for variant in variants]
    plan += [("opponent", OPPONENT, DPO)] if opponent == OPPONENT else []
    with TemporaryDirectory(prefix="sampo-benchmark-") as name, ExitStack() as stack:
        work_folder = Path(name)
        stack.enter_context(quiet_environment(work_folder))
        contenders: list[Contender] = []
        for kind, title, variant in plan:  # ours first: trl starts from our adapter
            folder = work_folder / str(len(contenders))
            folder.mkdir()
            work = Work(settings, variant, pairs, order, work_folder / "adapter.safetensors", folder)
            say(f"loading {title}")
            contender = _start(kind, title, work)
            stack.callback(_stop, contender)
            contender.facts = contender.receive("ready")
            contenders.append(contender)
        contenders.sort(key=lambda contender: contender.name != OPPONENT)
        for number, size in enumerate(sizes):
            for contender in contenders:
                row = contender.step()
                row |= size | {"timed": number >= settings.warmup_steps}
                what = f"step {number - settings.warmup_steps + 1}" if row["timed"] else "warm-up"
                say(f"{what}: {contender.name} {row['seconds']:.2f} s, loss {row['loss']:.5f}")
    return contenders


@contextmanager
def quiet_environment(folder: Path) -> Iterator[None]:
    """What processes inherit that are started inside: no network, no bars, no cache that an earlier run filled."""
    changes = {
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _start(kind: str, title: str, work: Work) -> Contender:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=compete, args=(kind, work, there), name=title, daemon=True)
    process.start()
    there.close()  # so that its end is seen when it dies
    return Contender(title, work.variant.method, process, here)


def _stop(contender: Contender) -> None:
    contender.connection.close()
    contender.process.join(timeout=5)
    if contender.process.is_alive():
        contender.process.terminate()
        contender.process.join()


def say_on_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
