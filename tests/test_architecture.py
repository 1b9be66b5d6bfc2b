"""The house: what may import what, how long files and functions may be."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "sampo_cli"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def imported(module: str) -> set[str]:
    """The modules of the package that `module` imports, anywhere in its file."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "sampo_cli":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sampo_cli."):
            found.add(node.module.split(".")[1])
    return found & set(MODULES)


def test_no_file_imports_one_below_it_in_the_house() -> None:
    """The house is the table of docs/design.md: every module is in it, and imports only from above itself."""
    page = (PACKAGE.parent / "docs" / "design.md").read_text(encoding="utf-8")
    house = re.findall(r"^\| `(\w+)\.py` \|", page, re.MULTILINE)
    assert sorted(house) == MODULES
    for place, name in enumerate(house):
        assert not imported(name) - set(house[:place]), f"{name}.py imports a file below it in docs/design.md"


def test_the_commands_meet_the_trainer_only_through_files() -> None:
    for module in ("merging", "merge_plan", "merge_write", "drift", "hub", "upload", "card", "console", "data_report"):
        assert not imported(module) & {"trainer", "run", "plan"}, module


def test_losses_and_sampling_know_no_config() -> None:
    for module in ("losses", "method_table", "running", "sampling", "scores", "logprobs", "policy", "batch"):
        assert "config" not in imported(module), module


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_small(module: str) -> None:
    text = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    assert text.count("\n") <= (350 if module == "trainer" else 300)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name


def test_only_the_command_line_prints_and_exits() -> None:
    for module in set(MODULES) - {"cli", "console"}:
        for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("print", "exit", "quit"), f"{module}:{node.lineno}"
