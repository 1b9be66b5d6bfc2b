"""Benchmarks through EleutherAI's lm-eval: which tasks, with how many shots, and the numbers that papers report.

The model is the one in memory, base with adapter; nothing is merged or loaded again. lm-eval is imported only where a
suite is asked for. Its tasks fetch their own data from the Hub.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sampo_cli.errors import SampoError, UsageError, nearest
from sampo_cli.policy import Policy
from sampo_cli.remote import first_line, hub_errors

CPU_BATCH = 8

INSTALL = "pip install 'sampo-cli[eval]'"


@dataclass(frozen=True)
class Claim:
    """A benchmark as a paper says it was run.

    Attributes:
        title: how the paper calls it.
        task: lm-eval's name, or the path of a task's YAML file.
        shots: examples in the prompt; None for the task's own number.
        metric: lm-eval's "metric,filter"; None for all that the task has.
        remark: what differs between what is claimed and what lm-eval does.
        published: numbers to compare with, in percent, by model.
        needs: packages that the task imports beside lm-eval's own.
    """

    title: str
    task: str
    shots: int | None = None
    metric: str | None = None
    remark: str = ""
    published: Mapping[str, float] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite:
    """Benchmarks that belong together. `about`: where the protocol and the numbers come from."""

    name: str
    claims: tuple[Claim, ...]
    about: str = ""


@dataclass(frozen=True)
class Result:
    """One metric of one task.

    Attributes:
        claimed_shots, shots: asked for, and what the task really had in its prompts (None where subtasks differ).
        value, stderr: as lm-eval gives them, shares of 1 for accuracies; stderr None where it has none.
        examples: how many were run; `limited` where that is not all of them.
    """

    title: str
    task: str
    metric: str
    claimed_shots: int | None
    shots: int | None
    value: float
    stderr: float | None
    examples: int
    limited: bool
    remark: str
    published: dict[str, float]

    @property
    def shots_ignored(self) -> bool:
        """The task does not take the number of shots that is claimed."""
        return self.claimed_shots is not None and self.shots != self.claimed_shots

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {**asdict(self), "shots_ignored": self.shots_ignored}


_MODELS = ("Llama-3-8B-Instruct", "+ DPO", "+ iterative DPO", "+ iterative SamPO")


def _of_the_paper(*numbers: float) -> dict[str, float]:
    return dict(zip(_MODELS, numbers, strict=True))


SUITES = {
    "sampo-paper": Suite(
        "sampo-paper",
        (
            Claim("GSM8K", "gsm8k", 8, "exact_match,strict-match", published=_of_the_paper(75.06, 75.59, 74.91, 77.81)),
            Claim(
                "IFEval",
                "ifeval",
                3,
                "inst_level_strict_acc,none",
                published=_of_the_paper(49.40, 51.80, 52.52, 60.55),
                needs=("langdetect", "immutabledict", "nltk"),
            ),
            Claim("PiQA", "piqa", 3, "acc,none", published=_of_the_paper(80.69, 81.94, 81.66, 81.18)),
            Claim(
                "MMLU",
                "mmlu",
                0,
                "acc,none",
                "claimed as normalized accuracy, which the group does not have",
                _of_the_paper(63.85, 64.06, 64.02, 64.12),
            ),
            Claim(
                "TruthfulQA mc1",
                "truthfulqa_mc1",
                3,
                "acc,none",
                "its prompt has 6 questions of its own",
                _of_the_paper(36.47, 40.39, 39.90, 44.07),
            ),
        ),
        "arXiv 2406.10957, numbers of Llama-3-8B-Instruct in percent; its AlpacaEval2 is --generate with --judge",
    ),
    "open-llm-leaderboard": Suite(
        "open-llm-leaderboard",
        (
            Claim("ARC challenge", "arc_challenge", 25, "acc_norm,none"),
            Claim("HellaSwag", "hellaswag", 10, "acc_norm,none"),
            Claim("MMLU", "mmlu", 5, "acc,none"),
            Claim("TruthfulQA mc2", "truthfulqa_mc2", 0, "acc,none", "its prompt has 6 questions of its own"),
        ),
        "the first Open LLM Leaderboard, without the tasks that it took on later",
    ),
}


def find_suite(text: str) -> Suite:
    """The suite of that name, or one made of a comma-separated list of lm-eval's tasks and of YAML files.

    Raises:
        UsageError: lm-eval or what a task imports is not installed, or lm-eval does not know a task.
    """
    if find_spec("lm_eval") is None:
        raise UsageError(f"--suite {text}: lm-eval is not installed", hint=INSTALL)
    if text in SUITES:
        missing = [name for claim in SUITES[text].claims for name in claim.needs if find_spec(name) is None]
        if missing:
            raise UsageError(f"--suite {text}: {', '.join(missing)} not installed", hint=INSTALL)
        return SUITES[text]
    tasks = [task.strip() for task in text.split(",")]
    known = _task_manager().all_tasks
    for task in tasks:
        if task not in known and not Path(task).expanduser().is_file():
            raise UsageError(
                f"--suite: '{task}' is no suite and no task of lm-eval{nearest(task, [*SUITES, *known])}",
                hint=f"suites: {', '.join(SUITES)}; `lm_eval ls tasks` lists the tasks; a task may be a YAML file",
            )
    claims = [Claim(Path(task).stem if task not in known else task, task) for task in tasks]
    return Suite(text if len(claims) > 1 else claims[0].title, tuple(claims))


@cache
def _task_manager() -> Any:
    """lm-eval's index of its tasks; making it reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def run_claim(policy: Policy, tokenizer: Any, claim: Claim, limit: int | None = None) -> list[Result]:
    """Run one benchmark on the policy, with its adapter if it has one.

    Args:
        limit: examples of each task, the first ones; None for all.

    Raises:
        HubError: the task's data cannot be fetched.
        SampoError: the task cannot be run, such as for want of a package.
        UsageError: the task does not have the metric.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a model that is in memory already
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    device = policy.causal_lm.device.type
    model = HFLM(
        pretrained=policy.causal_lm,
        tokenizer=tokenizer,
        batch_size="auto" if device == "cuda" else CPU_BATCH,
        mixed_precision_dtype=None if policy.dtype == torch.float32 else policy.dtype,
    )
    try:
        with hub_errors(f"benchmark '{claim.task}'"), redirect_stdout(sys.stderr):  # some tasks print
            found: Any = simple_evaluate(
                model,
                tasks=[claim.task],
                num_fewshot=claim.shots,
                limit=limit,
                log_samples=False,
                task_manager=_task_manager(),
            )
    except ImportError as error:
        raise SampoError(
            f"benchmark '{claim.task}': {first_line(error)}", hint=f"{INSTALL}, or what the message names"
        ) from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise SampoError(
            f"benchmark '{claim.task}': {first_line(error)}", hint="--debug shows where in lm-eval that is"
        ) from error
    return results(claim, found, limited=limit is not None)


def results(claim: Claim, found: Mapping[str, Any], *, limited: bool) -> list[Result]:
    """The metrics that the claim is about, of what `lm_eval.simple_evaluate` returned for its task.

    Raises:
        UsageError: the task does not have the metric.
    """
    table = {**found["results"], **found.get("groups", {})}
    names = [claim.task] if claim.task in table else list(found["results"])
    shots = {found["n-shot"].get(task, 0) for task in found["configs"]}
    counts = [found["n-samples"][task] for task in found["configs"]]
    rows = []
    for name in names:
        for metric, value in table[name].items():
            if "," not in metric or "_stderr," in metric or claim.metric not in (None, metric):
                continue
            measure, _, kept = metric.partition(",")
            stderr = table[name].get(f"{measure}_stderr,{kept}")
            rows.append(
                Result(
                    title=claim.title if len(names) == 1 else name,
                    task=name,
                    metric=metric,
                    claimed_shots=claim.shots,
                    shots=min(shots) if len(shots) == 1 else None,
                    value=float(value),
                    stderr=stderr if isinstance(stderr, float) else None,
                    examples=sum(count["effective"] for count in counts),
                    limited=limited and any(count["effective"] < count["original"] for count in counts),
                    remark=claim.remark,
                    published=dict(claim.published),
                )
            )
    if not rows:
        raise UsageError(f"benchmark '{claim.task}' has no metric {claim.metric}", hint="install another lm-eval")
    return rows


def run_suite(
    policy: Policy,
    tokenizer: Any,
    suite: Suite,
    *,
    limit: int | None,
    note: Callable[[str], object],
    save: Callable[[list[Result]], object],
) -> list[Result]:
    """All benchmarks of a suite, one after the other; `save` is given what there is after each.

    Raises:
        HubError, SampoError, UsageError: see `run_claim`; what was measured before has been saved.
    """
    found: list[Result] = []
    for number, claim in enumerate(suite.claims, 1):
        note(f"benchmark {number} of {len(suite.claims)}: {claim.title}")
        rows = run_claim(policy, tokenizer, claim, limit)
        for row in rows:
            if row.shots_ignored:
                note(f"  {row.task}: {row.claimed_shots} shots are claimed, and the task ran with {row.shots}")
        found += rows
        save(found)
    return found
