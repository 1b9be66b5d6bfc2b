"""The processes of a run: which one this is, and what they tell each other.

A run of one process is the usual case: nothing is connected then, and every function here answers at once. Who starts
the processes is somebody else's business (`launch.py`, `accelerate launch`, `torchrun`): what they leave in the
environment is enough. How the processes find each other and how they end is `joining.py`'s.

All functions but `rank`, `count` and their like are collective: every process of the run calls them in the same order.
What may take long on one side goes through the launcher's key-value store, which has no time limit; numbers go through
gloo, gradients through whatever the devices have.
"""

from __future__ import annotations

import json
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

FAILURE = "sampo/failure"
"""The store's key for who failed first, and with which exit code."""

LAUNCHED = "SAMPO_LAUNCHED"
"""Set for processes that sampo itself has started: a file, for what became of them. Who started them says it."""


class Ranks:
    """This process among those of its run.

    Attributes:
        store: what the launcher keeps for them, or None where there is one process.
        talk: a gloo group, for what is not on a device.
        done: set once this process is at the end of what all do together, or leaves because another failed.
        sharing: what the launcher asked to share a model out with, once that is taken over from accelerate.
        last_words: see `on_loss`.
    """

    def __init__(self) -> None:
        self.rank, self.count, self.on_machine = 0, 1, 0
        self.done = threading.Event()
        self.store: Any = None
        self.talk: Any = None
        self.sharing: str | None = None
        self.last_words: Callable[[], object] = lambda: None
        self._asked = 0

    def next_key(self, what: str) -> str:
        """All processes ask in the same order, so the same question has the same number everywhere."""
        self._asked += 1
        return f"sampo/{what}/{self._asked}"

    def until(self, key: str) -> None:
        """Wait for a key of the store, for ever or until another process has failed."""
        pause = 0.002
        while not self.store.check([key]):
            failed = self.failed(self.store)
            if failed and failed[0] != self.rank:
                raise SystemExit(failed[1])
            time.sleep(pause)
            pause = min(2 * pause, 0.2)

    def failed(self, store: Any) -> tuple[int, int] | None:
        """Rank and exit code of the process that failed first, if one has."""
        if not store.check([FAILURE]):
            return None
        number, code = store.get(FAILURE).decode().split()
        return int(number), int(code)


HERE = Ranks()


def rank() -> int:
    return HERE.rank


def count() -> int:
    return HERE.count


def is_first() -> bool:
    """True in the one process that writes the run's folder and speaks."""
    return HERE.rank == 0


def is_first_on_machine() -> bool:
    """True in the one process of each machine that writes what is kept there."""
    return HERE.on_machine == 0


def on_loss(last_words: Callable[[], object]) -> None:
    """What to do before this process is ended because another has failed, should it not end by itself."""
    HERE.last_words = last_words


def wait() -> None:
    """Until every process is here, however long that takes."""
    if HERE.count > 1:
        key = HERE.next_key("here")
        if HERE.store.add(key, 1) == HERE.count:
            HERE.store.set(f"{key}/all", "")
        HERE.until(f"{key}/all")


def from_first(work: Callable[[], T]) -> T:
    """What `work` gives in the first process; the others wait for it, however long that takes, and do nothing."""
    if HERE.count == 1:
        return work()
    key = HERE.next_key("value")
    if is_first():
        value = work()
        HERE.store.set(key, pickle.dumps(value))
        return value
    HERE.until(key)
    return pickle.loads(HERE.store.get(key))  # noqa: S301 (written by our own first process)


@contextmanager
def first_on_machine() -> Iterator[None]:
    """The first process of each machine goes through the block before the others there, which find what it kept."""
    if HERE.count == 1:
        yield
        return
    key = f"{HERE.next_key('done')}/{HERE.rank - HERE.on_machine}"
    if not is_first_on_machine():
        HERE.until(key)
    yield
    if is_first_on_machine():
        HERE.store.set(key, "")


def gather(value: T) -> list[T]:
    """The value of every process, by rank."""
    if HERE.count == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * HERE.count
    dist.all_gather_object(found, value, group=HERE.talk)
    return found


def add_gradients(parameters: Sequence[Any]) -> None:
    """Give every process the sum of all processes' gradients: one transfer, in float32; no gradient counts as 0."""
    if HERE.count == 1:
        return
    import torch
    import torch.distributed as dist

    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
    dist.all_reduce(total)
    parts = total.split([gradient.numel() for gradient in gradients])
    for parameter, gradient, part in zip(parameters, gradients, parts, strict=True):
        parameter.grad = gradient.copy_(part.view_as(gradient))


def shares_out() -> str | None:
    """What the launcher asks to share a model out with, as accelerate names it, or None."""
    kinds = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
    asked = (kind for kind in kinds if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true")
    return HERE.sharing or next(asked, None)


def started_by_launcher() -> bool:
    """True where this process is one of several, or one that shares its model out."""
    return "LOCAL_RANK" in os.environ and (int(os.environ.get("WORLD_SIZE", "1")) > 1 or shares_out() is not None)


def speaks() -> bool:
    """True in the process that shows what came out."""
    return is_first() and LAUNCHED not in os.environ


def tell_launcher(document: Mapping[str, Any]) -> None:
    """Leave what became of the run to the sampo that has started this process, if one has."""
    if LAUNCHED in os.environ:
        Path(os.environ[LAUNCHED]).write_text(json.dumps(document), encoding="utf-8")


def hears_twice() -> bool:
    """True where a launcher may pass on a signal that the terminal has sent to this process as well."""
    return HERE.count > 1 and LAUNCHED not in os.environ


def beside_another() -> bool:
    """True where a launcher has started this process and another one that is the first."""
    return started_by_launcher() and os.environ.get("RANK", "0") != "0"
