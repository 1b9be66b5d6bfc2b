"""Everything that can go wrong in a way the user should read, and the exit code it ends with.

Nothing here prints or exits; only `cli.py` does.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """What a `sampo` process returns. Documented in the README; scripts may rely on it."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    DATA = 3
    MODEL = 4
    MEMORY = 5
    NUMERICS = 6
    HUB = 7
    HANGUP = 129
    INTERRUPTED = 130
    TERMINATED = 143


class SampoError(Exception):
    """A failure with a message for the user.

    Args:
        message: what is wrong and where (path, line, row), in a line or two.
        hint: what to do next.
    """

    exit_code = ExitCode.FAILURE

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")  # for tracebacks


class UsageError(SampoError):
    """A flag, a recipe or a folder that cannot be used as asked."""

    exit_code = ExitCode.USAGE


class DataError(SampoError):
    """Pairs that cannot be found, read or used."""

    exit_code = ExitCode.DATA


class ModelError(SampoError):
    """A model, tokenizer or adapter that cannot be found, loaded or used."""

    exit_code = ExitCode.MODEL


class OutOfMemory(SampoError):
    """The device has no room; the hint names what to lower."""

    exit_code = ExitCode.MEMORY


class NumericsError(SampoError):
    """A non-finite loss, a vanished gradient or a reference that is not one."""

    exit_code = ExitCode.NUMERICS


class HubError(SampoError):
    """The Hub or the network said no."""

    exit_code = ExitCode.HUB


class Interrupted(SampoError):
    """The run was asked to stop and has saved itself.

    Args:
        exit_code: 128 plus the signal that asked.
    """

    def __init__(self, message: str, *, hint: str | None = None, exit_code: ExitCode = ExitCode.INTERRUPTED) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


def is_out_of_memory(error: BaseException) -> bool:
    """True for what Python, torch on a CPU, torch on a GPU and the system raise where there is no room."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    texts = ("can't allocate memory", "std::bad_alloc", "could not create a primitive")  # the last is oneDNN's
    return any(text in str(error) for text in texts)


def known_failure(error: BaseException) -> SampoError | None:
    """What an exception of another library means to a user, or None where that is not known."""
    if isinstance(error, SampoError):
        return error
    if is_out_of_memory(error):
        hint = "lower train.tokens_per_microbatch or --max-length; the last checkpoint is usable"
        return OutOfMemory("out of memory", hint=hint)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return SampoError(f"no space left on the disk: {error.filename or error}", hint="free some and --resume")
    if isinstance(error, OSError) and error.filename and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "ask for permission, or name another folder, such as with --output"
        return UsageError(f"{error.filename}: {str(error.strerror).lower()}", hint=hint)
    return None


def shown_failure(error: BaseException) -> SampoError:
    """The error to show for any exception that a command let through."""
    return known_failure(error) or SampoError(
        f"unexpected {type(error).__name__}: {error}", hint="run again with --debug and report the traceback"
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for a misspelt word, or an empty string where nothing is near."""
    close = difflib.get_close_matches(word, list(known), cutoff=0.6)
    if not close:
        return ""
    # difflib finds "simpo" as near to "smapo" as "sampo"; letters that changed places are the likelier slip.
    swapped = (name for name in close if sorted(name) == sorted(word))
    return f"; did you mean '{next(swapped, close[0])}'?"
