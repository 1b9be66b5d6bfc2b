"""The live view in a notebook: one output of the cell, drawn anew as the run goes on.

Rich's own live display needs ipywidgets there, and draws from a thread, whose output ends up in another cell.
"""

from __future__ import annotations

import html
import io
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

from sampo_cli.live_view import MOST_COLUMNS, LiveView

LEAST_SECONDS = 0.25
"""Between two drawings."""

FONT = "margin: 0 0 0.6em; line-height: 1.3; font-family: Menlo, 'DejaVu Sans Mono', Consolas, monospace;"
NOTES = "display: flex; flex-direction: column-reverse; max-height: 14em; overflow-y: auto;"
"""The newest notes are in sight, the others can be scrolled to."""


class Cell:
    """The output of a notebook's cell: numbers and curves, and what was said.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._notes: list[str] = []
        self._shown: LiveView | None = None
        self._output: Any = None
        self._drawn = float("-inf")

    def start(self, shown: LiveView) -> None:
        self._shown = shown
        self._draw()

    def changed(self) -> None:
        if self._clock() - self._drawn >= LEAST_SECONDS:
            self._draw()

    def note(self, text: str) -> None:
        self._notes.append(text)
        self._draw()

    def stop(self) -> None:
        """What is there stays, as it was at the end."""
        if self._shown:
            self._draw()

    def _draw(self) -> None:
        from IPython.display import display

        self._drawn = self._clock()
        if self._output is None:
            self._output = display(self._content(), raw=True, display_id=True)
        else:
            self._output.update(self._content(), raw=True)

    def _content(self) -> dict[str, str]:
        """By media type: for notebooks, and for what shows text only."""
        notes = "\n".join(self._notes)
        page = f'<div style="{NOTES}"><pre style="{FONT} white-space: pre-wrap;">{html.escape(notes)}</pre></div>'
        if self._shown:
            curves, plain = _rendered(self._shown)
            page = f'<pre style="{FONT} white-space: pre; overflow-x: auto;">{curves}</pre>{page}'
            notes = plain + notes
        return {"text/html": page, "text/plain": notes}


def _rendered(shown: LiveView) -> tuple[str, str]:
    """The view as HTML and as text."""
    console = Console(file=io.StringIO(), record=True, width=MOST_COLUMNS + 1, force_jupyter=False, force_terminal=True)
    console.print(shown)
    return console.export_html(code_format="{code}", inline_styles=True, clear=False), console.export_text()
