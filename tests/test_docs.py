"""The documentation cannot drift: what it shows is parsed, read, loaded or run here."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import pytest
import typer.main

from sampo_cli import cli, formats, metrics, options
from sampo_cli import run as runs
from sampo_cli.config import Recipe, parse_yaml
from sampo_cli.console import RunView
from sampo_cli.method_table import METHODS
from sampo_cli.plan import new_folder, resolve_recipe
from sampo_cli.recipe_files import load_recipe, shipped_recipes
from sampo_cli.remote import is_path_like
from sampo_cli.settings import apply_settings, put
from sampo_cli.sweep_plan import read_axes
from scripts import make_reference, make_reliability
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sampo_cli"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
IMAGE = re.compile(r"!\[[^\]]+\]\(([^)\s]+)\)")
RECIPE_KEY = re.compile(rf"`(?:--set )?((?:{'|'.join(Recipe.model_fields)})\.[a-z_.]+)(?:[=:][^`]*)?`")
FILES = (".py", ".json", ".jsonl", ".yaml", ".safetensors")


def fences(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(page: Path) -> Iterator[list[str]]:
    """The words after `sampo` of every command in a page's shell blocks, without pipes and redirections."""
    for block in fences(page, "bash", "sh", "shell", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            for is_pipe, part in groupby(words, lambda word: word == "|"):
                command = [] if is_pipe else list(takewhile(lambda word: word != ">", part))
                if command[:1] == ["sampo"]:
                    yield command[1:]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_reference_is_what_the_program_says() -> None:
    written = make_reference.PAGE.read_text(encoding="utf-8")
    assert written == make_reference.reference(), "run: .venv/bin/python scripts/make_reference.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one_that_the_program_takes(page: Path) -> None:
    group: Any = typer.main.get_command(cli.app)
    for words in commands(page):
        context = group.make_context("sampo", list(words))
        name, command, rest = group.resolve_command(context, words)
        parsed = command.make_context(name, list(rest), parent=context).params
        tree: dict[str, Any] = {"model": {"name": "m"}, "data": {"sources": ["d"]}}
        for flag, value in parsed.items():
            if name == "train" and flag in options.FLAGS and value:
                put(tree, *options.FLAGS[flag].split("."), list(value) if isinstance(value, tuple) else value)
        settings = parsed.get("settings") or []
        apply_settings(tree, {k: v[0] for k, v in read_axes(settings).items()} if name == "sweep" else settings)
        assert resolve_recipe(tree).method.beta is not None, words


RUN_ALL = """
import json, sys
from sampo_cli.cli import main
outcomes = []
for words in json.load(sys.stdin):
    try:
        main(words)
    except SystemExit as ending:
        outcomes.append(int(ending.code))
print("OUTCOMES", outcomes)
"""


def hub_cache(folder: Path, kind: str, name: str, source: Path) -> None:
    """Put `source` where huggingface_hub keeps a snapshot of that name."""
    repository = folder / "hub" / f"{kind}--{name.replace('/', '--')}"
    commit = "0" * 40
    shutil.copytree(source, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


@pytest.mark.slow
def test_every_command_of_the_readme_runs_in_this_order(tiny_llama: Path, tmp_path: Path) -> None:
    """Offline, with tiny models in the Hub's cache; training is cut to two steps and the push is a dry run."""
    llamas = ("meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct")
    for name in (*llamas, "HuggingFaceTB/SmolLM2-135M-Instruct"):
        hub_cache(tmp_path / "hf", "models", name, tiny_llama)
    orca = tmp_path / "orca"
    orca.mkdir()
    for seed, path in enumerate((orca / "train.jsonl", tmp_path / "pairs.jsonl", tmp_path / "more.jsonl")):
        tiny.write_pairs(path, 20, seed)
    hub_cache(tmp_path / "hf", "datasets", "Intel/orca_dpo_pairs", orca)
    shutil.copytree(tiny_llama, tmp_path / "my-model")
    (tmp_path / "my-recipe.yaml").write_text(fences(ROOT / "README.md", "yaml")[0])
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = list(commands(ROOT / "README.md"))
    first, named = [line for line in words if "--resume" in line]
    before, after = words[: words.index(first)], words[words.index(named) :]
    shorter = {"train": ["--max-steps", "2"], "push-to-hub": ["--dry-run"], "sweep": ["--print-commands"]}

    def run(lines: list[list[str]]) -> None:
        lines = [line + shorter.get(line[0], []) * ("--resume" not in line) for line in lines]
        driver = [sys.executable, "-c", RUN_ALL]
        outcome = subprocess.run(
            driver, input=json.dumps(lines), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert f"OUTCOMES {[0] * len(lines)}" in outcome.stdout, outcome.stdout[-500:] + outcome.stderr[-3000:]

    run(before)
    shutil.copytree(next((tmp_path / first[-1]).glob("checkpoints/*")), tmp_path / named[-1])
    run([first, *after])


def test_the_readme_shows_the_three_commands_with_the_folder_that_train_makes() -> None:
    train, merge, push = list(commands(ROOT / "README.md"))[:3]
    assert [train[0], merge[0], push[0]] == ["train", "merge", "push-to-hub"]
    recipe = resolve_recipe({"model": {"name": train[2]}, "data": {"sources": [train[4]]}})
    assert merge[1] == push[1] == str(new_folder(recipe))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_are_there(page: Path) -> None:
    for image in IMAGE.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        assert (page.parent / image).is_file(), image


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipe_keys_that_are_named_exist(page: Path) -> None:
    for key in RECIPE_KEY.findall(page.read_text(encoding="utf-8")):
        section, name, *_ = key.split(".")
        if not key.endswith(FILES):
            assert name in Recipe.model_fields[section].annotation.model_fields, key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_blocks_are_recipes(page: Path) -> None:
    for block in fences(page, "yaml"):
        assert resolve_recipe({"model": {"name": "m"}, **parse_yaml(block, page.name)}).data.sources


def test_shipped_recipes_load() -> None:
    assert "quickstart" in shipped_recipes()
    for name in shipped_recipes():
        tree = load_recipe(name)
        tree.setdefault("model", {}).setdefault("name", "m")
        tree.setdefault("data", {}).setdefault("sources", ["d"])
        recipe = resolve_recipe(tree)
        assert recipe.train.learning_rate is not None
        assert all(Path(source).exists() or not is_path_like(source) for source in recipe.data.sources)


def test_every_recipe_opens_with_its_command_and_its_sources() -> None:
    for name, path in shipped_recipes().items():
        opening = path.read_text(encoding="utf-8").partition("\nmodel:")[0].partition("\ndata:")[0]
        assert f"\n#   sampo train --recipe {name}" in opening
        if name == "quickstart" or "gb/" in name:  # of this project, and not from a publication
            continue
        assert all(f"# {word}" in opening for word in ("Published", "Sources: ")), name
        assert "hanged for LoRA" in opening


def test_example_rows_are_read() -> None:
    rows = [json.loads(block) for block in fences(ROOT / "docs" / "data.md", "json")]
    assert len(rows) == 8
    for row in rows:
        pair = formats.read_row(row)
        assert pair.prompt[-1]["role"] == "user"
        assert pair.chosen != pair.rejected


def reasons() -> set[str]:
    """Every reason that a row is dropped for: the first argument of each `Unusable(...)` in the package."""
    found = set()
    for path in PACKAGE.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Unusable":
                first = node.args[0]
                found.add(first.value if isinstance(first, ast.Constant) else names[first.id])
    return found


def test_every_reason_for_a_dropped_row_is_explained() -> None:
    table = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE))
    assert explained == reasons()


def test_the_readme_has_the_exit_codes() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (\w+) \| (.+) \|$", readme, re.MULTILINE)
    assert rows == make_reference.exit_codes()


def test_the_readme_cites_the_paper_as_the_cards_do() -> None:
    assert fences(ROOT / "README.md", "bibtex") == [METHODS["sampo"].citation + "\n"]


def modules() -> set[str]:
    return {path.name for path in PACKAGE.glob("*.py")}


def test_the_readme_has_every_source_file_once() -> None:
    (tree,) = [block for block in fences(ROOT / "README.md", "text") if block.startswith("sampo_cli/")]
    listed = re.findall(r"^  (\w+\.py) ", tree, re.MULTILINE)
    assert sorted(listed) == sorted(modules())


def listed_files(page: Path, start: str) -> set[str]:
    """Files and folders at the first level of the folder that a text block shows."""
    (block,) = [block for block in fences(page, "text") if block.startswith(start)]
    return {name.split("/")[0] for name in re.findall(r"^  (\S+)", block, re.MULTILINE)}


def test_a_run_leaves_what_is_documented(tiny_llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    tree = {
        "model": {"name": str(tiny_llama)},
        "data": {"sources": [str(pairs_file)]},
        "train": {"max_steps": 1, "batch_pairs": 4, "generate": {"prompts": 1, "max_new_tokens": 2}},
        "iterations": {"count": 2},
    }
    view = RunView(quiet=True)
    runs.train(resolve_recipe(tree), view, tmp_path / "run")
    view.close()
    written = {path.name for path in (tmp_path / "run").iterdir() if path.name != ".lock"}
    written |= {"merged", "gguf", "adapter-only", "eval"}
    assert written == listed_files(ROOT / "README.md", "outputs/")
    assert written == listed_files(ROOT / "docs" / "design.md", "outputs/")
    rows = metrics.read(tmp_path / "run" / "metrics.jsonl")
    for kind, count in (("train", 2), ("eval", 2), ("generate", 3)):
        documented = {key for key, kinds, _ in make_reference.METRICS if kind in kinds}
        assert [set(row) for row in rows if row["kind"] == kind] == [documented] * count


def test_every_promise_is_on_the_page_and_has_its_tests() -> None:
    page = make_reliability.PAGE.read_text(encoding="utf-8")
    known = [
        f"{path.name}::{name}"
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    for promise, tests in [item for promises in make_reliability.PROMISES.values() for item in promises.items()]:
        if "SAMPO_RELIABILITY" not in os.environ:  # a run for that page comes before it
            assert f"| {promise} |" in page, "run: make reliability"
        for test in tests:
            assert any(name.startswith(test) for name in known), test


def test_a_promise_that_is_not_kept_stops_the_table() -> None:
    promises = [(promise, tests) for group in make_reliability.PROMISES.values() for promise, tests in group.items()]
    found = [{"test": f"tests/{tests[0]}", "outcome": "passed"} for _, tests in promises]
    found.append({"test": f"tests/{promises[0][1][0]}", "result": "a | b <c>"})
    assert r"| 1 passed<br>a \| b &lt;c> |" in make_reliability.table(found)
    with pytest.raises(SystemExit, match="failed"):
        make_reliability.table([*found, {"test": f"tests/{promises[-1][1][0]}[x]", "outcome": "failed"}])
    with pytest.raises(SystemExit):
        make_reliability.table(found[1:])
