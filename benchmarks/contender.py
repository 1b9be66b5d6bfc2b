"""One contender in a process of its own: it loads, says so, and then takes a step whenever the parent says go.

Between steps it sleeps on its pipe and costs nothing. What it sends: ("ready", facts), then a ("step", readings) for
each go, or ("error", text).
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.measure import Meter
from benchmarks.pairs import PairList
from benchmarks.settings import Settings, Variant


@dataclass(frozen=True)
class Work:
    """What a contender gets: the same pairs in the same steps as the others.

    Attributes:
        adapter: a file with the adapter that all start from; whoever finds it missing writes its own there.
        folder: the contender's own, for whatever it writes.
    """

    settings: Settings
    variant: Variant
    pairs: PairList
    order: Sequence[tuple[int, list[int]]]
    adapter: Path
    folder: Path


class Gate:
    """Where a contender waits for its turn, and where everything that it does is measured."""

    def __init__(self, connection: Connection, device: Any) -> None:
        self.connection, self.meter = connection, Meter(device)
        self._settled = 0
        self._prepared: dict[str, dict[str, Any]] = {}

    def settle(self, parameters: Iterable[Any]) -> None:
        """The model is loaded: what counts as memory of training begins here."""
        self._settled = self.meter.settled_bytes(parameters)

    @contextmanager
    def preparing(self, what: str) -> Iterator[None]:
        """Measures what is done once, before the first step."""
        self.meter.start()
        yield
        self._prepared[what] = asdict(self.meter.stop())

    def ready(self, facts: dict[str, Any]) -> None:
        self.connection.send(("ready", facts | {"settled_bytes": self._settled, "prepared": self._prepared}))

    def open(self) -> None:
        """Sleep until the parent says go, then start measuring."""
        self.connection.recv()
        self.meter.start()

    def close(self, loss: float, computed_tokens: int) -> None:
        readings = self.meter.stop()
        self.connection.send(("step", {**asdict(readings), "loss": loss, "computed_tokens": computed_tokens}))

    def end(self) -> None:
        """After the last step, sleep until all are done: what a trainer does at its end is not to cost others time."""
        with suppress(EOFError):
            self.connection.recv()


def compete(kind: str, work: Work, connection: Connection) -> None:
    """The body of a contender's process: `run` of benchmarks/ours.py or opponent.py.

    stdout belongs to the parent's table, so whatever a library prints goes to stderr.
    """
    os.dup2(2, 1)
    os.environ["SAMPO_CACHE"] = str(work.folder / "cache")  # nothing that an earlier run found out
    try:
        import_module(f"benchmarks.{kind}").run(work, connection)
    except Exception:
        connection.send(("error", traceback.format_exc()))


def share_adapter(model: Any, file: Path) -> None:
    """Make every contender start from the same adapter: the first one's."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    if file.is_file():
        found = set_peft_model_state_dict(model, load_file(file))
        if found.unexpected_keys:
            raise RuntimeError(f"the contenders' adapters differ: {found.unexpected_keys[:3]}")
    else:
        save_file({name: weight.contiguous() for name, weight in get_peft_model_state_dict(model).items()}, file)
