"""What a user installs: the wheel holds the program and its recipes."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_wheel_holds_the_recipes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    (wheel,) = tmp_path.glob("sampo_cli-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    ours = {"sampo_cli/cli.py", "sampo_cli/_constraints.txt"}
    ours |= {f"sampo_cli/_recipes/{name}.yaml" for name in ("quickstart/recipe", "16gb/llama-3.1-8b")}
    assert ours <= names
    assert not any(name.startswith(("tests/", "scripts/", "docs/")) for name in names)
    code = "from sampo_cli.recipe_files import load_recipe; print(load_recipe('quickstart')['data']['sources'][0])"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == str(tmp_path / "site" / "sampo_cli" / "_recipes" / "quickstart" / "pairs.jsonl")


def test_the_quickstart_pairs_are_what_the_readme_says() -> None:
    import json

    lines = (ROOT / "recipes" / "quickstart" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 150
    assert len({row["prompt"] for row in rows}) == 150
    longer = sum(len(row["chosen"].split()) > len(row["rejected"].split()) for row in rows)
    assert longer == 60
