"""`metrics.jsonl`: one row per optimizer step and one per evaluation, appended and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row; each row is one write, so a reader never sees half of two."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """All whole rows; a last line that was cut off by a crash is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def forget_after(path: Path, step: int) -> None:
    """Drop the rows after `step`: those of steps that a resumed run will take again."""
    kept = [row for row in read(path) if row["step"] <= step]
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    aside.replace(path)
