"""The commands as functions of Python: same names, parameters and results; nothing printed, nothing left behind."""

from __future__ import annotations

import gc
import inspect
import json
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sampo_cli
from sampo_cli import calls, cli
from sampo_cli.errors import DataError, ExitCode, OutOfMemory, SampoError, UsageError
from scripts import make_reference
from tests import tiny
from tests.test_architecture import MODULES

PRINTING = {"as_json", "debug", "quiet"}
"""Parameters of commands that decide what is printed; functions whose progress is seen have `quiet` too."""


def function_of(command: str) -> Callable[..., Any]:
    """`push-to-hub` is `push_to_hub`, `cache list` is `cache_list`, and `eval` is a name that Python has taken."""
    name = {"eval": "evaluate"}.get(command, command.replace("-", "_").replace(" ", "_"))
    assert name in sampo_cli.__all__, f"sampo {command} has no function sampo_cli.{name}"
    return getattr(sampo_cli, name)


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> sampo_cli.Run:
    """A run of three steps, made from Python."""
    folder = tmp_path_factory.mktemp("made")
    data = tiny.write_pairs(folder / "pairs.jsonl", 24)
    return sampo_cli.train(
        model=tiny_llama,
        data=data,
        output=folder / "run",
        max_steps=3,
        batch_pairs=4,
        settings={"data.eval_fraction": 0.2, "output.keep": "final"},
        quiet=True,
    )


# What is promised -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", make_reference.commands())
def test_each_command_has_its_function_with_the_same_parameters(command: str) -> None:
    callback = make_reference.commands()[command].callback
    assert callback is not None
    asked = inspect.signature(callback).parameters
    taken = inspect.signature(function_of(command)).parameters
    assert set(taken) - {"quiet"} == set(asked) - PRINTING
    assert set(taken) & {"quiet"} <= set(asked)
    for name in set(taken) & set(asked):
        defaults = [one.parameters[name].default for one in map(inspect.signature, (function_of(command), callback))]
        assert len({str(default or None) for default in defaults}) == 1, name


@pytest.mark.parametrize("command", make_reference.commands())
def test_each_command_has_json(command: str) -> None:
    flags = [flag for parameter in make_reference.commands()[command].params for flag in parameter.opts]
    assert "--json" in flags


def test_no_module_has_the_name_of_a_function() -> None:
    """`from sampo_cli import merge` would be the module once somebody has imported `sampo_cli.merge`."""
    assert not set(sampo_cli.__all__) & set(MODULES)


def test_importing_is_light_and_gives_functions_in_any_order() -> None:
    code = (
        "import sys, time; start = time.process_time()\n"
        "from sampo_cli import train, merge, data\n"
        "seconds = time.process_time() - start\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pydantic', 'numpy', 'rich', 'typer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import sampo_cli.merging, sampo_cli.cli\n"
        "from sampo_cli import *\n"
        "from sampo_cli import merge as again\n"
        "assert merge is again and callable(report) and callable(methods)\n"
        "print(seconds)\n"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert float(outcome.stdout) < 0.2


def test_the_page_has_every_function() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "python.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `sampo ([\w -]+)` \| `(\w+)` \| (.+) \|$", page, re.MULTILINE)
    assert {command: name for command, name, _ in rows} == {
        command: function_of(command).__name__ for command in make_reference.commands()
    }
    for command, _, returned in rows:
        types = set(re.findall(r"\w+", str(inspect.signature(function_of(command)).return_annotation)))
        assert set(re.findall(r"`([A-Z]\w+)`", returned)) == {name for name in types if name[0].isupper()} - {
            "Path",
            "Any",
        }


# What they return is what the command prints with --json --------------------------------------------------------------


Asked = tuple[list[Any], dict[str, Any], list[Any]]
"""Arguments of the function, its keywords, and the words of the command that are the same."""


def cases(made: sampo_cli.Run, model: Path, folder: Path) -> dict[str, Asked]:
    """Each command once, cheaply, by its name. `{}` in a path: each of the two writes into a folder of its own."""
    run, data, out = made.folder, made.folder.parent / "pairs.jsonl", f"{folder}/{{}}"
    bare = Path(shutil.copytree(run, folder / "bare", ignore=shutil.ignore_patterns("*.jsonl")))  # nothing to draw
    short = {"model": model, "data": data, "max_steps": 1, "batch_pairs": 4, "output": f"{out}-train", "quiet": True}
    return {
        "train": ([], short, ["--model", model, "--data", data, "--max-steps", 1, "--batch-pairs", 4, "--output",
                              f"{out}-train", "--quiet"]),
        "data": ([data], {"model": model, "settings": {"data.max_length": 100}},
                 [data, "--model", model, "--set", "data.max_length=100"]),
        "eval": ([run], {"limit": 2, "output": f"{out}-eval"}, [run, "--limit", 2, "--output", f"{out}-eval"]),
        "chat": ([run], {"prompt": "hi", "side": "both", "max_new_tokens": 3},
                 [run, "--prompt", "hi", "--side", "both", "--max-new-tokens", 3]),
        "merge": ([run], {"output": f"{out}-merge", "dtype": "float32"},
                  [run, "--output", f"{out}-merge", "--dtype", "float32"]),
        "push-to-hub": ([bare], {"repo": "me/tiny", "dry_run": True}, [bare, "--repo", "me/tiny", "--dry-run"]),
        "methods": (["simpo"], {}, ["simpo"]),
        "recipes": (["16gb/llama-3.1-8b"], {"copy": f"{out}-copy.yaml"},
                    ["16gb/llama-3.1-8b", "--copy", f"{out}-copy.yaml"]),
        "runs": ([run.parent], {}, [run.parent]),
        "report": ([bare], {"output": f"{out}-report"}, [bare, "--output", f"{out}-report"]),
        "sweep": ([], {"model": model, "data": data, "settings": {"method.beta": [0.1, 0.3]}, "output": f"{out}-sweep",
                       "print_commands": True},
                  ["--model", model, "--data", data, "--set", "method.beta=0.1,0.3", "--output", f"{out}-sweep",
                   "--print-commands"]),
        "cache list": ([], {}, []),
        "doctor": ([], {"offline": True}, ["--offline"]),
        "cache clear": ([["nothing-begins-so"]], {}, ["nothing-begins-so"]),
    }  # fmt: skip


def plain(result: Any) -> Any:
    """A result as JSON has it."""
    if isinstance(result, list):
        return [plain(item) for item in result]
    return result.to_dict() if hasattr(result, "to_dict") else str(result) if isinstance(result, Path) else result


def in_folder(value: Any, name: str) -> Any:
    return value.format(name) if isinstance(value, str) else value


CHANGING = {"seconds", "written", "path", "found"}
"""Of a run, when its result was written; where a file lies, if each of the two wrote its own; what is free just now."""


def lasting(value: Any) -> Any:
    """JSON without what is another in each run."""
    if isinstance(value, dict):
        return {key: lasting(item) for key, item in value.items() if key not in CHANGING}
    return [lasting(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("command", make_reference.commands())
def test_a_function_returns_what_its_command_prints(
    command: str, made: sampo_cli.Run, tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    known = cases(made, tiny_llama, tmp_path)
    assert command in known, f"add sampo {command} to the cases of this test"
    arguments, keywords, words = known[command]
    capfd.readouterr()
    try:
        result = function_of(command)(*arguments, **{key: in_folder(value, "a") for key, value in keywords.items()})
        result = {"prompt": "hi", "answers": [vars(reply) for reply in result]} if command == "chat" else plain(result)
    except UsageError as error:
        result = error.message
    assert capfd.readouterr().out == "", "functions print nothing on stdout"
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), *(in_folder(str(word), "b") for word in words), "--json"])
    out, err = capfd.readouterr()
    if isinstance(result, str):
        assert (end.value.code, out) == (ExitCode.USAGE, "")
        assert result in err
        return
    assert end.value.code == 0
    expected = json.loads(json.dumps(lasting(result)).replace(f"{tmp_path}/a-", f"{tmp_path}/b-"))
    assert lasting(json.loads(out)) == expected


# How they are with Python ---------------------------------------------------------------------------------------------


def test_a_run_from_python(made: sampo_cli.Run) -> None:
    assert made.summary == json.loads((made.folder / "summary.json").read_text())
    assert made.summary["steps"] == {"done": 3, "planned": 3}
    assert made.summary["pairs"]["eval"] == 5  # 0.2 * 24, rounded
    assert made.to_dict()["folder"] == str(made.folder)


def linear_layers() -> int:
    """How many there are in this process."""
    return sum(issubclass(type(thing), torch.nn.Linear) for thing in gc.get_objects())


def test_no_model_stays_in_memory(made: sampo_cli.Run) -> None:
    """A notebook's next function loads one of its own; a run's trainer and record hold each other."""
    assert made.summary["state"] == "finished"
    gc.collect()
    before = linear_layers()
    gc.disable()
    try:
        sampo_cli.evaluate(made.folder, limit=1, output=made.folder.parent / "evaluated", quiet=True)
        after = linear_layers()
    finally:
        gc.enable()
    assert after == before


def test_a_conversation(made: sampo_cli.Run) -> None:
    talk = sampo_cli.chat(made.folder, side="both", max_new_tokens=3)
    first = talk.ask("one")
    assert [reply.side for reply in first] == ["adapter", "base"]
    assert talk.turns[-1] == {"role": "assistant", "content": first[0].text}
    assert [reply.side for reply in talk.ask("two", ["base"])] == ["base"]
    assert "Linear" not in repr(talk)


def test_errors_are_sampo_errors_with_what_to_do_next(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data not found") as raised:
        sampo_cli.train(model=tiny_llama, data=tmp_path / "missing.jsonl", quiet=True)
    assert raised.value.__notes__ == ["hint: check the path"]
    with pytest.raises(SampoError, match="unknown key"):
        sampo_cli.train(model="m", data="d", settings={"train.sede": 1})
    with pytest.raises(UsageError, match=r"expected section\.key=value"):
        sampo_cli.train(model="m", data="d", settings={"train": {"seed": 1}})
    with pytest.raises(UsageError, match="max_new_tokens=0"):
        sampo_cli.chat("m", prompt="hi", max_new_tokens=0)
    with pytest.raises(UsageError, match="side 'left'"):
        sampo_cli.chat("m", side="left")  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="no run to report on"):
        sampo_cli.report([])


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (MemoryError(), OutOfMemory),
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory),
        (OSError(28, "No space left on device", "file"), SampoError),
        (ZeroDivisionError(), ZeroDivisionError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_what_is_known_becomes_a_sampo_error_and_the_rest_stays(raised: BaseException, expected: type) -> None:
    @calls.interface
    def fails() -> None:
        raise raised

    with pytest.raises(expected) as caught:
        fails()
    assert caught.value is raised or caught.value.__cause__ is raised
    assert type(caught.value) is expected


def test_libraries_warn_only_where_they_are_to() -> None:
    @calls.interface
    def warns() -> None:
        warnings.warn("soon", FutureWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        warns()
        assert heard == []
        token = calls.libraries_warn.set(True)
        try:
            warns()
        finally:
            calls.libraries_warn.reset(token)
    assert [str(warning.message) for warning in heard] == ["soon"]


def test_a_run_in_another_thread(tiny_llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    """Python lets only the main thread handle signals."""
    found: list[sampo_cli.Run] = []

    def work() -> None:
        short = {"max_steps": 1, "batch_pairs": 2, "eval_fraction": 0.0, "quiet": True}
        found.append(sampo_cli.train(model=tiny_llama, data=[pairs_file], output=tmp_path / "run", **short))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    assert found[0].summary["state"] == "finished"


def test_the_types_ship_with_the_package() -> None:
    assert (Path(sampo_cli.__file__).parent / "py.typed").is_file()
