"""Writes constraints-oldest.txt: the oldest versions that pyproject.toml allows, and what goes with them.

    pip install uv && python -m scripts.make_oldest

`make test CONSTRAINTS=constraints-oldest.txt` tests them. Where the oldest of a range cannot be had beside those of the
others, raise its lower bound: a test compares.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "constraints-oldest.txt"
HEADER = "# The oldest versions of the ranges in pyproject.toml; written by: python -m scripts.make_oldest\n"


def main() -> None:
    command = ["uv", "pip", "compile", "--quiet", "--resolution", "lowest-direct", "--python-version", "3.11"]
    command += ["--extra", "dev", "--no-annotate", "--no-header", "pyproject.toml"]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    PINS.write_text(HEADER + found, encoding="utf-8")
    print(f"wrote {PINS}")


if __name__ == "__main__":
    main()
