"""Folders that are there whole or not at all, and the checkpoints of a run made of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sampo_cli.errors import SampoError, UsageError

CHECKPOINTS = "checkpoints"
STATE_FILE = "state.pt"
BEST = "best"

FULL_BYTES = 2**20
"""A disk with less than this left is taken to be the reason why a write failed."""


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into; it becomes `target` when the block ends well, and vanishes when it does not.

    Raises:
        SampoError: the disk filled up meanwhile, however the library that was writing put it.
    """
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        _flush(aside)
        replaced = target.with_name(f".{target.name}.old")
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            target.rename(replaced)
        aside.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    except Exception as error:
        if shutil.disk_usage(target.parent).free < FULL_BYTES:
            raise SampoError(
                f"no space left on the disk of {target.parent} while writing {target.name}",
                hint="make room; everything that was there before is untouched",
            ) from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def step_folder(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step-{step:06d}"


def all_checkpoints(run: Path) -> list[Path]:
    """A run's whole checkpoints, oldest first."""
    return sorted(folder for folder in (run / CHECKPOINTS).glob("step-*") if (folder / STATE_FILE).is_file())


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
    for folder in all_checkpoints(run):
        if folder.name > found.name:
            shutil.rmtree(folder)
    shutil.rmtree(run / BEST, ignore_errors=True)
    link_folder(found / BEST, run / BEST)


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep`."""
    for folder in all_checkpoints(run)[:-keep]:
        shutil.rmtree(folder)


def find(path: Path) -> tuple[Path, Path]:
    """(run, checkpoint) that `--resume PATH` means: a run's newest checkpoint, or the one that is named.

    Raises:
        UsageError: there is none.
    """
    if (path / STATE_FILE).is_file():
        return path.parent.parent, path
    found = all_checkpoints(path)
    if not found:
        raise UsageError(
            f"nothing to resume: no checkpoint in {path / CHECKPOINTS}",
            hint="--resume takes a run's folder, or one of its checkpoints/step-… folders",
        )
    return path, found[-1]
