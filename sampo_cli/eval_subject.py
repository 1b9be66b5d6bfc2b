"""`sampo eval`: pairs, answers, benchmarks of one subject, measured one after the other and written as they come.

What is measured is worked out in `eval_pairs.py`, `eval_generate.py`, `suites.py` and `judge.py`; nothing is printed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sampo_cli.config import Recipe
from sampo_cli.dataset import PairDataset, prepare, split
from sampo_cli.disk import expanded, write_text
from sampo_cli.errors import DataError, UsageError
from sampo_cli.eval_generate import GenerationReport
from sampo_cli.eval_generate import summarise as summarise_answers
from sampo_cli.eval_pairs import measure, own_method
from sampo_cli.generate import Completion, Decoding, complete
from sampo_cli.judge import ask_judge, write_answers
from sampo_cli.model import context_length, load_config
from sampo_cli.pair_report import PairReport, summarise
from sampo_cli.policy import Policy, reference
from sampo_cli.prompts import prompt_texts
from sampo_cli.remote import fetch_model
from sampo_cli.subject import Subject, load_subject
from sampo_cli.suites import Result, Suite, run_suite
from sampo_cli.template import load_tokenizer
from sampo_cli.trust import check_inside

Note = Callable[[str], object]

FOLDER = "eval"
"""Where the results go inside a run's folder."""


@dataclass(frozen=True)
class Wanted:
    """What to measure.

    Attributes:
        generate: prompts to answer; 0 for none.
        judge: annotator of alpaca_eval that compares the answers.
        limit: pairs, and examples of each task, at most.
    """

    pairs: bool = True
    generate: int = 0
    decoding: Decoding = field(default_factory=Decoding)
    judge: str | None = None
    suite: Suite | None = None
    limit: int | None = None


@dataclass
class Evaluation:
    """What was measured; None for what was not asked for.

    Attributes:
        data: what the pairs are.
        examples: instruction and answer texts by model, of all prompts.
        folder: where the files are.
    """

    subject: Subject = field(repr=False)
    folder: Path
    data: str | None = None
    pairs: PairReport | None = None
    generation: GenerationReport | None = None
    examples: list[dict[str, Any]] = field(default_factory=list, repr=False)
    judge: dict[str, Any] | None = None
    suite: Suite | None = None
    results: list[Result] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the answers' texts, as JSON can hold it."""
        return {
            **_facts(self.subject),
            "folder": str(self.folder),
            "data": self.data,
            "pairs": self.pairs.to_dict() if self.pairs else None,
            "generation": self.generation.to_dict() if self.generation else None,
            "judge": self.judge,
            "suite": self.suite.name if self.suite else None,
            "results": [result.to_dict() for result in self.results],
        }


def evaluate(subject: Subject, wanted: Wanted, output: str | None, note: Note) -> Evaluation:
    """Measure what is wanted of a subject, and write each part into the output folder as soon as it is there.

    Args:
        output: a folder; `eval` in the run's, or outputs/eval/<name>, if None. Files of the same name are replaced.

    Raises:
        UsageError: nothing to measure on, or a folder that cannot be written.
        DataError, HubError, ModelError, NumericsError, OutOfMemory, SampoError: see the modules that measure.
    """
    check_wanted(subject, wanted)
    done = Evaluation(subject, _output_folder(subject, output))
    tokenizer = load_tokenizer(subject.recipe.model, subject.recipe.data)
    dataset: PairDataset | None = None
    indices: list[int] = []
    if wanted.pairs or wanted.generate:
        dataset, indices = _chosen_pairs(subject, tokenizer)
        done.data = _described(len(indices), wanted.limit, "held-out pairs of the run" if subject.own_data else "pairs")
        note(f"data: {done.data}")
    policy = load_subject(subject)
    note(f"model: {subject.name}, {subject.recipe.model.quantization}, {policy.dtype}, on {policy.causal_lm.device}")
    if dataset is not None and wanted.pairs:
        done.pairs = _pairs(done, policy, dataset, indices[: wanted.limit], note)
    if dataset is not None and wanted.generate:
        _generation(done, policy, tokenizer, dataset, indices, wanted, note)
    if wanted.suite:
        done.suite = wanted.suite
        done.results = run_suite(
            policy,
            tokenizer,
            wanted.suite,
            limit=wanted.limit,
            note=note,
            save=lambda rows: _write_suite(done, rows, wanted.limit),
        )
    return done


def check_wanted(subject: Subject, wanted: Wanted) -> None:
    """Refuse what cannot be measured, before anything is loaded.

    Raises:
        UsageError: no pairs, or a judge without two sets of answers.
    """
    on_pairs = wanted.pairs or wanted.generate
    if on_pairs and not subject.has_data:
        raise UsageError(f"{subject.name}: there is nothing to evaluate on", hint="give pairs with --data, or --suite")
    if on_pairs and subject.own_data and not subject.recipe.data.eval_fraction:
        raise UsageError(f"{subject.name}: the run held no pairs out", hint="give other pairs with --data")
    if wanted.judge and not (wanted.generate and subject.adapter):
        raise UsageError("--judge compares an adapter's answers with its base's", hint="give --generate N as well")


def _output_folder(subject: Subject, output: str | None) -> Path:
    folder = Path("outputs") / FOLDER / _file_name(subject.name)
    if output:
        folder = expanded(output)
    elif subject.run:
        folder = subject.run / FOLDER
        check_inside(folder, subject.run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made: {error.strerror}", hint="give another --output") from error
    return folder


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:100].strip("-.")


def _chosen_pairs(subject: Subject, tokenizer: Any) -> tuple[PairDataset, list[int]]:
    """The pairs, and which of them count: those that the run held out of its own data, or all of other data."""
    recipe = subject.recipe
    config = load_config(recipe.model, fetch_model(recipe.model.name, recipe.model.revision, weights=False))
    dataset = prepare(recipe.data, tokenizer, context=context_length(config))
    if not subject.own_data:
        return dataset, list(range(len(dataset)))
    _, held_out = split(len(dataset), recipe.data.eval_fraction, recipe.train.seed)
    if not len(held_out):
        raise DataError(f"{subject.name}: one pair is too few to hold any out", hint="give other pairs with --data")
    return dataset, held_out.tolist()


def _described(pairs: int, limit: int | None, kind: str) -> str:
    return f"{pairs:,} {kind}" if limit is None or limit >= pairs else f"the first {limit:,} of {pairs:,} {kind}"


def _facts(subject: Subject) -> dict[str, Any]:
    model = subject.recipe.model
    return {
        "name": subject.name,
        "base": model.name,
        "adapter": str(subject.adapter) if subject.adapter else None,
        "quantization": model.quantization,
    }


def _write(done: Evaluation, name: str, content: dict[str, Any]) -> None:
    text = json.dumps({**_facts(done.subject), **content}, indent=2, ensure_ascii=False)
    write_text(done.folder / f"{name}.json", text + "\n")


def _beta(recipe: Recipe) -> float:
    assert recipe.method.beta is not None, "resolve() fills beta"
    return recipe.method.beta


def _pairs(done: Evaluation, policy: Policy, dataset: PairDataset, indices: Sequence[int], note: Note) -> PairReport:
    subject, beta = done.subject, _beta(done.subject.recipe)
    own = own_method(subject.recipe) if subject.run else None
    measured = measure(
        policy,
        [dataset[index] for index in indices],
        beta=beta,
        seed=subject.recipe.train.seed,
        own=own,
        against_base=subject.adapter is not None,
        where=dataset.where,
        note=note,
    )
    report = summarise(measured, beta=beta, own=own)
    _write(done, "pairs", {"data": done.data, **report.to_dict(), "per_pair": measured.to_dict()})
    return report


def _generation(
    done: Evaluation,
    policy: Policy,
    tokenizer: Any,
    dataset: PairDataset,
    indices: Sequence[int],
    wanted: Wanted,
    note: Note,
) -> None:
    """Answers of the adapter and of the base, their numbers, their files, and the judge's verdict if one is asked."""
    subject = done.subject
    texts = prompt_texts(subject.recipe.data, [int(dataset.pair_ids[index]) for index in indices])
    of_prompt = {texts[int(dataset.pair_ids[index])]: index for index in reversed(indices)}  # each prompt once
    chosen = sorted(of_prompt.items(), key=lambda item: item[1])[: wanted.generate]
    prompts = [dataset[index].prompt for _, index in chosen]
    answers: dict[str, list[Completion]] = {}
    if subject.adapter:
        note("answers of the adapter")
        answers["adapter"] = complete(policy, tokenizer, prompts, wanted.decoding, note)
        note("answers of the base")
        with reference(policy):
            answers["base"] = complete(policy, tokenizer, prompts, wanted.decoding, note)
    else:
        answers["base"] = complete(policy, tokenizer, prompts, wanted.decoding, note)
    instructions = [text for text, _ in chosen]
    names = {"adapter": subject.name, "base": subject.base if subject.adapter else subject.name}
    for model, completions in answers.items():
        path = done.folder / f"answers-{model}.json"
        write_answers(path, instructions, [completion.text for completion in completions], names[model])
    done.generation = summarise_answers(answers, wanted.decoding)
    done.examples = [
        {"instruction": text, **{model: asdict(answers[model][place]) for model in answers}}
        for place, text in enumerate(instructions)
    ]
    if wanted.judge:
        note(f"judge: {wanted.judge}")
        given, base = (done.folder / f"answers-{model}.json" for model in ("adapter", "base"))
        done.judge = ask_judge(wanted.judge, given, base, done.folder / "judge")
    report = {"data": done.data, **done.generation.to_dict(), "judge": done.judge, "examples": done.examples}
    _write(done, "generation", report)


def _write_suite(done: Evaluation, rows: Sequence[Result], limit: int | None) -> None:
    from importlib.metadata import version

    assert done.suite is not None, "written while a suite runs"
    content = {"suite": done.suite.name, "about": done.suite.about, "lm_eval": version("lm-eval"), "limit": limit}
    _write(done, _file_name(done.suite.name), {**content, "results": [row.to_dict() for row in rows]})
