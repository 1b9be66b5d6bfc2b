"""Folders that are there whole or not at all, and the checkpoints of a run made of them.

A checkpoint has a seal, `checkpoint.json`, written last: format, step, size and SHA-256 of every file. What was damaged
later, on the disk or by a copy that broke off, is found by it. What the files hold is `state.py`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sampo_cli.disk import flush, writing
from sampo_cli.errors import UsageError

CHECKPOINTS = "checkpoints"
STATE_FILE = "state.pt"
SEAL = "checkpoint.json"
BEST = "best"

FORMAT = 2
"""Of a checkpoint's folder; 1 had no seal."""

LARGEST_SEAL = 2**20


@contextmanager
def whole_folder(target: Path, needed: int = 0) -> Iterator[Path]:
    """A folder to write into; it becomes `target` when the block ends well, and vanishes when it does not.

    Args:
        needed: bytes, to be named where they are not there.

    Raises:
        SampoError: the disk filled up meanwhile, however the library that was writing put it.
    """
    aside, replaced = (target.with_name(f".{target.name}.{end}") for end in ("tmp", "old"))
    tidy(target)
    try:
        with writing(target, needed):
            aside.mkdir(parents=True)
            yield aside
            for path in (*aside.rglob("*"), aside):
                flush(path)
            if target.exists():
                target.rename(replaced)
            aside.rename(target)
            flush(target.parent)
    finally:
        tidy(target)


def tidy(target: Path) -> None:
    """Remove what a process that was killed left of writing the folder `target`.

    Killed between two renames, it left the old folder under another name; that one becomes `target` again.
    """
    aside, replaced = (target.with_name(f".{target.name}.{end}") for end in ("tmp", "old"))
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    for left_over in (aside, replaced):
        shutil.rmtree(left_over, ignore_errors=True)


def tidy_run(run: Path) -> None:
    """The same for everything in a run's folder. No other process may be at work there."""
    for parent in (run, run / CHECKPOINTS, run / "rounds"):
        for left_over in [*parent.glob(".*.tmp"), *parent.glob(".*.old")]:
            if left_over.is_file():
                left_over.unlink()
            else:
                tidy(left_over.with_name(left_over.name[1:].rpartition(".")[0]))


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `facts` (plain values) and what all files of the folder are now; the last thing that is written into it."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in paths
    }
    text = json.dumps({"format": FORMAT, **facts, "files": files}, indent=2)
    (folder / SEAL).write_text(text + "\n", encoding="utf-8")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_seal(folder: Path) -> dict[str, Any]:
    """What `seal` wrote.

    Raises:
        UsageError: there is none, or none that can be read.
    """
    path = folder / SEAL
    try:
        if path.stat().st_size > LARGEST_SEAL:
            raise ValueError("far too large")
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{folder}: no {SEAL}; copied in part, or written by an earlier sampo") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    known = isinstance(found, dict) and found.get("format") == FORMAT
    if not isinstance(found, dict) or "format" not in found or (known and not isinstance(found.get("files"), dict)):
        raise UsageError(f"{path}: not a checkpoint's seal")
    return found


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. One of another format is not looked into."""
    try:
        found = read_seal(folder)
    except UsageError as error:
        return error.message
    if found["format"] != FORMAT:
        return None
    for name, recorded in found["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        size, digest = recorded["bytes"], recorded["sha256"]
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size:,} bytes, and had {size:,} when it was written"
        if _digest(path) != digest:
            return f"{path} is not what was written"
    return None


def step_folder(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step-{step:06d}"


def all_checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, oldest first, damaged ones included."""
    found = (run / CHECKPOINTS).glob("step-*")
    return sorted(folder for folder in found if folder.is_dir() and not folder.is_symlink())


def link_folder(source: Path, target: Path) -> None:
    """A copy of a folder that shares its files' bytes where the file system can; nothing if there is no source."""

    def link(one: str, other: str) -> str:
        try:
            os.link(one, other)
        except OSError:
            shutil.copyfile(one, other)
        return other

    if source.is_dir():
        shutil.copytree(source, target, copy_function=link)


def forget_after(run: Path, found: Path) -> None:
    """Make a run's folder what it was when the checkpoint `found` was written: none newer, its best adapter."""
    for folder in reversed(all_checkpoints(run)):
        if folder.name > found.name:
            _remove(folder)
    if not (found / BEST).is_dir():
        shutil.rmtree(run / BEST, ignore_errors=True)
        return
    with whole_folder(run / BEST) as aside:
        aside.rmdir()
        link_folder(found / BEST, aside)


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep`."""
    for folder in all_checkpoints(run)[:-keep]:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Delete a checkpoint; one that is half deleted has no checkpoint's name."""
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def run_of(path: Path) -> Path:
    """The run's folder that `--resume PATH` means, whether PATH is that or one of its checkpoints."""
    whole = Path(os.path.abspath(path))
    return whole.parent.parent if whole.parent.name == CHECKPOINTS else path


def find(path: Path) -> tuple[Path, Path]:
    """(run, checkpoint) that `--resume PATH` means: a run's newest whole checkpoint, or the one that is named.

    Raises:
        UsageError: there is none, or the one that is named is damaged.
    """
    run = run_of(path)
    if run != path and path.is_dir():
        if problem := damage(path):
            raise UsageError(f"{path} is damaged: {problem}", hint=f"--resume {run} takes the newest that is whole")
        return run, Path(os.path.abspath(path))
    problems = []
    for folder in reversed(all_checkpoints(run)):
        problem = damage(folder)
        if not problem:
            return run, folder
        problems.append(problem)
    if problems:
        raise UsageError(
            f"nothing to resume: no whole checkpoint in {run / CHECKPOINTS}:\n"
            + "\n".join(f"  {problem}" for problem in problems),
            hint="delete the folder and start the run again",
        )
    raise UsageError(
        f"nothing to resume: no checkpoint in {run / CHECKPOINTS}",
        hint="--resume takes a run's folder, or one of its checkpoints/step-… folders",
    )
