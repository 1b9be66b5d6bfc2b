"""Writes docs/images/live-view.svg: the live view of a run as it was after one of its steps.

    python -m scripts.make_screenshot outputs/my-run --step 24

Nothing in the picture is made up: the rows are the run's metrics.jsonl. Only the clock is, from the steps' seconds.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sampo_cli import metrics
from sampo_cli.console import eval_line, generate_line
from sampo_cli.live_view import LiveView

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "live-view.svg"
COLUMNS = 84
LINES = {"eval": eval_line, "generate": generate_line}


def picture(run: Path, step: int | None) -> str:
    """The terminal as SVG: the log's lines of the newest evaluation and answers, and the view."""
    rows = [row for row in metrics.read(run / "metrics.jsonl") if step is None or row["step"] <= step]
    planned = json.loads((run / "summary.json").read_text(encoding="utf-8"))["steps"]["planned"]
    now = 0.0
    view = LiveView(clock=lambda: now)
    view.begin(planned, 0)
    for row in rows:
        now += row.get("seconds", 0.0)
        view.add(row)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for row in [row for row in rows if row["kind"] in LINES][-2:]:
        console.print(LINES[row["kind"]](row), markup=False, highlight=False)
    console.print(view)
    svg = console.export_svg(title="sampo train", unique_id="live-view")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # they would be fetched from elsewhere


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--step", type=int, help="as it was after this step; the last one if not given")
    parser.add_argument("--output", type=Path, default=PICTURE)
    given = parser.parse_args(arguments)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(picture(given.run, given.step), encoding="utf-8")
    print(f"wrote {given.output}")


if __name__ == "__main__":
    main()
