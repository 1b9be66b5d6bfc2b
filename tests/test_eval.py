"""`sampo eval` on pairs and answers: by hand, against transformers and PEFT alone, and against the run's numbers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from sampo_cli.batch import Draw, Pair
from sampo_cli.cli import main
from sampo_cli.config import DataConfig
from sampo_cli.errors import ExitCode, NumericsError
from sampo_cli.eval_generate import summarise as summarise_answers
from sampo_cli.eval_pairs import Measured, measure, own_method
from sampo_cli.generate import Completion, Decoding, answer, complete, repeated_share
from sampo_cli.judge import ask_judge, write_answers
from sampo_cli.pair_report import summarise
from sampo_cli.plan import resolve_recipe
from sampo_cli.policy import Policy
from sampo_cli.prompts import prompt_texts
from sampo_cli.subject import find_subject, load_subject
from tests import tiny
from tests.conftest import Sampo
from tests.merge_models import save_adapter


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps on an unquantized tiny base, evaluated every second one."""
    folder = tmp_path_factory.mktemp("trained")
    data = tiny.write_pairs(folder / "pairs.jsonl", 40)
    flags = ["--model", tiny_llama, "--data", data, "--output", folder / "run", "--batch-pairs", 8, "--max-steps", 6]
    flags += ["--quantization", "none", "--eval-fraction", 0.4, "--learning-rate", 3e-3, "--quiet"]
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in ["train", *flags, "--set", "train.eval_every=2", "--set", "model.dtype=float32"]])
    assert end.value.code == 0
    return folder / "run"


# Pairs ---------------------------------------------------------------------------------------------------------------


def columns(**values: list[float]) -> dict[str, Any]:
    return {name: np.array(value, float) for name, value in values.items()}


def test_a_report_by_hand() -> None:
    measured = Measured(
        pair_ids=np.arange(4),
        margins=columns(sum=[3.0, 1.0, -1.0, 0.0]),
        **columns(chosen_tokens=[40, 20, 10, 5], rejected_tokens=[10, 20, 40, 10]),
        **columns(chosen_logps=[-10, -20, -30, -40], rejected_logps=[-1, -2, -3, -4]),
        **columns(base_chosen_logps=[-12, -20, -30, -40], base_rejected_logps=[-1, -2, -3, -8]),
        **columns(kl=[1.0, 2.0, 3.0, 1.75], own_losses=[0.5, 0.7, 0.9, 0.7]),
    )
    report = summarise(measured, beta=0.1, own=None)
    reward = report.rewards["sum"]
    assert reward.accuracy.value == 0.5  # a margin of 0 is no win
    assert reward.margin.value == pytest.approx(0.75)
    # gaps 30, 0, -30, -5: ranks 4, 3, 1, 2; margins' ranks 4, 3, 1, 2
    assert reward.spearman.value == pytest.approx(1)
    assert [(bucket.pairs, bucket.accuracy.value) for bucket in reward.buckets] == [
        *((1, 0.0), (1, 0.0), (1, 1.0), (0, None), (1, 1.0)),
    ]
    assert report.logps["chosen"].model.value == -25
    assert report.logps["chosen"].difference is not None
    assert report.logps["chosen"].difference.value == 0.5
    assert report.logps["rejected"].difference is not None
    assert report.logps["rejected"].difference.value == 1
    # 7.75 nats over 155 tokens, not the mean of four shares
    assert report.kl is not None
    assert report.kl.value == pytest.approx(0.05)
    assert report.loss is not None
    assert report.loss.value == pytest.approx(0.7)
    assert report.loss.low is not None
    assert report.loss.high is not None
    assert 0.5 <= report.loss.low <= 0.7 <= report.loss.high <= 0.9


def own_scores(model: Any, prompt: Any, response: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of a response's tokens from the model's own logits, [T]; of all tokens at these positions, [T, V]."""
    ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0].double().log_softmax(-1)[len(prompt) - 1 : -1]
    return logps.gather(1, ids[0, len(prompt) :, None])[:, 0], logps


def test_scores_are_those_of_transformers_and_peft(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", tiny_llama)
    subject = find_subject(str(tiny_llama), adapter=str(adapter), quantization="none", settings=["model.dtype=float32"])
    generator = np.random.default_rng(0)
    parts = [[generator.integers(3, 300, n, dtype=np.int32) for n in (5, n_w, n_l)] for n_w, n_l in ((3, 9), (8, 4))]
    pairs = [Pair(7 - number, *part) for number, part in enumerate(parts)]
    found = measure(load_subject(subject), pairs, beta=0.5, seed=3, own=None, against_base=True)
    assert found.pair_ids.tolist() == [6, 7]
    assert found.chosen_tokens.tolist() == [8, 3]

    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), adapter).eval()
    for place, pair in enumerate(sorted(pairs, key=lambda pair: pair.pair_id)):
        sides = [(own_scores(with_adapter, pair.prompt, y), own_scores(base, pair.prompt, y)) for y in pair_sides(pair)]
        ratios = [model[0] - plain[0] for model, plain in sides]
        kl = sum((plain[1].exp() * (plain[1] - model[1])).sum() for model, plain in sides)
        assert found.kl is not None
        assert found.kl[place] == pytest.approx(float(kl), rel=1e-3)
        assert found.kl[place] > 0.01
        assert found.chosen_logps[place] == pytest.approx(float(sides[0][0][0].sum()), rel=1e-4)
        assert found.base_rejected_logps is not None
        assert found.base_rejected_logps[place] == pytest.approx(float(sides[1][1][0].sum()), rel=1e-4)
        expected = {"sum": ratios[0].sum() - ratios[1].sum(), "mean": ratios[0].mean() - ratios[1].mean()}
        weights = torch.from_numpy(Draw("sample", 3, 0).weights(pair, 0)).split([len(y) for y in pair_sides(pair)])
        expected["sample"] = (weights[0] * ratios[0]).sum() - (weights[1] * ratios[1]).sum()
        for name, value in expected.items():
            assert found.margins[name][place] == pytest.approx(0.5 * float(value), rel=1e-3, abs=1e-5), name


def pair_sides(pair: Pair) -> tuple[Any, Any]:
    return pair.chosen, pair.rejected


def test_the_loss_is_the_runs_own(trained: Path, sampo: Sampo) -> None:
    """Loss, accuracy and margin of the best adapter are those of the row that it was kept for."""
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    best = min((row for row in rows if row["kind"] == "eval"), key=lambda row: row["loss"])
    code, out, err = sampo("eval", trained, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["data"] == "16 held-out pairs of the run"
    assert found["pairs"]["loss"]["value"] == pytest.approx(best["loss"], abs=1e-6)
    sampled = found["pairs"]["rewards"]["sample"]
    assert sampled["accuracy"]["value"] == best["accuracy"]
    assert sampled["margin"]["value"] == pytest.approx(best["margin"], abs=1e-6)
    assert set(found["pairs"]["rewards"]) == {"sample", "sum", "mean"}
    kept = json.loads((trained / "eval" / "pairs.json").read_text())
    assert kept["rewards"] == found["pairs"]["rewards"]
    assert np.mean(kept["per_pair"]["own_losses"]) == pytest.approx(best["loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("method", "own"), [("simpo", True), ("dpo", False), ("dpo-sft", True), ("tdpo", True), ("ipo", True)]
)
def test_every_kind_of_loss_can_be_computed(method: str, own: bool, tiny_llama: Path, tmp_path: Path) -> None:
    """Methods without a reference, with a likelihood term, with a KL: their own margin stands beside the three."""
    tree = {"model": {"name": str(tiny_llama)}, "data": {"sources": ["x"]}, "method": {"name": method}}
    adapter = save_adapter(tmp_path / "adapter", tiny_llama)
    subject = find_subject(str(tiny_llama), adapter=str(adapter), quantization="none")
    pairs = [Pair(0, *(np.arange(3, 3 + n, dtype=np.int32) for n in (4, 5, 7)))]
    the_method = own_method(resolve_recipe(tree))
    assert the_method is not None
    measured = measure(load_subject(subject), pairs, beta=0.1, seed=0, own=the_method, against_base=True)
    report = summarise(measured, beta=0.1, own=the_method)
    assert report.loss is not None
    assert report.loss.value is not None
    assert np.isfinite(report.loss.value)
    assert ("own" in report.rewards) == (own and method != "dpo-sft")


def test_a_loss_that_remembers_its_steps_is_left_out() -> None:
    tree = {"model": {"name": "m"}, "data": {"sources": ["x"]}, "method": {"name": "bco-pair"}}
    assert own_method(resolve_recipe(tree)) is None


def test_a_base_alone_is_ranked_by_its_log_probs(
    tiny_llama: Path, pairs_file: Path, sampo: Sampo, tmp_path: Path
) -> None:
    code, out, err = sampo(
        *("eval", tiny_llama, "--data", pairs_file, "--limit", 5, "--output", tmp_path / "out", "--json"),
        *("--set", "model.dtype=float32"),
    )
    assert code == 0, err
    found = json.loads(out)
    assert (found["adapter"], found["quantization"]) == (None, "none")
    assert set(found["pairs"]["rewards"]) == {"sum", "mean"}
    assert found["pairs"]["kl"] is found["pairs"]["loss"] is found["pairs"]["beta"] is None
    kept = json.loads((tmp_path / "out" / "pairs.json").read_text())["per_pair"]
    assert kept["pair_ids"] == [0, 1, 2, 3, 4]
    differences = np.subtract(kept["chosen_logps"], kept["rejected_logps"])
    assert kept["margins"]["sum"] == pytest.approx(differences.tolist(), rel=1e-6)
    per_token = np.divide(kept["chosen_logps"], kept["chosen_tokens"])
    per_token -= np.divide(kept["rejected_logps"], kept["rejected_tokens"])
    assert kept["margins"]["mean"] == pytest.approx(per_token.tolist(), rel=1e-4, abs=1e-6)
    assert found["pairs"]["rewards"]["sum"]["accuracy"]["value"] == (differences > 0).mean()


def test_the_subject_may_be_a_run_its_adapter_or_a_base_with_it(trained: Path, tiny_llama: Path, sampo: Sampo) -> None:
    """All three are the same model; without the recipe beside it, an adapter knows its base and quantization."""
    whole = find_subject(str(trained))
    inner = find_subject(str(trained / "adapter"))
    given = find_subject(str(tiny_llama), adapter=str(trained))
    assert whole == inner
    assert whole.own_data
    assert (given.recipe.model.name, given.adapter, given.run) == (str(tiny_llama), whole.adapter, trained)
    apart = trained.parent / "apart"
    if not apart.exists():
        apart.mkdir()
        for path in (trained / "adapter").iterdir():
            (apart / path.name).write_bytes(path.read_bytes())
    alone = find_subject(str(apart), data=["pairs.jsonl"])
    assert (alone.name, alone.run, alone.own_data) == ("apart", None, False)
    assert (alone.recipe.model.name, alone.recipe.model.quantization) == (str(tiny_llama), "none")
    assert alone.recipe.data.sources == ["pairs.jsonl"]


def test_log_probs_that_are_not_finite_name_their_rows() -> None:
    model = tiny.make_model(tiny.CONFIGS["llama"]())
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    pair = Pair(4, *(np.arange(3, 8, dtype=np.int32) for _ in range(3)))
    with pytest.raises(NumericsError, match=r"for 1 of 1 pairs: rows.jsonl:5"):
        measure(
            Policy(model), [pair], beta=1, seed=0, own=None, against_base=False, where=lambda i: f"rows.jsonl:{i + 1}"
        )


# Answers -------------------------------------------------------------------------------------------------------------


def test_repetition_by_hand() -> None:
    # 1 2 3 4 | 2 3 4 1 | 3 4 1 2 | 4 1 2 3 | 1 2 3 4 : the last was there before
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated_share([5] * 10) == pytest.approx(6 / 7)
    assert repeated_share([1, 2, 3]) == 0


def test_answers_in_numbers() -> None:
    def given(*tokens: int) -> list[Completion]:
        return [Completion("", count, count < 9, 0.5) for count in tokens]

    report = summarise_answers({"adapter": given(2, 4, 9), "base": given(1, 1, 1)}, Decoding())
    assert report.models["adapter"].mean_tokens.value == 5
    assert report.models["adapter"].median_tokens.value == 4
    assert report.models["adapter"].ended.value == pytest.approx(2 / 3)
    assert report.mean_difference is not None
    assert (report.mean_difference.value, report.mean_difference.low, report.mean_difference.high) == (4, 1, 8)
    assert report.median_difference is not None
    assert report.median_difference.value == 3
    assert summarise_answers({"base": given(3)}, Decoding()).mean_difference is None


def test_prompts_are_answered_as_one_by_one_and_by_the_seed() -> None:
    policy, tokenizer = Policy(tiny.make_model(tiny.CONFIGS["llama"]())), tiny.make_tokenizer()
    texts = ["one", "the user and the assistant say the same thing", "again"]
    prompts = [
        np.array(
            tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        )
        for text in texts
    ]
    greedy = complete(policy, tokenizer, prompts, Decoding(12))
    expected = answer(policy, tokenizer, texts, max_new_tokens=12)
    assert [(one.text, one.tokens, one.ended) for one in greedy] == [
        (one.text, one.tokens, one.ended) for one in expected
    ]
    torch.manual_seed(5)
    undisturbed = torch.rand(1)
    torch.manual_seed(5)
    sampled = [complete(policy, tokenizer, prompts, Decoding(12, 1.0, seed)) for seed in (1, 1, 2)]
    assert torch.rand(1) == undisturbed
    assert sampled[0] == sampled[1] != sampled[2]


def test_prompts_as_text(tmp_path: Path) -> None:
    rows = [
        {"prompt": "one?", "chosen": "a", "rejected": "b"},
        {"prompt": "same", "chosen": "a", "rejected": "a"},
        {"system": "Be brief.", "question": "two?", "chosen": "a", "rejected": "b"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prompt_texts(DataConfig(sources=[str(path), str(path)]), {0, 2, 3}) == {
        0: "one?",
        2: "System: Be brief.\n\nUser: two?",
        3: "one?",
    }


def test_answers_of_a_run_and_their_files(trained: Path, tiny_llama: Path, sampo: Sampo) -> None:
    arguments = ("eval", trained, "--generate", 4, "--max-new-tokens", 8, "--output", trained.parent / "answers")
    code, out, err = sampo(*arguments)
    assert code == 0, err
    assert "answers to 4 prompts, greedy" in out
    report = json.loads((trained.parent / "answers" / "generation.json").read_text())
    assert report["decoding"] == {"max_new_tokens": 8, "temperature": 0.0, "seed": 0}
    for model, generator in (("adapter", "run"), ("base", "llama")):
        rows = json.loads((trained.parent / "answers" / f"answers-{model}.json").read_text())
        assert [set(row) for row in rows] == [{"instruction", "output", "generator"}] * 4
        assert {row["generator"] for row in rows} == {generator}
        assert [row["output"] for row in rows] == [example[model]["text"] for example in report["examples"]]
        lengths = [example[model]["tokens"] for example in report["examples"]]
        assert report["models"][model]["mean_tokens"]["value"] == np.mean(lengths)
    prompts = [json.loads(line)["prompt"] for line in (trained.parent / "pairs.jsonl").read_text().splitlines()]
    instructions = [example["instruction"] for example in report["examples"]]
    assert set(instructions) <= set(prompts)
    plain = Policy(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32))
    expected = answer(plain, AutoTokenizer.from_pretrained(tiny_llama), instructions, max_new_tokens=8)
    assert [example["base"]["text"] for example in report["examples"]] == [one.text for one in expected]
    assert [example["adapter"]["text"] for example in report["examples"]] != [one.text for one in expected]


def test_the_files_are_read_by_alpaca_evals_own_loader(tmp_path: Path) -> None:
    alpaca = pytest.importorskip("alpaca_eval")
    write_answers(tmp_path / "answers-base.json", ["Why?", "Wie?"], ["because", "so ✓\n"], "base")
    table = alpaca.utils.load_or_convert_to_dataframe(tmp_path / "answers-base.json")
    assert table.to_dict("list") == {
        "instruction": ["Why?", "Wie?"],
        "output": ["because", "so ✓\n"],
        "generator": ["base", "base"],
    }
    assert alpaca.utils.get_generator_name(None, table) == "base"


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    """An annotator of alpaca_eval that says the same of every pair: that the first answer it is shown is better."""
    folder = tmp_path / "judges" / "first"
    folder.mkdir(parents=True)
    (folder / "prompt.txt").write_text("{instruction}\n{output_1}\n{output_2}")
    (folder / "configs.yaml").write_text(
        yaml.safe_dump(
            {
                "first": {
                    "prompt_template": "first/prompt.txt",
                    "fn_completions": "test_completions",
                    "completions_kwargs": {"value": "Output (a)"},
                    "completion_parser_kwargs": {"outputs_to_match": {1: r"Output \(a\)", 2: r"Output \(b\)"}},
                    "batch_size": 1,
                }
            }
        )
    )
    return folder


def judged(folder: Path, judge: Path) -> dict[str, Any]:
    """The verdict on 60 pairs of answers; the adapter's are longer by up to 6 words."""
    instructions = [f"Question {number}?" for number in range(60)]
    write_answers(folder / "base.json", instructions, ["base"] * 60, "base")
    write_answers(folder / "adapter.json", instructions, ["run " + "word " * (n % 7) for n in range(60)], "run")
    return ask_judge(str(judge), folder / "adapter.json", folder / "base.json", folder / "out")


def test_a_judge_through_alpaca_eval(tmp_path: Path, judge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """alpaca_eval shows the two answers in an order of its own, so the same verdict wins about half of the time."""
    pytest.importorskip("alpaca_eval")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = judged(tmp_path, judge)
    annotations = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert len(annotations) == found["n_total"] == 60
    wins = sum(row["preference"] == 2 for row in annotations)
    assert found["win_rate"] == pytest.approx(100 * wins / 60)
    assert 20 < found["win_rate"] < 80
    assert found["length_controlled_winrate"] is None
    assert found["note"].startswith("no length control: ")


def test_a_length_controlled_win_rate(tmp_path: Path, judge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the file that alpaca_eval fetches for it in the Hub's cache: alpaca_eval's own model of length is fitted.

    The file says how difficult AlpacaEval's instructions are, which has nothing to do with the pairs' prompts.
    """
    pytest.importorskip("alpaca_eval")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    header = "model,index,preference,instruction_difficulty,std_delta_len,not_gamed_baseline\n"
    rates, difficulties = [], [0.1] * 805
    for case in ("any difficulty", "one that goes with the verdicts"):
        repository = tmp_path / case / "datasets--tatsu-lab--alpaca_eval"
        (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        rows = "".join(f"m,{number},0.5,{value},0.2,False\n" for number, value in enumerate(difficulties))
        (repository / "snapshots" / ("0" * 40) / "df_gamed.csv").write_text(header + rows)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / case))
        found = judged(tmp_path, judge)
        assert "note" not in found
        assert found["length_controlled_winrate"] == pytest.approx(found["win_rate"], abs=15)
        rates.append(found["length_controlled_winrate"])
        verdicts = json.loads((tmp_path / "out" / "annotations.json").read_text())
        difficulties = [6 * verdict["preference"] - 9 for verdict in verdicts] + [0] * 745
    assert 0 < rates[0] == rates[1] < 100


# What is refused -----------------------------------------------------------------------------------------------------


def test_refusals(trained: Path, tiny_llama: Path, pairs_file: Path, tmp_path: Path, sampo: Sampo) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "recipe.yaml").write_text((trained / "recipe.yaml").read_text())
    code_run = tmp_path / "code-run"
    (code_run / "adapter").mkdir(parents=True)
    (code_run / "adapter" / "adapter_config.json").write_text("{}")
    (code_run / "recipe.yaml").write_text("model: {name: x, trust_remote_code: true}\ndata: {sources: [x]}\n")
    cases: list[tuple[ExitCode, str, list[object]]] = [
        (ExitCode.MODEL, "there is no folder", [tmp_path / "none"]),
        (ExitCode.MODEL, "it has not finished", [unfinished]),
        (ExitCode.MODEL, "that is a model, not an adapter", [tiny_llama, "--adapter", tiny_llama]),
        (ExitCode.USAGE, "nothing to evaluate on", [tiny_llama]),
        (ExitCode.USAGE, "held no pairs out", [trained, "--set", "data.eval_fraction=0"]),
        (ExitCode.USAGE, "cannot switch on model.trust_remote_code", [code_run]),
        (ExitCode.USAGE, "quantization", [trained, "--quantization", "nf5"]),
        (ExitCode.DATA, "there is no", [trained, "--data", tmp_path / "none.jsonl"]),
        (ExitCode.USAGE, "cannot be made", [trained, "--output", pairs_file / "below"]),
    ]
    for expected, message, arguments in cases:
        code, out, err = sampo("eval", *arguments)
        assert (code, out) == (expected, ""), (arguments, err)
        assert message in err, (arguments, err)
        assert "Traceback" not in err


def test_an_adapter_of_another_base_is_refused(trained: Path, tmp_path: Path, pairs_file: Path, sampo: Sampo) -> None:
    other = tmp_path / "other"
    tiny.make_model(tiny.CONFIGS["llama"](), seed=1).save_pretrained(other)
    tiny.make_tokenizer().save_pretrained(other)
    code, _, err = sampo("eval", other, "--adapter", trained, "--data", pairs_file, "--output", tmp_path / "out")
    assert code == ExitCode.MODEL
    assert "the base given has other weights" in err


def test_results_do_not_leave_the_run_through_a_link(trained: Path, tmp_path: Path, sampo: Sampo) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text((trained / "recipe.yaml").read_text())
    (run / "adapter").symlink_to(trained / "adapter")
    (run / "eval").symlink_to(tmp_path)
    code, _, err = sampo("eval", run)
    assert code == ExitCode.USAGE
    assert "is a link that leads out of" in err


@pytest.mark.skipif(find_spec("alpaca_eval") is not None, reason="alpaca_eval is installed")
def test_a_judge_needs_alpaca_eval(trained: Path, sampo: Sampo) -> None:
    code, _, err = sampo("eval", trained, "--generate", 1, "--judge", "weighted_alpaca_eval_gpt4_turbo")
    assert code == ExitCode.USAGE
    assert "pip install alpaca-eval" in err
