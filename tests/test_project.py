"""Habits of the project: what CI runs exists, version ranges are what is tested, a release is what it says."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from sampo_cli import __version__, citations
from scripts import release

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


# --- CI -------------------------------------------------------------------------------------------------------------


def steps(path: Path) -> Iterator[str]:
    for job in load(path)["jobs"].values():
        yield from (step["run"] for step in job["steps"] if "run" in step)


def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_what_the_makefile_has(path: Path) -> None:
    commands = list(steps(path))
    assert commands
    for command in commands:
        make, target, *variables = command.split(maxsplit=2)
        assert (make, target in targets()) == ("make", True), command
        assert all(re.match(r"CONSTRAINTS=", variable) for variable in variables), command


def test_ci_runs_the_test_command_of_the_readme_on_every_python_and_the_oldest_versions() -> None:
    assert "\nmake test\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    jobs = load(ROOT / ".github" / "workflows" / "test.yml")["jobs"]
    matrix = {(run["python"], run["constraints"]) for run in jobs["test"]["strategy"]["matrix"]["include"]}
    pythons = {name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", name)}
    assert matrix == {(python, "constraints.txt") for python in pythons} | {("3.11", "constraints-oldest.txt")}
    assert "make test CONSTRAINTS=${{ matrix.constraints }}" in [step.get("run") for step in jobs["test"]["steps"]]
    assert all((ROOT / constraints).is_file() for _, constraints in matrix)


def test_the_help_of_make_knows_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(re.findall(r'@echo "make ([\w-]+) ', text)) == targets() - {"help"}
    (phony,) = re.findall(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    assert set(phony.split()) == targets()


def test_hooks_run_the_linters_of_make_lint() -> None:
    (local,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    entries = [hook["entry"].split()[0] for hook in local["hooks"]]
    assert entries == [".venv/bin/ruff", ".venv/bin/ruff", ".venv/bin/mypy"]


# --- Version ranges -------------------------------------------------------------------------------------------------


def requirements(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    found = [Requirement(line) for line in lines]
    return [requirement for requirement in found if requirement.name != PROJECT["name"]]


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(line.split("==")[0]): Version(line.split("==")[1]) for line in lines if "==" in line}


def lower_bound(requirement: Requirement) -> Version:
    (bound,) = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
    return bound


def test_the_tested_versions_are_in_the_ranges() -> None:
    """Of all extras: also what constraints.txt pins for plots, trackers and benchmarks."""
    newest = pins("constraints.txt")
    for requirement in requirements("dev", "docs", "demo", "report", "eval"):
        name = canonicalize_name(requirement.name)
        if name in newest:
            assert requirement.specifier.contains(newest[name]), requirement
    assert {canonicalize_name(requirement.name) for requirement in requirements("dev", "docs", "demo")} <= set(newest)


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    """A bound below what can be had beside the others would promise what nobody has tried."""
    oldest = pins("constraints-oldest.txt")
    for requirement in requirements("dev", "docs", "demo"):
        bound = lower_bound(requirement)
        pinned = oldest[canonicalize_name(requirement.name)]
        assert pinned.release[: len(bound.release)] == bound.release, requirement


# --- Releases -------------------------------------------------------------------------------------------------------

CHANGELOG = """# Changelog

## [Unreleased]

## [0.2.0] - 2026-12-01

### Added

- Something.

## [0.1.0] - 2026-11-01

- The first.
"""


def test_notes_are_the_section_of_the_version() -> None:
    assert release.notes("0.2.0", CHANGELOG) == "# sampo 0.2.0\n\n### Added\n\n- Something.\n"
    assert release.notes("0.1.0", CHANGELOG) == "# sampo 0.1.0\n\n- The first.\n"
    ahead = CHANGELOG.replace("## [Unreleased]\n", "## [Unreleased]\n\n- Next.\n")
    assert release.notes("0.3.0", ahead) == "# sampo 0.3.0\n\n- Next.\n"


def test_tag_version_and_changelog_are_the_same_or_nothing_is_released() -> None:
    assert release.problems("0.2.0", CHANGELOG, tag="v0.2.0") == []
    assert release.problems("0.3.0", CHANGELOG, tag=None) == []
    wrong_tag, wrong_heading = release.problems("0.3.0", CHANGELOG, tag="v0.2.0")
    assert wrong_tag == "the tag is v0.2.0, and sampo_cli.__version__ is 0.3.0"
    assert wrong_heading.startswith("the newest dated heading of CHANGELOG.md is 0.2.0")
    ahead = CHANGELOG.replace("## [Unreleased]\n", "## [Unreleased]\n\n- Next.\n")
    assert release.problems("0.2.0", ahead, tag="v0.2.0") == [
        "CHANGELOG.md has lines under 'Unreleased'; move them under the version"
    ]


def test_this_changelog_has_notes_for_this_version() -> None:
    assert len(release.notes(__version__, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))) > 200


# --- Files for the code host ----------------------------------------------------------------------------------------


def test_the_citation_file_is_of_this_version_and_of_the_paper_of_the_cards() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert (citation["version"], citation["license"]) == (__version__, PROJECT["license"])
    paper = citation["preferred-citation"]
    assert paper["title"] in citations.SAMPO.replace("{KL}", "KL")
    assert paper["url"] in citations.SAMPO
    for author in paper["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in citations.SAMPO


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_are_whole(name: str) -> None:
    form = load(ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml")
    assert {"name", "description", "body"} <= set(form)
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert all({"id", "attributes"} <= set(part) and part["attributes"]["label"] for part in fields)
    assert len({part["id"] for part in fields}) == len(fields)
    labels = " ".join(part["attributes"]["label"] for part in fields)
    assert name != "bug" or "sampo doctor --json" in labels
