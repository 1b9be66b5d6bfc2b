"""The house: what may import what, how long files and functions may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "sampo_cli"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "__main__"))

# Floor by floor: a module may import from the floors above its own in this list, never from its own floor or below.
FLOORS = [
    {"errors", "sampling", "citations", "running", "activations", "ledger", "secrets_scan", "length_bias"},
    {"fingerprint", "disk"},
    {"trust"},
    {"plain_yaml"},
    {"metrics", "lock"},
    {"config", "remote", "checkpoint", "batch", "logprobs", "formats", "signals", "cache", "live_view"},
    {"console", "early_stopping"},
    {"pair_attention", "attention", "kernels"},
    {"flex"},
    {"losses", "recipes", "data_card", "policy", "optim", "rounds", "tracking", "datafile", "special_tokens", "feed"},
    {"adapter", "scores", "journal", "card_facts", "options", "template", "generate", "methods", "sources", "readers"},
    {"lora", "pair_builder", "card", "method_checks", "standins", "evaluation", "objective", "answers"},
    {"model", "data", "hub"},
    {"upload", "target", "workload"},
    {"state", "data_report", "drift", "merge_plan", "skeleton"},
    {"budget", "checks", "footprint"},
    {"reference", "forecast"},
    {"trainer", "identity"},
    {"plan", "tables", "merge_write"},
    {"record"},
    {"run", "merge", "dry_run"},
    {"commands_train", "commands_data", "commands_share"},
    {"cli"},
]


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


def test_every_module_has_a_floor() -> None:
    assert sorted(module for floor in FLOORS for module in floor) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_no_arrow_points_back(module: str) -> None:
    floor = next(number for number, modules in enumerate(FLOORS) if module in modules)
    below = {other for modules in FLOORS[floor:] for other in modules}
    assert imported(module) & below == set()


def test_the_commands_meet_the_trainer_only_through_files() -> None:
    for module in ("merge", "merge_plan", "merge_write", "drift", "hub", "upload", "card", "console", "data_report"):
        assert not imported(module) & {"trainer", "run", "plan"}, module


def test_losses_and_sampling_know_no_config() -> None:
    for module in ("losses", "methods", "running", "sampling", "scores", "logprobs", "policy", "batch"):
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
