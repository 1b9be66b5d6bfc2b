"""What a shell is offered on Tab: by the protocol, and in bash, zsh and fish themselves."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest

from sampo_cli import commands_eval, commands_share, completion
from sampo_cli.config import Recipe
from sampo_cli.export import BITS
from sampo_cli.merging import DTYPES
from sampo_cli.method_table import METHODS
from sampo_cli.recipe_files import shipped_recipes
from sampo_cli.settings import apply_settings
from sampo_cli.suites import SUITES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs in outputs/, one elsewhere, a recipe, and `sampo` in bin/."""
    folder = tmp_path_factory.mktemp("place")
    for run in ("outputs/first", "outputs/second", "elsewhere/third"):
        (folder / run).mkdir(parents=True)
        (folder / run / "recipe.yaml").write_text("model: {}\n")
    (folder / "outputs" / "no-run").mkdir()
    (folder / "mine.yaml").write_text("model: {}\n")
    (folder / "bin").mkdir()
    program = folder / "bin" / "sampo"
    program.write_text(f"#!{sys.executable}\nfrom sampo_cli.cli import main\nmain()\n")
    program.chmod(0o755)
    return folder


def environment(place: Path, **more: str) -> dict[str, str]:
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(place), "TERM": "dumb"} | more


def offered(place: Path, *words: str) -> list[str]:
    """What is offered for the last of the words, by the protocol that bash's script speaks."""
    asked = {
        "COMP_WORDS": " ".join(["sampo", *words]),
        "COMP_CWORD": str(len(words)),
        "_SAMPO_COMPLETE": "complete_bash",
    }
    outcome = subprocess.run(
        [place / "bin" / "sampo"], cwd=place, env=environment(place, **asked), capture_output=True, text=True
    )
    assert outcome.stderr == ""
    return outcome.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], ["train"]),
        (["cache", ""], ["list", "clear"]),
        (["train", "--lora-"], ["--lora-r", "--lora-alpha"]),
        (["train", "--recipe", "qui"], ["quickstart"]),
        (["train", "--recipe", "m"], ["mine.yaml"]),
        (["recipes", "qui"], ["quickstart"]),
        (["recipes", "24gb/llama"], ["24gb/llama-3.1-8b"]),
        (["train", "--method", "simp"], ["simpo"]),
        (["methods", "ip"], ["ipo"]),
        (["merge", ""], ["outputs/first", "outputs/second"]),
        (["report", "outputs/first", "outputs/s"], ["outputs/second"]),
        (["eval", "elsewhere/"], ["elsewhere/third"]),
        (["train", "--resume", "outputs/f"], ["outputs/first"]),
        (["train", "--set", "train.save"], ["train.save_every=", "train.save_every=50"]),
        (["train", "--set", "train.s"], ["train.save_every=", "train.scheduler=", "train.seed="]),
        (["train", "--set", "output.keep"], ["output.keep=", "output.keep=best", "output.keep=final"]),
        (["train", "--quantization", ""], ["nf4", "int8", "none"]),
        (["train", "--model", ""], []),  # the shell's own: files
        (["merge", "nowhere/at/all/"], []),
    ],
)
def test_what_is_offered(place: Path, words: list[str], expected: list[str]) -> None:
    assert sorted(offered(place, *words)) == sorted(expected)


def test_runs_are_offered_where_there_is_no_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "run").mkdir(parents=True)
    (tmp_path / "mine" / "run" / "recipe.yaml").touch()
    assert completion.runs("mine/") == [("mine/run", "a run")]
    assert completion.runs("") == []
    assert completion.runs("\0/") == [], "what cannot be read is not offered, and nothing is said"


def test_it_is_quick_and_loads_no_torch(place: Path) -> None:
    code = (
        "import sys, time; start = time.process_time()\n"
        "import sampo_cli.cli\n"
        "from sampo_cli import completion as c\n"
        "found = [*c.recipes(''), *c.settings(''), *c.runs(''), *c.cached(''), *c.choices('output.report_to')('')]\n"
        "assert len(found) > 80, found\n"
        "assert not {'torch', 'transformers', 'datasets', 'huggingface_hub'} & set(sys.modules)\n"
        "print(time.process_time() - start)\n"
    )
    outcome = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert float(outcome.stdout) < 0.6  # 0.2 s without other work on the machine


def test_names_are_those_of_the_program() -> None:
    assert sorted(completion.METHODS) == sorted(METHODS)
    assert [name for name, _ in completion.recipes("no/such/folder")] == list(shipped_recipes())
    assert dict(completion.recipes(""))["quickstart"] == "A first run on a small model, minutes on two CPU cores:"
    for command, parameter, known in (
        (commands_eval.evaluate, "suite", SUITES),
        (commands_share.merge, "gguf", BITS),
        (commands_share.merge, "dtype", DTYPES),
    ):
        (option,) = get_type_hints(command, include_extras=True)[parameter].__metadata__
        assert [name for name, _ in option.autocompletion("")] == list(known), parameter


def test_every_key_of_a_recipe_is_offered_with_values_that_it_takes() -> None:
    tree = {"model": {"name": "m"}, "data": {"sources": ["d"]}}
    whole = Recipe.model_validate(tree).model_dump()

    def keys(value: object, before: str) -> Iterator[str]:
        for name, inner in value.items() if isinstance(value, dict) and value else ():
            deeper = isinstance(inner, dict) and inner
            yield from keys(inner, f"{before}{name}.") if deeper else [f"{before}{name}="]

    found = dict(completion.settings(""))
    assert set(keys(whole, "")) - set(found) == {"data.columns="}
    assert all(found.values()), "each has a description"
    for key in found:
        for value, _ in completion.settings(key)[1:]:
            changed = {"model": {"name": "m"}, "data": {"sources": ["d"]}}
            apply_settings(changed, [value])
            Recipe.model_validate(changed)


# In the shells themselves ---------------------------------------------------------------------------------------------


def shell(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def typed(place: Path, command: list[str], setup: str, line: str, expected: str) -> str:
    """What an interactive shell shows once `line`, with a Tab at its end, has become `expected`."""
    child, terminal = pty.fork()
    if not child:
        os.chdir(place)
        os.execvpe(command[0], command, environment(place, PS1="> ", PROMPT="> "))
    shown = ""
    try:
        os.write(terminal, f"{setup}\necho rea''dy\n".encode())
        for awaited, answer in (("\nready", f"{line}\t"), (expected, "")):
            deadline = time.monotonic() + 60
            while not re.search(awaited, shown):
                assert time.monotonic() < deadline, shown
                if select.select([terminal], [], [], 0.2)[0]:
                    shown += os.read(terminal, 4096).decode(errors="replace").replace("\r", "\n").replace("\a", "")
            os.write(terminal, answer.encode())
    finally:
        os.close(terminal)
        os.waitpid(child, 0)
    return shown


TYPED = [
    ("sampo push", "push-to-hub"),
    ("sampo train --recipe quicks", "quickstart"),
    ("sampo merge outputs/se", "outputs/second"),
]


@pytest.mark.parametrize(("line", "whole"), TYPED)
@pytest.mark.parametrize("name", ["bash", "zsh"])
def test_tab(place: Path, name: str, line: str, whole: str) -> None:
    plain = {"bash": ["--norc", "--noprofile", "-i"], "zsh": ["-f", "-i"]}[name]
    program = shell(name)
    script = subprocess.run(
        [place / "bin" / "sampo"],
        env=environment(place, _SAMPO_COMPLETE=f"source_{name}"),
        capture_output=True,
        text=True,
    )
    (place / f"script.{name}").write_text(script.stdout)
    setup = f"source {place}/script.{name}"
    if name == "zsh":
        setup = f"unsetopt ZLE_PROMPT_CR; autoload -Uz compinit; compinit -u -d {place}/dump; {setup}"
    assert whole in typed(place, [program, *plain], setup, line, re.escape(whole) + "[ /]")


@pytest.mark.parametrize(("line", "whole"), TYPED)
def test_tab_in_fish(place: Path, line: str, whole: str) -> None:
    program = shell("fish")
    script = f"env _SAMPO_COMPLETE=source_fish sampo | source; complete -C '{line}'"
    outcome = subprocess.run(
        [program, "--no-config", "-c", script], cwd=place, env=environment(place), capture_output=True, text=True
    )
    assert outcome.stdout.split("\t")[0].strip() == whole, outcome.stderr


def test_a_key_of_a_recipe_gets_no_space_after_it(place: Path) -> None:
    program = shell("bash")
    script = f"source <(_SAMPO_COMPLETE=source_bash {place}/bin/sampo)"
    shown = typed(
        place,
        [program, "--norc", "--noprofile", "-i"],
        script,
        "sampo train --set train.save",
        r"train\.save_every=$",
    )
    assert shown.endswith("train.save_every=")
