"""What a test run found out, for the table of docs/reliability.md (scripts/make_reliability.py).

With SAMPO_RELIABILITY naming a file, each test's outcome and what it counted go there as lines of JSON; without,
nothing does. Lines are written whole, so tests may run side by side.
"""

from __future__ import annotations

import json
import os


def record(result: str) -> None:
    """Note what the test that runs found: counts, in words."""
    _write({"test": os.environ["PYTEST_CURRENT_TEST"].rsplit(" ", 1)[0], "result": result})


def record_outcome(test: str, outcome: str) -> None:
    """Note that a test passed, failed or was skipped. `test`: pytest's id of it."""
    _write({"test": test, "outcome": outcome})


def _write(found: dict[str, str]) -> None:
    path = os.environ.get("SAMPO_RELIABILITY")
    if path:
        with open(path, "ab", buffering=0) as file:
            file.write((json.dumps(found, ensure_ascii=False) + "\n").encode())
