"""What a test run found out about a promise, for the table of docs/reliability.md.

With SAMPO_RELIABILITY naming a file, `record` appends a line of JSON to it; without, it does nothing. Lines are
written whole, so tests may run side by side.
"""

from __future__ import annotations

import json
import os


def record(promise: str, test: str, result: str) -> None:
    """Note that `test` found `result` (counts, in words) for `promise` (as the table states it)."""
    path = os.environ.get("SAMPO_RELIABILITY")
    if path:
        line = json.dumps({"promise": promise, "test": test, "result": result}, ensure_ascii=False) + "\n"
        with open(path, "ab", buffering=0) as file:
            file.write(line.encode())
