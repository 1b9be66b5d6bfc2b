"""What an evaluation says beside the method's own numbers: KL, length bias, and DPO's reward on the same forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sampo_cli.batch import Draw, Pair, collate
from sampo_cli.evaluation import Evaluation
from sampo_cli.feed import Feed
from sampo_cli.length_bias import BUCKETS
from sampo_cli.losses import dpo
from sampo_cli.method_table import METHODS
from sampo_cli.metrics import numbers, read
from sampo_cli.policy import reference
from sampo_cli.scores import Tally, TokenScores, pair_scores
from sampo_cli.signals import StopRequest
from sampo_cli.trainer import Trainer
from tests.test_trainer import make_recipe, make_trainer


def moved(trainer: Trainer) -> Trainer:
    """An adapter that is no longer its reference."""
    torch.manual_seed(1)
    for name, parameter in trainer.raw_policy.named_parameters():
        if "lora_B.default" in name:
            parameter.data.normal_(0, 0.05)
    return trainer


def ids(count: int, token: int = 5) -> Any:
    return np.full(count, token, np.int32)


def evaluated(policy: list[float], reference: list[float] | None, *lengths: tuple[int, int]) -> Evaluation:
    """Pairs of these lengths, and log-probs of all their response tokens in a row; DPO's loss with beta 0.5."""
    pairs = [Pair(i, ids(3), ids(chosen), ids(rejected)) for i, (chosen, rejected) in enumerate(lengths)]
    batch = collate(pairs, Draw("sum", 0, 0), every_token=True)
    tokens = TokenScores(torch.tensor(policy), None if reference is None else torch.tensor(reference))
    before = torch.zeros(len(policy)) if tokens.reference is None else tokens.reference
    scores = pair_scores(batch, tokens.policy, before)
    found = Evaluation(lambda batch: batch.input_ids.numel(), beta=0.5)
    found.add(batch, tokens, scores, dpo(scores, beta=0.5, label_smoothing=0.0))
    return found


def test_kl_by_hand() -> None:
    """One pair of 2 and 1 tokens. Log-ratios 1, -2 and 0: k1 = log x, k3 = 1/x - 1 + log x with x = pi / ref.

    k1: -1 in all. k3: e^-1 - 1 + 1 = 0.3679, e^2 - 1 - 2 = 4.3891, 0; in all 4.7569. Over 3 tokens, and 2 responses.
    """
    row = evaluated([-1.0, -4.0, -2.0], [-2.0, -2.0, -2.0], (2, 1)).row()
    assert row["kl_per_token_k1"] == pytest.approx(-1 / 3)
    assert row["kl_per_response_k1"] == pytest.approx(-1 / 2)
    assert row["kl_per_token"] == pytest.approx(4.7569 / 3, abs=1e-4)
    assert row["kl_per_response"] == pytest.approx(4.7569 / 2, abs=1e-4)


def test_length_bias_by_hand() -> None:
    """Four pairs whose every token has log-ratio +0.1: DPO's sum prefers the longer response, whatever is in it.

    Lengths (4, 1), (1, 4), (3, 1), (2, 2): margins 0.5 * 0.1 * gap = 0.15, -0.15, 0.1, 0.
    """
    count = 4 + 1 + 1 + 4 + 3 + 1 + 2 + 2
    row = evaluated([-1.0] * count, [-1.1] * count, (4, 1), (1, 4), (3, 1), (2, 2)).row()
    bias = row["sum_length_bias"]
    assert bias["spearman"] == pytest.approx(1.0)
    assert row["sum_margin"] == pytest.approx((0.15 - 0.15 + 0.1 + 0) / 4)
    assert row["sum_accuracy"] == 0.5
    assert [bucket["name"] for bucket in bias["buckets"]] == list(BUCKETS)
    assert [bucket["pairs"] for bucket in bias["buckets"]] == [1, 0, 1, 0, 2]
    assert [bucket["accuracy"] for bucket in bias["buckets"]] == [0.0, None, 0.0, None, 1.0]


def test_without_a_reference_there_is_no_kl_and_the_sum_is_of_log_probs() -> None:
    row = evaluated([-1.0] * 5, None, (4, 1)).row()
    assert [row[key] for key in row if key.startswith("kl_")] == [None] * 4
    assert row["sum_margin"] == pytest.approx(0.5 * (-4 + 1))


@pytest.mark.parametrize(
    "method",
    [
        {"name": "sampo"},
        {"name": "sampo", "sampling": "independent"},
        {"name": "dpo"},
        {"name": "dpo-sft"},
        {"name": "hinge", "reduction": "expected"},
        {"name": "simpo"},
        {"name": "tdpo"},
    ],
    ids=lambda method: "-".join(map(str, method.values())),
)
def test_the_methods_own_numbers_are_those_of_its_own_tokens(
    tiny_llama: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    """Scoring the other tokens too changes nothing but the last digits; with the reference from disk as well."""
    name = method["name"]
    trainer = moved(make_trainer(make_recipe(tiny_llama, name, method=method), tmp_path / "run", held_out=12))
    plain = Tally(trainer.policy.computed_positions)
    with torch.no_grad():
        for batch in trainer.feed.batches(trainer.split.evaluation, 0):
            _, scores, out = trainer.objective.measure(batch)
            plain.add(batch, scores, out)
    expected = plain.row()
    for setting in ("off", "on")[: 1 + METHODS[name].caches_reference]:
        trainer.recipe = make_recipe(tiny_llama, name, method=method, train={"cache_reference": setting})
        trainer.prepare_reference()
        assert (trainer.feed.reference is not None) == (setting == "on")
        row = trainer.evaluate().row()
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    if name == "sampo":
        assert expected["kept_tokens"] < expected["response_tokens"]


def test_a_sampo_run_shows_what_dpo_would_have_been(tiny_llama: Path, tmp_path: Path) -> None:
    """The same adapter under both methods: SamPO's row holds the numbers that DPO's has as its own."""
    rows = {
        name: moved(make_trainer(make_recipe(tiny_llama, name), tmp_path / name, held_out=12)).evaluate().row()
        for name in ("sampo", "dpo")
    }
    assert rows["sampo"]["margin"] != pytest.approx(rows["dpo"]["margin"], rel=1e-3)
    assert rows["sampo"]["sum_margin"] == pytest.approx(rows["dpo"]["margin"], rel=1e-5)
    assert rows["sampo"]["sum_accuracy"] == rows["dpo"]["accuracy"]
    assert rows["sampo"]["sum_length_bias"] == rows["dpo"]["length_bias"] == rows["dpo"]["sum_length_bias"]
    assert rows["sampo"]["length_bias"] != rows["dpo"]["length_bias"]


def test_kl_is_what_the_models_log_probs_give(tiny_llama: Path, tmp_path: Path) -> None:
    """Against log-probs of the model's own logits, each response alone in a plain row."""
    trainer = moved(make_trainer(make_recipe(tiny_llama), tmp_path / "run", held_out=12))
    row = trainer.evaluate().row()
    model = trainer.raw_policy.causal_lm.eval()

    def logps(prompt: Any, response: Any) -> torch.Tensor:
        whole = torch.tensor(np.concatenate([prompt, response]), dtype=torch.long)
        logits = model(whole[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return logits.gather(1, whole[len(prompt) :, None])[:, 0].double()

    ratios = []
    with torch.no_grad():
        for pair in trainer.split.pairs:
            for response in (pair.chosen, pair.rejected):
                with reference(trainer.raw_policy):
                    before = logps(pair.prompt, response)
                ratios.append(logps(pair.prompt, response) - before)
    tokens = torch.cat(ratios)
    k3 = (-tokens).exp() - 1 + tokens
    assert row["response_tokens"] == len(tokens)
    assert row["kl_per_token_k1"] == pytest.approx(tokens.mean().item(), abs=1e-6)
    assert row["kl_per_response_k1"] == pytest.approx(tokens.sum().item() / 24, abs=1e-5)
    assert row["kl_per_token"] == pytest.approx(k3.mean().item(), abs=1e-6)
    assert row["kl_per_response"] == pytest.approx(k3.sum().item() / 24, abs=1e-5)
    assert row["kl_per_token"] > 0


def test_an_untrained_adapter_has_no_kl_and_no_bias(tiny_llama: Path, tmp_path: Path) -> None:
    row = make_trainer(make_recipe(tiny_llama), tmp_path / "run", held_out=12).evaluate().row()
    assert row["kl_per_token"] == row["kl_per_response_k1"] == 0
    assert row["length_bias"]["spearman"] is None  # all margins are 0
    json.dumps(row, allow_nan=False)


def test_held_out_pairs_are_written_down(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_llama, train={"max_steps": 2, "eval_every": 1})
    trainer = make_trainer(recipe, tmp_path / "run", held_out=4)
    trainer.fit(StopRequest())
    pairs = read(tmp_path / "run" / "held_out.jsonl")
    last = trainer.progress.last_evaluation
    assert [(row["step"], row["pair_id"]) for row in pairs] == [(2, 0), (2, 1), (2, 2), (2, 3)]
    assert np.mean([row["margin"] for row in pairs]) == pytest.approx(last["margin"])
    assert np.mean([row["sum_margin"] for row in pairs]) == pytest.approx(last["sum_margin"])
    for row, pair in zip(pairs, trainer.split.pairs, strict=False):
        assert (row["chosen_tokens"], row["rejected_tokens"]) == (len(pair.chosen), len(pair.rejected))
        assert row["gap"] == len(pair.chosen) - len(pair.rejected)


def test_training_batches_still_score_what_counts_only() -> None:
    """8 and 2 tokens: SamPO scores 2 of each, an evaluation all 10."""
    pairs = [Pair(0, ids(3), ids(8), ids(2))]
    feed = Feed(pairs, "shared", lambda epoch: Draw("sample", 0, epoch), torch.device("cpu"), 100, None)  # type: ignore[arg-type]
    (training,), (evaluation,) = list(feed.batches([0], 0)), list(feed.whole_batches([0]))
    assert (len(training.targets), len(evaluation.targets)) == (4, 10)
    assert evaluation.weights.sum() == training.weights.sum() == 4


def test_the_numbers_of_a_row_have_one_name_each() -> None:
    """For trackers and for early stopping: nested values by dots, buckets by their names."""
    row = {"kind": "eval", "step": 3, "loss": 0.5, "kl": None, "bias": {"spearman": 0.1, "buckets": []}}
    row["bias"]["buckets"] = [{"name": "much longer", "pairs": 2, "accuracy": None}]
    assert numbers(row) == {"step": 3, "loss": 0.5, "bias.spearman": 0.1, "bias.buckets.much_longer.pairs": 2}
