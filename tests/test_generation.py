"""Answers while training: the same prompts, by adapter and base, in numbers and texts; a resume changes nothing."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sampo_cli import checkpoint, metrics
from sampo_cli.answers import Answers, Prompt, end_of_turn, find_prompts, numbers, prompts_of_file
from sampo_cli.batch import Pair
from sampo_cli.config import GenerateConfig, Recipe
from sampo_cli.errors import DataError, Interrupted, UsageError
from sampo_cli.generate import Completion, Decoding, complete, repeated_share
from sampo_cli.lora import save_adapter
from sampo_cli.plan import resolve_recipe
from sampo_cli.policy import Policy
from sampo_cli.record import _generated
from sampo_cli.signals import StopRequest
from sampo_cli.state import Progress
from sampo_cli.template import PairEncoder
from sampo_cli.trainer import Trainer
from tests import tiny
from tests.test_trainer import adapter, make_recipe, make_trainer, rows

SETTINGS = {"prompts": 3, "max_new_tokens": 8}


def named(pair_ids: list[int]) -> dict[int, str]:
    return {number: f"prompt of {number}" for number in pair_ids}


def answering(recipe: Recipe, folder: Path, held_out: int = 4) -> Trainer:
    """A trainer that answers the prompts of its first held-out pairs."""
    trainer = make_trainer(recipe, folder, held_out=held_out)
    encoder = PairEncoder(tiny.make_tokenizer(), "2024-07-26")
    settings = recipe.train.generate
    prompts = find_prompts(settings, trainer.split.pairs, trainer.split.evaluation, encoder, 512, named)
    trainer.answers = Answers(settings, prompts, encoder.tokenizer, folder)
    return trainer


def texts(folder: Path) -> list[dict[str, Any]]:
    return metrics.read(folder / "generations.jsonl")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(tiny.make_model(tiny.CONFIGS["llama"]()))


PROMPTS = [np.arange(3, 3 + n, dtype=np.int32) for n in (4, 9, 1, 6)]


def test_batches_sorted_by_length_answer_as_each_prompt_alone(policy: Policy) -> None:
    tokenizer, decoding = tiny.make_tokenizer(), Decoding(max_new_tokens=12)
    told: list[str] = []
    together = complete(policy, tokenizer, PROMPTS, decoding, told.append, batch=3)
    assert together == [complete(policy, tokenizer, [prompt], decoding)[0] for prompt in PROMPTS]
    assert told == ["answers: 3 of 4", "answers: 4 of 4"]


def test_answers_made_in_stretches_are_those_made_at_once(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches of 2, 4, 6 tokens; an answer that ended leaves its batch, and the others get the same tokens."""
    tokenizer, decoding = tiny.make_tokenizer(), Decoding(max_new_tokens=12)
    made, whole = [], policy.causal_lm.generate

    def watched(input_ids: torch.Tensor, **options: Any) -> Any:
        made.append(whole(input_ids=input_ids, **options))
        return made[-1]

    monkeypatch.setattr(policy.causal_lm, "generate", watched)
    at_once = complete(policy, tokenizer, PROMPTS, decoding)
    assert [rows.shape[0] for rows in made] == [4]
    end = int(made[0][0, 9 + 3])  # fourth token of the answer to the longest prompt, which has 9
    expected = complete(policy, tokenizer, PROMPTS, decoding, more_ends=[end])
    made.clear()
    monkeypatch.setattr("sampo_cli.generate.FIRST_STRETCH", 2)
    assert complete(policy, tokenizer, PROMPTS, decoding) == at_once
    assert [rows.shape for rows in made] == [(4, 9 + 2), (4, 9 + 2 + 4), (4, 9 + 6 + 6)]
    made.clear()
    assert complete(policy, tokenizer, PROMPTS, decoding, more_ends=[end]) == expected
    assert made[-1].shape[0] == sum(one.tokens > 6 for one in expected) < 4


def test_drawn_answers_depend_on_the_seed_alone_and_disturb_nobody(policy: Policy) -> None:
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = complete(policy, tokenizer, PROMPTS, Decoding(12, temperature=1.0, seed=1))
    assert torch.equal(torch.rand(3), expected)
    assert first == complete(policy, tokenizer, PROMPTS, Decoding(12, temperature=1.0, seed=1))
    assert first != complete(policy, tokenizer, PROMPTS, Decoding(12, temperature=1.0, seed=2))
    assert first != complete(policy, tokenizer, PROMPTS, Decoding(12))


def test_a_batch_that_does_not_fit_is_answered_in_halves(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, decoding = tiny.make_tokenizer(), Decoding(max_new_tokens=6)
    expected, whole = complete(policy, tokenizer, PROMPTS, decoding), policy.causal_lm.generate
    sizes = []

    def small(input_ids: torch.Tensor, **options: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(input_ids=input_ids, **options)

    monkeypatch.setattr(policy.causal_lm, "generate", small)
    assert complete(policy, tokenizer, PROMPTS, decoding) == expected
    assert sizes == [4, 2, 1, 1, 2, 1, 1]


def test_an_answer_ends_with_its_turn(policy: Policy) -> None:
    """A token that only the chat template ends turns with counts as an end, too."""
    tokenizer = tiny.make_tokenizer()
    free = complete(policy, tokenizer, PROMPTS[:1], Decoding(12))[0]
    assert free.tokens == 12
    ids = tokenizer.encode(free.text, add_special_tokens=False)
    cut = complete(policy, tokenizer, PROMPTS[:1], Decoding(12), more_ends=[ids[4]])[0]
    assert cut.ended
    assert cut.tokens <= 5
    assert end_of_turn(PairEncoder(tokenizer, "2024-07-26")) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_repetition_by_hand() -> None:
    """abcabcabc has the 4-grams abca, bcab, cabc, abca, bcab, cabc: 3 of 6 were there before."""
    assert repeated_share([1, 2, 3] * 3) == 0.5
    assert repeated_share([1, 2, 3, 4, 5]) == 0.0
    assert repeated_share([1, 2]) == 0.0


def test_numbers_by_hand() -> None:
    own = [Completion("", 10, True, 0.5), Completion("", 20, False, 0.0), Completion("", 60, False, 0.1)]
    base = [Completion("", 20, True, 0.0), Completion("", 20, True, 0.0), Completion("", 20, False, 0.3)]
    assert numbers(own, base) == pytest.approx(
        {
            "prompts": 3,
            **{"tokens": 30.0, "median_tokens": 20, "ended": 1 / 3, "repetition": 0.2},
            **{"base_tokens": 20.0, "base_median_tokens": 20, "base_ended": 2 / 3, "base_repetition": 0.1},
            "length_ratio": 1.5,
        }
    )


def test_rows_and_texts_of_a_run(tiny_llama: Path, tmp_path: Path) -> None:
    """At the start, where the adapter is the base; with every evaluation; at the end."""
    recipe = make_recipe(tiny_llama, train={"max_steps": 5, "eval_every": 2, "generate": SETTINGS})
    trainer = answering(recipe, tmp_path / "run")
    trainer.fit(StopRequest())
    found, written = rows(trainer, "generate"), texts(tmp_path / "run")
    assert [row["step"] for row in found] == [0, 2, 4, 5]
    assert found[0]["length_ratio"] == 1.0
    assert [(row["step"], row["number"]) for row in written] == [(s, n) for s in (0, 2, 4, 5) for n in range(3)]
    assert all(row["answer"] == row["base"] for row in written[:3])
    assert any(row["answer"] != row["base"] for row in written[3:])
    for row in found:
        own = [line for line in written if line["step"] == row["step"]]
        assert row["tokens"] == np.mean([line["tokens"] for line in own])
        assert row["base_ended"] == np.mean([line["base_ended"] for line in own])
        assert row["length_ratio"] == row["tokens"] / row["base_tokens"]
    with trainer.raw_policy.model.disable_adapter():
        again = complete(
            trainer.raw_policy, tiny.make_tokenizer(), [p.ids for p in trainer.answers.prompts], Decoding(8)
        )
    assert [line["base"] for line in written[-3:]] == [one.text for one in again]
    assert [trainer.progress.generated, trainer.progress.best_row["step"]] == [metrics_row(found[-1]), 5]
    assert _generated(trainer.progress, 5)["adapter_tokens"] == found[-1]["tokens"]
    assert _generated(trainer.progress, 3) is None


def metrics_row(row: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(row))


def test_every_is_a_clock_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_llama, train={"max_steps": 5, "eval_every": 4, "generate": {**SETTINGS, "every": 2}})
    trainer = answering(recipe, tmp_path / "run")
    trainer.fit(StopRequest())
    assert [row["step"] for row in rows(trainer, "generate")] == [0, 2, 4, 5]
    assert [row["step"] for row in rows(trainer, "eval")] == [4, 5]


def test_generation_changes_nothing_of_the_training(tiny_llama: Path, tmp_path: Path) -> None:
    """Drawn answers, and LoRA dropout that draws too: the same adapter and rows as without answers."""
    train = {"max_steps": 4, "eval_every": 2}
    lora = {"dropout": 0.1}
    plain = make_trainer(make_recipe(tiny_llama, lora=lora, train=train), tmp_path / "plain", held_out=4)
    plain.fit(StopRequest())
    drawn = {**SETTINGS, "temperature": 1.0}
    other = answering(make_recipe(tiny_llama, lora=lora, train=train | {"generate": drawn}), tmp_path / "other")
    other.fit(StopRequest())
    for name, tensor in adapter(plain).items():
        assert torch.equal(adapter(other)[name], tensor), name
    for kind in ("train", "eval"):
        assert rows(other, kind) == rows(plain, kind)


@pytest.mark.parametrize("moment", ["in step 3", "among the answers after step 4"])
def test_interrupted_and_resumed_is_the_uninterrupted_run(tiny_llama: Path, tmp_path: Path, moment: str) -> None:
    """Also in the middle of answers, after which those that were written down are trimmed and given again."""
    train = {"eval_every": 2, "save_every": 100, "generate": {**SETTINGS, "temperature": 0.7}}
    recipe = make_recipe(tiny_llama, lora={"dropout": 0.1}, train=train)
    whole = answering(recipe, tmp_path / "whole")
    whole.fit(StopRequest())

    first, stop = answering(recipe, tmp_path / "cut"), StopRequest()
    if moment == "in step 3":
        first.view.train_row = lambda row: setattr(stop, "signal", signal.SIGTERM if row["step"] == 3 else None)
        with pytest.raises(Interrupted):
            first.fit(stop)
    else:
        complete_row, write = first.answers.row, metrics.append

        def power_cut(policy: Policy, step: int, progress: Any) -> Any:
            if step < 4:
                return complete_row(policy, step, progress)
            write(tmp_path / "cut" / "generations.jsonl", {"step": 4, "number": 0, "answer": "half"})
            raise RuntimeError("power cut")

        first.answers.row = power_cut  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="power cut"):
            first.fit(stop)
        assert [row["step"] for row in texts(tmp_path / "cut")] == [0] * 3 + [2] * 3 + [4]

    torch.manual_seed(12345)
    second = answering(recipe, tmp_path / "cut")
    second.restore(checkpoint.find(tmp_path / "cut")[1])
    second.answers._complete_as_base = None  # type: ignore[assignment,method-assign]  # the base does not answer again
    second.fit(StopRequest())
    for name, tensor in adapter(whole).items():
        assert torch.equal(adapter(second)[name], tensor), name
    for kind in ("train", "eval", "generate"):
        assert rows(second, kind) == rows(whole, kind)
    for name in ("generations.jsonl", "held_out.jsonl"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert second.progress == whole.progress


def test_a_wish_to_stop_is_granted_between_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_llama, train={"generate": SETTINGS})
    trainer, stop = answering(recipe, tmp_path / "run"), StopRequest()
    forward, passes = trainer.raw_policy.causal_lm.forward, []

    def interrupted(*inputs: Any, **options: Any) -> Any:
        passes.append(1)
        if len(passes) == 3:
            stop.signal = signal.SIGINT
        return forward(*inputs, **options)

    trainer.raw_policy.causal_lm.forward = interrupted
    with pytest.raises(Interrupted, match="before the first step") as caught:
        trainer.fit(stop)
    assert len(passes) == 3
    assert trainer.policy.training
    assert caught.value.hint == "start it again"
    assert not (tmp_path / "run" / "generations.jsonl").exists()


def test_with_an_adapter_to_go_on_from_the_base_is_the_base(tiny_llama: Path, tmp_path: Path) -> None:
    """Not the reference: the adapter's answers before the first step are its own."""
    make = {"max_steps": 6, "learning_rate": 3e-2}
    first = make_trainer(make_recipe(tiny_llama, train=make), tmp_path / "first")
    first.fit(StopRequest())
    save_adapter(first.raw_policy, tmp_path / "adapter")
    model = {"quantization": "none", "dtype": "float32", "adapter": str(tmp_path / "adapter")}
    recipe = make_recipe(tiny_llama, model=model, train={"max_steps": 1, "generate": SETTINGS})
    trainer = answering(recipe, tmp_path / "second")
    row = trainer.answers.row(trainer.raw_policy, 0, lambda: None)
    with trainer.raw_policy.model.disable_adapter():
        base = complete(
            trainer.raw_policy, tiny.make_tokenizer(), [p.ids for p in trainer.answers.prompts], Decoding(8)
        )
    written = texts(tmp_path / "second")
    assert [line["base"] for line in written] == [one.text for one in base]
    assert any(line["answer"] != line["base"] for line in written)
    assert row["base_tokens"] == np.mean([one.tokens for one in base])


# Which prompts -------------------------------------------------------------------------------------------------------


def encoder() -> PairEncoder:
    return PairEncoder(tiny.make_tokenizer(), "2024-07-26")


def pair(number: int, prompt: list[int]) -> Pair:
    return Pair(number, np.array(prompt, np.int32), np.array([5], np.int32), np.array([6], np.int32))


def test_held_out_prompts_differ_and_leave_room_for_an_answer() -> None:
    pairs = tiny.PairList([pair(0, [9, 9]), pair(1, [9, 9]), pair(2, [8] * 40), pair(3, [7]), pair(4, [6])])
    settings = GenerateConfig(prompts=2, max_new_tokens=8)
    found = find_prompts(settings, pairs, [0, 1, 2, 3, 4], encoder(), 40, named)
    assert [(prompt.text, prompt.ids.tolist()) for prompt in found] == [("prompt of 0", [9, 9]), ("prompt of 3", [7])]
    assert find_prompts(GenerateConfig(), pairs, [0], encoder(), 40, named) == []
    with pytest.raises(UsageError, match="no pairs are held out"):
        find_prompts(settings, pairs, [], encoder(), 40, named)
    with pytest.raises(UsageError, match="no held-out prompt has at most 32 tokens"):
        find_prompts(settings, pairs, [2], encoder(), 40, named)


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_prompts_of_a_file_go_through_the_template(tmp_path: Path, name: str) -> None:
    lines = ["one?", "two\u2028three?"]
    path = tmp_path / name
    written = lines if name.endswith("txt") else [json.dumps({"prompt": line}, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(written) + "\n\n", encoding="utf-8")
    found = prompts_of_file(path, encoder(), 100)
    assert [prompt.text for prompt in found] == lines
    tokenizer = tiny.make_tokenizer()
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "one?"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert found[0].ids.tolist() == expected


@pytest.mark.parametrize(
    ("name", "text", "kind", "said"),
    [
        ("a.txt", "\n \n", UsageError, "no prompts in it"),
        ("a.txt", "word " * 200, DataError, "prompt 1 has"),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}', DataError, "a.jsonl:2: no text under `prompt`"),
        ("a.jsonl", "{", DataError, "a.jsonl:1: not JSON"),
        ("missing.txt", None, UsageError, "missing.txt"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    tmp_path: Path, name: str, text: str | None, kind: type[Exception], said: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(kind, match=said):
        prompts_of_file(tmp_path / name, encoder(), 100)


def test_settings_are_checked_and_the_file_gets_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("one?\n")
    tree = {"model": {"name": "m"}, "data": {"sources": ["d"]}}
    recipe = resolve_recipe({**tree, "train": {"generate": {"prompts": "p.txt"}}})
    assert recipe.train.generate.prompts == str(tmp_path / "p.txt")
    assert resolve_recipe(tree).train.generate.prompts == 0
    with pytest.raises(UsageError, match=r"train.generate.promts: unknown key; did you mean 'prompts'\?"):
        resolve_recipe({**tree, "train": {"generate": {"promts": 3}}})


def test_old_checkpoints_know_nothing_of_answers() -> None:
    assert Progress.from_plain({"step": 3}) == Progress(step=3)
    whole = Progress(step=2, generation_due=True)
    whole.stopping.rows = 4
    assert Progress.from_plain(json.loads(json.dumps(whole.plain()))) == whole


def test_a_prompt_is_shown_without_its_ids() -> None:
    assert repr(Prompt("one?", PROMPTS[0])) == "Prompt(text='one?')"
