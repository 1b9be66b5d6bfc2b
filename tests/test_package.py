"""What a user installs: sdist and wheel are whole, and the wheel works in an empty environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from scripts import release

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel) as `make release` builds them."""
    return release.build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an empty environment with the wheel in it.

    What the wheel depends on comes from the running environment: a .pth file shows its packages, but does not process
    the .pth files among them, so that an editable install of the checkout stays out.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps", "--quiet"]
    subprocess.run([*install, str(built[1])], check=True, env=_without_ours())
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


def _without_ours() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = _without_ours() | {"HF_HUB_OFFLINE": "1", "SAMPO_CACHE": str(cwd / "cache")}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_sdist_and_wheel_are_whole(built: tuple[Path, Path]) -> None:
    assert release.check(*built) == []


def test_what_is_missing_or_too_much_in_a_wheel_is_named(built: tuple[Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / built[1].name
    with zipfile.ZipFile(built[1]) as whole, zipfile.ZipFile(broken, "w") as archive:
        for name in whole.namelist():
            if not name.endswith(("py.typed", "LICENSE")):
                archive.writestr(name, whole.read(name))
        archive.writestr("tests/test_x.py", "")
    found = release.check(built[0], broken)
    assert [line.partition(": ")[2] for line in found[:3]] == ["no sampo_cli/py.typed", "tests/test_x.py", "no LICENSE"]
    assert "the sdist does not give the wheel of the checkout" in found[3]


def test_the_wheel_comes_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = "import sampo_cli, sampo_cli.recipe_files as r; print(sampo_cli.__file__); print(r.recipes_folder())"
    lines = _run(installed / "python", "-c", code, cwd=tmp_path).stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(str(installed.parent)) for line in lines)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["methods"], ["recipes"], ["doctor"]], ids=" ".join)
def test_commands_run_from_the_wheel(arguments: list[str], installed: Path, tmp_path: Path) -> None:
    outcome = _run(installed / "sampo", *arguments, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.strip()


def test_the_quickstart_of_the_wheel_brings_its_pairs(installed: Path, tmp_path: Path) -> None:
    code = "from sampo_cli.recipe_files import load_recipe; print(load_recipe('quickstart')['data']['sources'][0])"
    found = Path(_run(installed / "python", "-c", code, cwd=tmp_path).stdout.strip())
    assert found.is_relative_to(installed.parent)
    assert found.read_text() == (ROOT / "recipes" / "quickstart" / "pairs.jsonl").read_text()


def test_the_quickstart_pairs_are_what_the_readme_says() -> None:
    lines = (ROOT / "recipes" / "quickstart" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 150
    assert len({row["prompt"] for row in rows}) == 150
    longer = sum(len(row["chosen"].split()) > len(row["rejected"].split()) for row in rows)
    assert longer == 60
