"""`metrics.jsonl` and files like it: rows with a step, one JSON object a line, appended and read back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sampo_cli.disk import write_text, writing

Row = dict[str, Any]


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row; each row is one write, so a reader never sees half of two.

    Raises:
        SampoError: the disk is full; of this row nothing is there.
    """
    line = (json.dumps(row) + "\n").encode()
    with writing(path, len(line)), path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            written = file.write(line)
            while written < len(line):  # a full disk takes what still fits, and says so at the next write
                written += file.write(line[written:])
        except OSError:
            file.truncate(before)
            raise


def read(path: Path) -> list[Row]:
    """All whole rows; a last line that was cut off by a crash is left out, and what follows a damaged one too."""
    if not path.is_file():
        return []
    rows: list[Row] = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or "step" not in row:
            break
        rows.append(row)
    return rows


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by name; of an object inside it `outer.inner`, of a list of objects by their `name`."""
    found: dict[str, float] = {}
    for key, given in row.items():
        value = {item["name"].replace(" ", "_"): item for item in given} if isinstance(given, list) else given
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": number for inner, number in numbers(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[key] = value
    return found


def keep(path: Path, belongs: Callable[[Row], bool]) -> list[Row]:
    """Drop the rows that do not belong to a run any more, as it will take those steps again; returns the others."""
    kept = [row for row in read(path) if belongs(row)]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept
