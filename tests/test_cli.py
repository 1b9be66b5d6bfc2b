"""The command line as a user meets it: one process a command, exit codes, what is on stdout and what on stderr."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sampo_cli.cli import main
from sampo_cli.errors import ExitCode, shown_failure
from scripts import make_reference
from tests import tiny


def sampo(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own, without a terminal."""
    command = [sys.executable, "-m", "sampo_cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)


def succeeds(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    outcome = sampo(*arguments, **environment)
    assert outcome.returncode == 0, outcome.stderr
    return outcome


def check_failure(code: ExitCode, returned: object, stdout: str, stderr: str) -> str:
    """A failure's manners: its exit code, nothing on stdout, an error and a hint on stderr, no traceback."""
    assert returned == code, stderr
    assert "Traceback" not in stderr
    assert 1 <= len([line for line in stderr.splitlines() if line.startswith(("error: ", "hint: "))]) <= 2
    assert stdout == ""
    return stderr


def fails(code: ExitCode, *arguments: object, **environment: str) -> str:
    """The stderr of a process that must end with `code`."""
    outcome = sampo(*arguments, **environment)
    return check_failure(code, outcome.returncode, outcome.stdout, outcome.stderr)


@pytest.fixture
def refuses(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Like `fails`, in this process: half a second less for each of the many ways to be wrong."""

    def run(code: ExitCode, *arguments: object) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return check_failure(code, end.value.code, *capfd.readouterr())

    return run


def train_flags(model: Path, data: Path, run: Path, *more: object) -> list[object]:
    flags = ["--model", model, "--data", data, "--output", run, "--batch-pairs", 4, "--max-steps", 3]
    return ["train", *flags, "--eval-fraction", 0.2, *more]


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, made by the command with nothing but the usual flags."""
    folder = tmp_path_factory.mktemp("finished")
    data = tiny.write_pairs(folder / "pairs.jsonl", 24)
    succeeds(*train_flags(tiny_llama, data, folder / "run", "--method", "sampo"))
    return folder / "run"


# What --help and the flags promise -----------------------------------------------------------------------------------


def test_help_is_fast_and_imports_no_torch() -> None:
    code = (
        "import sys, time; start = time.process_time()\n"
        "from sampo_cli.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code in (0, None), end.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print('seconds', time.process_time() - start)\n"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert "push-to-hub" in outcome.stdout
    assert float(outcome.stdout.split("seconds")[-1]) < 0.5


FLAGS = {
    "train": (
        "--recipe --model --data --method --output --adapter --epochs --max-steps --learning-rate --beta --batch-pairs "
        "--max-length --lora-r --lora-alpha --quantization --eval-fraction --save-every --resume --seed --report-to "
        "--dry-run --set --quiet --json --debug --iterations --cache-reference --gpu-memory "
        "--num-processes --accelerate-config"
    ),
    "methods": "--json --debug",
    "recipes": "--copy --quiet --json --debug",
    "runs": "--json --debug",
    "chat": (
        "--adapter --quantization --prompt --side --system --max-new-tokens --temperature --seed "
        "--set --quiet --json --debug"
    ),
    "report": "--output --quiet --json --debug",
    "sweep": "--set --model --data --method --output --print-commands --retry-failed --quiet --json --debug",
    "doctor": "--offline --json --debug",
    "cache list": "--json --debug",
    "cache clear": "--quiet --json --debug",
    "data": "--model --max-length --row --plot --balance --set --quiet --json --debug",
    "eval": (
        "--adapter --quantization --data --limit --generate --max-new-tokens --temperature --seed --judge --suite "
        "--output --set --quiet --json --debug"
    ),
    "merge": ("--base --output --dtype --gguf --llama-cpp --adapter-only --trust-remote-code --quiet --json --debug"),
    "push-to-hub": "--repo --merged --public --dry-run --quiet --json --debug",
}


def test_the_flags_are_frozen() -> None:
    """Scripts depend on them: a change here is a change of the program's interface."""
    found = {
        name: {flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")}
        for name, command in make_reference.commands().items()
    }
    assert {name: sorted(flags - {"--help"}) for name, flags in found.items()} == {
        name: sorted(flags.split()) for name, flags in FLAGS.items()
    }


def test_version_and_module_agree() -> None:
    from sampo_cli import __version__

    assert succeeds("--version").stdout == f"sampo {__version__}\n"


# The main job --------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_is_documented(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        *("recipe.yaml", "summary.json", "metrics.jsonl", "run.log", "README.md", "adapter", "best", "checkpoints"),
        *("held_out.jsonl", ".lock"),
    }
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["state"] == "finished"
    assert summary["steps"] == {"done": 3, "planned": 3}
    assert summary["pairs"]["train"] + summary["pairs"]["eval"] == 24
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3]
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert "base_model:" not in (finished / "README.md").read_text()  # a local path is nobody's model id
    assert "step 3/3" in (finished / "run.log").read_text()


def test_the_adapter_loads_with_peft_and_transformers_alone(finished: Path) -> None:
    code = f"""
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model = AutoPeftModelForCausalLM.from_pretrained({str(finished / "adapter")!r})
tokenizer = AutoTokenizer.from_pretrained({str(finished / "adapter")!r})
ids = tokenizer.apply_chat_template([{{"role": "user", "content": "one?"}}], add_generation_prompt=True,
                                    return_tensors="pt", return_dict=True)
print(model.generate(**ids, max_new_tokens=3).shape[1] - ids["input_ids"].shape[1])
"""
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert int(outcome.stdout) in (1, 2, 3)


def test_the_recipe_of_a_run_repeats_it(finished: Path, tmp_path: Path) -> None:
    succeeds("train", "--recipe", finished / "recipe.yaml", "--output", tmp_path / "again", "--quiet")
    first, second = (
        (run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (finished, tmp_path / "again")
    )
    assert first == second


def test_json_is_folder_and_summary_and_nothing_else(tiny_llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    outcome = succeeds(*train_flags(tiny_llama, pairs_file, tmp_path / "run", "--json", "--quiet"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert json.loads(outcome.stdout) == {"folder": str(tmp_path / "run"), **summary}
    assert outcome.stderr == ""


def test_dry_run_loads_no_weights_and_writes_nothing(tiny_llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_llama.iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    outcome = succeeds(*train_flags(model, pairs_file, tmp_path / "run", "--dry-run", "--json", "--quiet"))
    plan = json.loads(outcome.stdout)
    assert (plan["train pairs"], plan["held-out pairs"], plan["steps"]) == (19, 5, 3)
    assert not (tmp_path / "run").exists()


def test_merge_and_push_dry_run(finished: Path) -> None:
    merged = json.loads(succeeds("merge", finished, "--json", "--dtype", "float32").stdout)
    assert merged["merged_layers"] == 14
    assert merged["drift"]["tokens"] > 0
    again = fails(ExitCode.USAGE, "merge", finished)
    assert "already there" in again
    plan = json.loads(succeeds("push-to-hub", finished, "--repo", "me/tiny", "--dry-run", "--json").stdout)
    names = {file["path"] for file in plan["files"]}
    assert plan["private"] is True
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= names
    assert not any("checkpoint" in name or name.endswith((".pt", ".log", ".jsonl")) for name in names)
    shown = succeeds("push-to-hub", finished, "--repo", "me/tiny", "--merged", "--dry-run").stdout
    assert "model.safetensors" in shown
    assert "private" in shown
    record = finished / "merged" / "sampo.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"adapter_sha256": "of another"}))
    stale = fails(ExitCode.MODEL, "push-to-hub", finished, "--repo", "me/tiny", "--merged", "--dry-run")
    assert "merged/ is of an earlier adapter" in stale


def test_going_on_from_an_adapter(finished: Path, tiny_llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "second"
    succeeds(*train_flags(tiny_llama, pairs_file, run, "--adapter", finished))
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert json.loads((run / "summary.json").read_text())["model"]["adapter"] == str(finished)


def test_data_shows_counts_lengths_and_a_pair(refuses: Callable[..., str], tiny_llama: Path, pairs_file: Path) -> None:
    summary = json.loads(succeeds("data", pairs_file, "--model", tiny_llama, "--json").stdout)
    assert summary["counts"]["kept"] == 24
    shown = succeeds("data", pairs_file, "--model", tiny_llama, "--row", 3).stdout
    assert f"{pairs_file}:3" in shown.replace("\n", "")
    assert all(text in shown for text in ("chosen is longer", "length gap, tokens", "nearly identical", "Labels "))
    assert "<|im_end|>│" in shown
    assert "not among the usable pairs" in refuses(
        ExitCode.DATA, "data", pairs_file, "--model", tiny_llama, "--row", 99
    )


def test_data_draws_and_balances(
    refuses: Callable[..., str], tiny_llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    balanced, flags = tmp_path / "balanced.jsonl", ("--model", tiny_llama, "--json")
    more = ("--plot", tmp_path / "plots", "--balance", balanced)
    report = json.loads(succeeds("data", pairs_file, *flags, *more).stdout)
    assert [Path(path).name for path in report["plots"]] == ["gap.png", "lengths.png", "longer-wins.png"]
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in report["plots"])
    written = report["balanced"]
    assert written["kept"] == len(balanced.read_text().splitlines()) < written["pairs"] == 24
    assert written["before"] == report["labels"]
    again = json.loads(succeeds("data", balanced, *flags).stdout)
    assert again["labels"] == written["after"]
    assert again["labels"]["longer_wins"] == 0.5
    assert (again["plots"], again["balanced"]) == ([], None)
    plan = succeeds(*train_flags(tiny_llama, balanced, tmp_path / "run", "--dry-run", "--json"))
    assert json.loads(plan.stdout)["train pairs"] == written["kept"] - round(0.2 * written["kept"])
    assert "already there" in refuses(ExitCode.USAGE, "data", pairs_file, *flags, "--balance", balanced)
    shown = succeeds("data", pairs_file, *flags[:2], "--balance", tmp_path / "b.jsonl", "--set", "train.seed=1").stdout
    assert f"{written['kept']} ({written['kept'] / 24:.1%})" in shown


def test_methods_are_listed_and_shown() -> None:
    from sampo_cli.method_table import METHODS

    listed = succeeds("methods").stdout
    assert all(name in listed for name in METHODS)
    shown = succeeds("methods", "simpo").stdout
    assert "2405.14734" in shown
    assert "@" in shown
    assert {entry["name"] for entry in json.loads(succeeds("methods", "--json").stdout)} == set(METHODS)
    assert "did you mean 'simpo'?" in fails(ExitCode.USAGE, "methods", "simp0")
    assert "did you mean 'sampo'?" in fails(ExitCode.USAGE, "methods", "smapo")  # simpo has as many letters in common


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_may_not_be_written_is_no_bug(code: int) -> None:
    failure = shown_failure(OSError(code, os.strerror(code), "/shared/.merged.tmp"))
    assert failure.exit_code == ExitCode.USAGE
    assert str(failure) == f"/shared/.merged.tmp: {os.strerror(code).lower()}"


def test_iterations_leave_one_ordinary_adapter(tiny_llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--iterations", 2, "--set", "iterations.data=split", "--quiet", "--json")
    summary = json.loads(succeeds(*train_flags(tiny_llama, pairs_file, run, *flags)).stdout)
    assert summary["steps"] == {"done": 6, "planned": 6}
    assert len(summary["rounds"]) == 1
    assert (run / "rounds" / "round-1" / "adapter_model.safetensors").is_file()
    assert json.loads(succeeds("merge", run, "--json", "--dtype", "float32").stdout)["merged_layers"] == 14
    card = (run / "README.md").read_text()
    assert "2 rounds" in card


@pytest.mark.parametrize("method", ["dpo", "sampo"])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_methods_and_quantizations(
    tiny_llama: Path, pairs_file: Path, tmp_path: Path, method: str, quantization: str
) -> None:
    flags = ("--method", method, "--quantization", quantization, "--quiet", "--json", "--beta", 0.2)
    summary = json.loads(succeeds(*train_flags(tiny_llama, pairs_file, tmp_path / "run", *flags)).stdout)
    assert summary["method"]["beta"] == 0.2
    assert summary["method"]["reduction"] == {"dpo": "sum", "sampo": "sample"}[method]


# Interrupted ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_resumed_run_is_the_whole_run(
    tiny_llama: Path, pairs_file: Path, tmp_path: Path, number: int, code: int
) -> None:
    flags = train_flags(tiny_llama, pairs_file, tmp_path / "cut", "--set", "train.max_steps=25")
    log = tmp_path / "cut" / "metrics.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "sampo_cli", *map(str, flags)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert f"sampo train --resume {tmp_path / 'cut'}" in stderr
    assert json.loads((tmp_path / "cut" / "summary.json").read_text())["state"] == "interrupted"
    done = json.loads((tmp_path / "cut" / "summary.json").read_text())["steps"]["done"]
    assert 2 <= done < 25
    succeeds("train", "--resume", tmp_path / "cut", "--quiet")
    flags[flags.index(tmp_path / "cut")] = tmp_path / "whole"
    succeeds(*flags, "--quiet")
    cut, whole = ((tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("cut", "whole"))
    assert cut == whole
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if '"train"' in line]
    assert steps == list(range(1, 26))


def test_more_steps_for_a_finished_run_start_at_the_new_schedules_rate(
    tiny_llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    succeeds(*train_flags(tiny_llama, pairs_file, run, "--quiet", "--set", "train.warmup_ratio=0.0"))
    succeeds("train", "--resume", run, "--max-steps", 6, "--quiet")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [row["learning_rate"] for row in rows if row["kind"] == "train"]
    # Linear from 2e-5 over 3 steps, then the second half of a line over 6.
    assert rates == pytest.approx([2e-5 * share for share in (1, 2 / 3, 1 / 3, 3 / 6, 2 / 6, 1 / 6)])


# Errors --------------------------------------------------------------------------------------------------------------


def test_usage_errors(
    refuses: Callable[..., str], tiny_llama: Path, pairs_file: Path, finished: Path, tmp_path: Path
) -> None:
    flags = train_flags(tiny_llama, pairs_file, tmp_path / "run")
    usage = ExitCode.USAGE
    text = refuses(usage, *flags, "--method", "sampoo", "--set", "trian.seed=1", "--set", "lora.rr=4")
    assert "did you mean 'train'?" in text
    assert "lora.rr: unknown key; did you mean 'r'?" in text
    assert "unknown method 'sampoo'; did you mean 'sampo'?" in refuses(usage, *flags, "--method", "sampoo")
    assert "unknown key" in refuses(usage, *flags, "--set", "train.learning_rat=1")
    assert "did you mean 'learning_rate'?" in refuses(usage, *flags, "--set", "train.learning_rat=1")
    assert "expected section.key=value" in refuses(usage, *flags, "--set", "seed")
    assert "missing; give --model" in refuses(usage, "train", "--data", pairs_file)
    assert "missing; give --data" in refuses(usage, "train", "--model", tiny_llama)
    assert "already there" in refuses(usage, *train_flags(tiny_llama, pairs_file, finished))
    assert "neither a file nor a shipped recipe" in refuses(usage, "train", "--recipe", "quickstarts")
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refuses(usage, *train_flags(tiny_llama, pairs_file, tmp_path / "file" / "run"))
    assert "nothing to resume" in refuses(usage, "train", "--resume", tmp_path)
    assert "method.beta: 0.1 → 0.5" in refuses(usage, "train", "--resume", finished, "--beta", "0.5")
    (tmp_path / "bad.yaml").write_text("model:\n  name: [x\n")
    assert "bad.yaml:3:1: not YAML" in refuses(usage, "train", "--recipe", tmp_path / "bad.yaml")
    assert not (tmp_path / "run").exists()


def test_unknown_flags_are_typers_own_error() -> None:
    outcome = sampo("train", "--modle", "x")
    assert outcome.returncode == 2
    assert "No such option" in outcome.stderr


def test_data_errors(refuses: Callable[..., str], tiny_llama: Path, tmp_path: Path) -> None:
    def with_data(content: str | None, *more: str) -> str:
        path = tmp_path / "d.jsonl"
        if content is not None:
            path.write_text(content)
        return refuses(ExitCode.DATA, *train_flags(tiny_llama, path, tmp_path / "run", *more))

    good = json.dumps(tiny.make_rows(1)[0])
    assert "d.jsonl" in with_data(None)
    assert "d.jsonl:2:" in with_data(f'{good}\n{{"prompt": "x", \n')
    assert "d.jsonl" in with_data("")
    nothing = with_data('{"prompt": "x", "chosen": "same", "rejected": "same"}\n')
    assert "identical" in nothing
    assert "text" in with_data('{"text": "x"}\n')
    assert not (tmp_path / "run").exists()


def test_model_errors(refuses: Callable[..., str], tiny_llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    text = refuses(ExitCode.MODEL, *train_flags(Path("./no/such/model"), pairs_file, tmp_path / "run"))
    assert "there is no folder 'no/such/model'" in text
    assert time.monotonic() - started < 15
    assert "only safetensors are read" in refuses(
        ExitCode.MODEL, *train_flags(_pickled(tiny_llama, tmp_path / "pickled"), pairs_file, tmp_path / "run")
    )
    init = ("--set", "lora.init=pissa")
    assert "no longer be the reference" in refuses(
        ExitCode.MODEL, *train_flags(tiny_llama, pairs_file, tmp_path / "run", *init)
    )
    assert "no adapter_config.json" in refuses(ExitCode.MODEL, "merge", tmp_path)


def _pickled(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in model.iterdir():
        target = "pytorch_model.bin" if file.suffix == ".safetensors" else file.name
        (folder / target).write_bytes(file.read_bytes())
    return folder


def test_bitsandbytes_missing(tiny_llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "site" / "bitsandbytes"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libcudart.so.99: cannot open shared object file')\n")
    flags = train_flags(tiny_llama, pairs_file, tmp_path / "run")
    text = fails(ExitCode.MODEL, *flags, PYTHONPATH=str(tmp_path / "site"))
    assert "bitsandbytes cannot be imported: libcudart.so.99" in text
    assert "--quantization none" in text


def test_no_network_is_one_line(pairs_file: Path, tmp_path: Path) -> None:
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    text = fails(ExitCode.HUB, *train_flags(Path("some/model"), pairs_file, tmp_path / "run"), **environment)
    assert "model 'some/model'" in text
    assert "HF_HUB_OFFLINE" in text


def test_half_a_launcher_is_refused(tiny_llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    """As batch systems and notebooks leave it behind."""
    flags = train_flags(tiny_llama, pairs_file, tmp_path / "run")
    assert "WORLD_SIZE=2" in fails(ExitCode.USAGE, *flags, WORLD_SIZE="2")


def test_a_device_without_room(tmp_path: Path) -> None:
    """A pair of 60,000 tokens, whose mask alone takes 3.6 GB, in a process that may have 5."""
    config = tiny.CONFIGS["llama"]()
    config.max_position_embeddings = 100_000
    model = tiny.save_model(config, tmp_path / "model")
    row = {"prompt": "the same thing " * 40_000, "chosen": "yes", "rejected": "no"}
    (tmp_path / "long.jsonl").write_text((json.dumps(row) + "\n") * 2)
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (5 << 30, 5 << 30));"
    limited += "from sampo_cli.cli import main; main(sys.argv[1:])"
    flags = train_flags(model, tmp_path / "long.jsonl", tmp_path / "run", "--max-length", 60_000)
    command = [sys.executable, "-c", limited, *map(str, flags)]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=300)
    text = check_failure(ExitCode.MEMORY, outcome.returncode, outcome.stdout, outcome.stderr)
    assert "not even one pair fits; the longest has" in text
    assert "lower --max-length" in text


def test_a_run_that_never_got_anywhere_does_not_block_its_folder(
    refuses: Callable[..., str], tiny_llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("")
    (run / "summary.json").write_text("{}")
    succeeds(*train_flags(tiny_llama, pairs_file, run, "--quiet", "--max-steps", 1))
    assert "already there" in refuses(ExitCode.USAGE, *train_flags(tiny_llama, pairs_file, run))


def test_numerics_error(tiny_llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    """A base with a broken weight: the run says which rows it could not score."""
    from safetensors.torch import load_file, save_file

    model = tmp_path / "broken"
    model.mkdir()
    for file in tiny_llama.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    weights: dict[str, Any] = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    text = fails(ExitCode.NUMERICS, *train_flags(model, pairs_file, tmp_path / "run"))
    assert "differ by nan" in text


def test_a_full_disk_is_named(tiny_llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    """A real file system without room, where the machine lets us mount one."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        text = fails(ExitCode.FAILURE, *train_flags(tiny_llama, pairs_file, small / "run"))
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert "no space left" in text


def test_the_resolved_recipe_is_complete(finished: Path) -> None:
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert list(recipe) == ["model", "data", "lora", "method", "train", "iterations", "output"]
    assert recipe["method"]["beta"] == 0.1
    assert recipe["train"]["learning_rate"] == 2e-5
    assert recipe["method"]["reduction"] == "sample"


def test_the_home_of_nobody(refuses: Callable[..., str], tiny_llama: Path, pairs_file: Path) -> None:
    nobody = "~nobody-of-this-name/x"
    flags = ["train", "--model", tiny_llama, "--data", pairs_file]
    for command in ([*flags, "--output", nobody], ["train", "--recipe", nobody], ["merge", nobody]):
        assert f"{nobody}: there is no home of that name" in refuses(ExitCode.USAGE, *command)
    assert "home" in refuses(ExitCode.DATA, "train", "--model", tiny_llama, "--data", nobody)
    assert "there is no folder" in refuses(ExitCode.MODEL, "train", "--model", nobody, "--data", pairs_file)
    assert "no checkpoint" in refuses(ExitCode.USAGE, "train", "--resume", nobody)
