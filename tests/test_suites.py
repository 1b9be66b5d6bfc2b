"""Benchmarks: the table of protocols, and real lm-eval on local tasks with local data."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from sampo_cli.cli import main
from sampo_cli.errors import ExitCode, UsageError
from sampo_cli.suites import SUITES, Claim, Suite, _task_manager, find_suite, results, run_claim, run_suite
from tests import tiny
from tests.merge_models import save_adapter

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")


def test_the_papers_numbers() -> None:
    """Those of the rows "Llama-3-8B-Instruct" and "iterative SamPO" of the paper's tables."""
    claims = {claim.task: claim for claim in SUITES["sampo-paper"].claims}
    base = {task: claim.published["Llama-3-8B-Instruct"] for task, claim in claims.items()}
    assert base == {"gsm8k": 75.06, "ifeval": 49.40, "piqa": 80.69, "mmlu": 63.85, "truthfulqa_mc1": 36.47}
    sampo = {task: claim.published["+ iterative SamPO"] for task, claim in claims.items()}
    assert sampo == {"gsm8k": 77.81, "ifeval": 60.55, "piqa": 81.18, "mmlu": 64.12, "truthfulqa_mc1": 44.07}
    assert {task: claim.shots for task, claim in claims.items()} == {
        **{"gsm8k": 8, "ifeval": 3, "piqa": 3, "mmlu": 0, "truthfulqa_mc1": 3},
    }


@needs_lm_eval
def test_the_suites_tasks_are_lm_evals() -> None:
    known = set(_task_manager().all_tasks)
    assert {claim.task for suite in SUITES.values() for claim in suite.claims} <= known


@needs_lm_eval
def test_names_that_are_none() -> None:
    with pytest.raises(UsageError, match="did you mean 'sampo-paper'") as caught:
        find_suite("sampo-papr")
    assert "sampo-paper, open-llm-leaderboard" in str(caught.value.hint)
    with pytest.raises(UsageError, match="'hellaswagg' is no suite and no task of lm-eval; did you mean 'hellaswag'"):
        find_suite("piqa,hellaswagg")
    assert find_suite("piqa, hellaswag").claims == (Claim("piqa", "piqa"), Claim("hellaswag", "hellaswag"))


@pytest.mark.skipif(find_spec("lm_eval") is None or find_spec("langdetect") is not None, reason="all is installed")
def test_what_a_task_imports_is_asked_for_before_hours_of_another() -> None:
    with pytest.raises(UsageError, match="--suite sampo-paper: langdetect") as caught:
        find_suite("sampo-paper")
    assert caught.value.hint == "pip install 'sampo-cli[eval]'"


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_lm_eval_has_to_be_installed() -> None:
    with pytest.raises(UsageError, match="lm-eval is not installed") as caught:
        find_suite("sampo-paper")
    assert caught.value.hint == "pip install 'sampo-cli[eval]'"


QUESTIONS = 60


@pytest.fixture
def tasks(tmp_path: Path) -> Callable[..., Path]:
    """Writes a task of lm-eval whose data lie beside it; more keys of its YAML may be given."""
    generator = np.random.default_rng(0)
    rows = [
        {
            "question": " ".join(generator.choice(tiny.WORDS, 4)),
            "choices": [str(word) for word in generator.choice(tiny.WORDS, 2, replace=False)],
            "answer": int(generator.integers(2)),
        }
        for _ in range(QUESTIONS)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(name: str, **more: Any) -> Path:
        content = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
            "output_type": "multiple_choice",
            "test_split": "test",
            "fewshot_split": "test",
            "doc_to_text": "{{question}}?",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content | more))
        return path

    return write


def right_answers(model: Any, tokenizer: Any, rows: Path) -> list[bool]:
    """By the model's own logits: which questions have the likelier choice as their answer."""
    found = []
    for row in map(json.loads, rows.read_text().splitlines()):
        totals = []
        for choice in row["choices"]:
            prompt, whole = (
                tokenizer(text).input_ids for text in (f"{row['question']}?", f"{row['question']}? {choice}")
            )
            with torch.no_grad():
                logps = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            totals.append(sum(float(logps[i - 1, whole[i]]) for i in range(len(prompt), len(whole))))
        found.append(int(np.argmax(totals)) == row["answer"])
    return found


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


@needs_lm_eval
def test_a_local_task_on_the_base_with_its_adapter(
    tiny_llama: Path, tmp_path: Path, tasks: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """lm-eval scores the model in memory: the adapter counts, and the base alone gives another number."""
    adapter, task = save_adapter(tmp_path / "adapter", tiny_llama), tasks("colours")
    (tmp_path / "noisy.py").write_text("def keep(rows):\n    print('a task that prints')\n    return rows\n")
    task.write_text(task.read_text() + "process_docs: !function noisy.keep\n")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    expected = {"alone": right_answers(base, tokenizer, tmp_path / "rows.jsonl")}
    with_adapter = PeftModel.from_pretrained(base, adapter).eval()
    expected["with"] = right_answers(with_adapter, tokenizer, tmp_path / "rows.jsonl")
    assert sum(expected["alone"]) != sum(expected["with"])
    flags = ["--suite", task, "--quantization", "none", "--set", "model.dtype=float32", "--json", "--output"]
    for name, more in (("alone", []), ("with", ["--adapter", adapter])):
        capfd.readouterr()
        assert run("eval", tiny_llama, *more, *flags, tmp_path / name) == 0
        shown = capfd.readouterr()
        assert "a task that prints" in shown.err
        found = json.loads(shown.out)
        assert found["pairs"] is None
        assert [result["metric"] for result in found["results"]] == ["acc,none"]
        assert found["results"][0]["value"] == pytest.approx(np.mean(expected[name]))
        assert found["results"][0]["examples"] == QUESTIONS
        written = json.loads((tmp_path / name / "colours.json").read_text())
        assert written["results"] == found["results"]
        assert written["lm_eval"]


@needs_lm_eval
def test_shots_that_a_task_ignores_are_told(tiny_llama: Path, tasks: Callable[..., Path]) -> None:
    """A task that pins 0 shots, as ifeval does, runs with 0 whatever is claimed; another takes the claim."""
    from sampo_cli.policy import Policy

    policy, tokenizer = Policy(tiny.make_model(tiny.CONFIGS["llama"]())), AutoTokenizer.from_pretrained(tiny_llama)
    published = {"somebody": 50.0}
    pinned = Claim("Pinned", str(tasks("pinned", num_fewshot=0)), 2, "acc,none", published=published)
    free = Claim("Free", str(tasks("free")), 2, "acc,none")
    notes: list[str] = []
    saved: list[int] = []
    rows = run_suite(
        policy,
        tokenizer,
        Suite("two", (pinned, free)),
        limit=5,
        note=notes.append,
        save=lambda found: saved.append(len(found)),
    )
    assert [(row.claimed_shots, row.shots, row.shots_ignored) for row in rows] == [(2, 0, True), (2, 2, False)]
    assert [row.published for row in rows] == [published, {}]
    assert [(row.examples, row.limited) for row in rows] == [(5, True), (5, True)]
    assert saved == [1, 2]
    assert notes == [
        "benchmark 1 of 2: Pinned",
        "  pinned: 2 shots are claimed, and the task ran with 0",
        "benchmark 2 of 2: Free",
    ]


@needs_lm_eval
def test_a_group_is_one_row_of_its_aggregate(tiny_llama: Path, tasks: Callable[..., Path]) -> None:
    """As mmlu: the claim is about the group, and its examples are those of all subtasks."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = tasks("first").parent
    aggregate = [{"metric": "acc", "weight_by_size": True}]
    group = {"group": "both", "task": ["first", tasks("second").stem], "aggregate_metric_list": aggregate}
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    model = HFLM(tiny.make_model(tiny.CONFIGS["llama"]()), tokenizer=AutoTokenizer.from_pretrained(tiny_llama))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model, tasks=["both"], num_fewshot=1, log_samples=False, task_manager=manager)
    (row,) = results(Claim("Both", "both", 1, "acc,none"), found, limited=False)
    assert (row.task, row.examples, row.shots, row.limited) == ("both", 2 * QUESTIONS, 1, False)
    assert row.value == pytest.approx(np.mean([found["results"][name]["acc,none"] for name in ("first", "second")]))
    found["n-samples"]["first"]["effective"] -= 1  # a limit that cuts one subtask and not the other
    assert results(Claim("Both", "both", 1, "acc,none"), found, limited=True)[0].limited


@needs_lm_eval
def test_errors_of_a_task(
    tiny_llama: Path, tmp_path: Path, tasks: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    from sampo_cli.policy import Policy

    policy, tokenizer = Policy(tiny.make_model(tiny.CONFIGS["llama"]())), AutoTokenizer.from_pretrained(tiny_llama)
    with pytest.raises(UsageError, match="has no metric acc_norm,none"):
        run_claim(policy, tokenizer, Claim("Colours", str(tasks("colours")), 0, "acc_norm,none"))
    missing = tasks("missing", dataset_kwargs={"data_files": {"test": str(tmp_path / "none.jsonl")}})
    assert run("eval", tiny_llama, "--suite", missing, "--output", tmp_path / "out", "--quiet") == ExitCode.FAILURE
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert f"error: benchmark '{missing}': " in error
