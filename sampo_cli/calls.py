"""What every function of the Python interface does around its work. The command line calls the same functions."""

from __future__ import annotations

import functools
import gc
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import ParamSpec, TypeVar

from sampo_cli.errors import UsageError, known_failure
from sampo_cli.ranks import beside_another

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

libraries_warn: ContextVar[bool] = ContextVar("libraries_warn", default=False)
"""Whether their warnings are shown, as `--debug` asks for."""

Place = str | Path
"""A file, a folder or a name on the Hub."""


def interface(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A function of the interface: failures that are known are a `SampoError`, libraries are quiet."""

    @functools.wraps(function)
    def called(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            with _tamed():
                return function(*args, **kwargs)
        except Exception as error:
            failure = known_failure(error)
            if failure is None or failure is error:
                raise
            raise failure from error

    return called


def frees_models(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A function that loads models, which are gone when it has returned.

    A notebook calls one after the other in one process: a model that waits for Python's garbage collection would be in
    memory beside the next one.
    """

    @functools.wraps(function)
    def called(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        finally:
            _release()

    return called


@contextmanager
def _tamed() -> Iterator[None]:
    """Inside, libraries do not warn of what only they can change, unless they are to."""
    if libraries_warn.get():
        yield
        return
    logs = [logging.getLogger(name) for name in ("bitsandbytes", "gguf")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    deepspeed = logging.getLogger("DeepSpeed")  # transformers imports it where it is installed, which sets its level
    deepspeed.addFilter(_is_error)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=Warning if beside_another() else FutureWarning)
            warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, in notebooks without widgets
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
        deepspeed.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _release() -> None:
    torch = sys.modules.get("torch")
    if torch is not None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def texts(places: Place | Sequence[Place] | None) -> list[str] | None:
    """One or several, as text; None stays None."""
    if places is None:
        return None
    return [str(place) for place in ([places] if isinstance(places, str | Path) else places)]


def text(place: Place | None) -> str | None:
    return None if place is None else str(place)


def refuse_below(least: float, **numbers: float | None) -> None:
    """Stop where one of some numbers is below `least`.

    Raises:
        UsageError: names the first.
    """
    for name, number in numbers.items():
        if number is not None and number < least:
            raise UsageError(f"{name}={number}: less than {least}")
