"""Writes the table of docs/reliability.md from what a test run found.

    make reliability

runs both the short and the long forms and then this, which reads the lines of JSON that tests/reliability.py wrote:
`python -m scripts.make_reliability FOUND.jsonl`.
"""

from __future__ import annotations

import json
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- made by: make reliability -->", "<!-- end -->"
MOST_SHOWN = 8

PROMISES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "Runs": {
        "`kill -9` at any time: `--resume` goes on, and adapter, metrics and summary are in the end bitwise those of "
        "an undisturbed run": ("test_kill.py::",),
        "`kill -9` while pairs are tokenized loses nothing": (
            "test_broken_files.py::test_killed",
            "test_broken_files.py::test_what_a_killed",
            "test_broken_files.py::test_a_process",
        ),
        "SIGINT, SIGTERM, SIGHUP, a closed terminal: the step is finished and saved, the exit code says why; a second "
        "signal leaves at once": (
            "test_faults.py::test_a_signal",
            "test_faults.py::test_a_second_signal",
            "test_faults.py::test_a_terminal",
            "test_faults.py::test_a_pipe",
            "test_faults.py::test_what_nohup",
        ),
        "A save is an adapter and its optimizer, and fast": ("test_checkpoint.py::test_a_checkpoint_is_adapter",),
        "A full disk is named with its path and what is needed; checkpoints stay whole, nothing half-written": (
            "test_faults.py::test_a_disk",
            "test_faults.py::test_a_full_disk",
            "test_broken_files.py::test_a_full_disk",
            "test_faults.py::test_a_row_that_does_not_fit",
            "test_faults.py::test_a_log_that",
        ),
        "Free space is checked before training, before the reference pass and before a merge": (
            "test_faults.py::test_room",
        ),
        "Two runs on one folder: the second is refused; the lock dies with its process": (
            "test_faults.py::test_a_second_run",
            "test_faults.py::test_two_that_start",
            "test_faults.py::test_the_lock",
        ),
        "A resume with another recipe, data, model, tokenizer or adapter is refused with the differences; harmless "
        "keys may change, and that is recorded": (
            "test_checkpoint.py::test_another_recipe",
            "test_checkpoint.py::test_other_parts",
            "test_checkpoint.py::test_another_adapter",
            "test_checkpoint.py::test_harmless",
            "test_checkpoint.py::test_rounds_keep",
        ),
        "A resume with another micro-batch budget: same pairs, order and positions": (
            "test_trainer.py::test_another_budget",
        ),
        "A loss or gradient that is not finite stops the run, or the step is skipped and counted; rows are named": (
            "test_trainer.py::test_a_loss_that_is_not",
            "test_trainer.py::test_a_step_that_is_not",
            "test_trainer.py::test_too_many_skipped",
            "test_trainer.py::test_a_gradient_that_is_not",
            "test_trainer.py::test_an_evaluation_that_is_not",
        ),
        "Out of memory in the middle: what to lower is named, the checkpoint stays": ("test_faults.py::test_memory",),
        "A tracker that fails in the middle stops nothing": ("test_faults.py::test_a_tracker",),
        "A damaged checkpoint is never picked: the one before is, with a warning; another format is refused by name": (
            "test_checkpoint.py::test_a_damaged",
            "test_checkpoint.py::test_the_one_before",
            "test_checkpoint.py::test_another_format",
            "test_checkpoint.py::test_a_state_that_is_none",
            "test_checkpoint.py::test_what_a_killed",
            "test_checkpoint.py::test_a_folder_that_fails",
            "test_checkpoint.py::test_a_lost_round",
        ),
        "Memory, open files and threads stay over a long run": ("test_long_run.py::",),
    },
    "Data": {
        "Each row is used as it is meant or dropped with a counted reason": ("test_hostile_rows.py::",),
        "A file that cannot be read ends in file, line and reason, exit code 3": (
            "test_broken_files.py::test_broken",
            "test_broken_files.py::test_a_run",
            "test_broken_files.py::test_a_path",
            "test_broken_files.py::test_a_file",
        ),
        "Tokenizers without BOS, EOS, pad or template; templates that raise, or that are no prefix of themselves": (
            "test_hostile_templates.py::",
        ),
    },
    "Security": {
        "Weights are read from safetensors only; a pickle is refused and never opened": (
            "test_security.py::test_a_pickle",
            "test_security.py::test_no_flag",
            "test_security.py::test_a_checkpoint",
            "test_security.py::test_headers",
            "test_checkpoint.py::test_a_state_that_would_run",
        ),
        "Code that comes with a model is not run, unless the command line says so": (
            "test_security.py::test_a_models_own_code",
            "test_security.py::test_code_beside",
            "test_security.py::test_only_the_flag",
            "test_security.py::test_a_config",
            "test_security_settings.py::test_a_loading_script",
            "test_security_settings.py::test_a_script",
        ),
        "Chat templates run in a sandbox": (
            "test_security_settings.py::test_a_chat_template",
            "test_security_settings.py::test_a_templates_name",
            "test_hostile_templates.py::test_templates_cannot",
        ),
        "Recipes, adapter configs, data sets' cards, names of runs and repositories run nothing and lead nowhere": (
            "test_security_settings.py::test_an_adapter",
            "test_security_settings.py::test_a_dry_run",
            "test_security_settings.py::test_a_recipe",
            "test_security_settings.py::test_a_run_of",
            "test_security_settings.py::test_a_data_sets_card",
            "test_security_paths.py::test_a_repositorys",
        ),
        "Links and paths do not lead out of a folder": ("test_security_paths.py::",),
        "A token is in no output, file or process argument": ("test_secrets.py::test_the_token",),
        "What is pushed is a list; what looks like a secret in it is warned of, and masked": (
            "test_secrets.py::test_what",
            "test_secrets.py::test_a_push",
            "test_secrets.py::test_values",
            "test_hub.py::test_plan",
        ),
        "Markdown that is generated escapes what comes from data": ("test_card.py::",),
    },
    "Push and load": {
        "A server that misbehaves: every byte arrives, or the command says what happened and can be repeated": (
            "test_hub.py::",
        ),
    },
}
"""By section: what is promised, and how the ids of the tests begin that try it."""


def table(found: Iterable[Mapping[str, str]]) -> str:
    """The Markdown of all sections, from the lines that a test run wrote.

    Raises:
        SystemExit: a test failed, or a promise has no test that passed.
    """
    lines = list(found)
    parts = []
    for section, promises in PROMISES.items():
        rows = [_row(promise, tests, lines) for promise, tests in promises.items()]
        parts.append("\n".join([f"## {section}", "", "| promise | tests | result |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _row(promise: str, tests: tuple[str, ...], lines: list[Mapping[str, str]]) -> str:
    chosen = [line for line in lines if line["test"].removeprefix("tests/").startswith(tests)]
    outcomes = Counter(line["outcome"] for line in chosen if "outcome" in line)
    if outcomes["failed"] or not outcomes["passed"]:
        raise SystemExit(f"{promise}: {dict(outcomes)}")
    skipped = f", {outcomes['skipped']} skipped" if outcomes["skipped"] else ""
    details = list(dict.fromkeys(line["result"] for line in reversed(chosen) if "result" in line))  # long forms first
    rest = [f"and {len(details) - MOST_SHOWN} more"] if len(details) > MOST_SHOWN else []
    shown = [f"{outcomes['passed']} passed{skipped}", *(_cell(text) for text in details[:MOST_SHOWN]), *rest]
    files = sorted({test.partition("::")[0] for test in tests})
    return f"| {promise} | {', '.join(f'`{name}`' for name in files)} | {'<br>'.join(shown)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main(path: str) -> None:
    found = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "datasets"))
    made = f"{datetime.now(UTC):%Y-%m-%d}, {platform.system()}, Python {platform.python_version()}, {packages}"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    text = f"{BEGIN}\n\nFrom `make reliability`, {made}.\n\n{table(found)}\n\n{END}"
    PAGE.write_text(before + text + after, encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main(*sys.argv[1:])
