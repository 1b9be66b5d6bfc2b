"""The forecast: what a run would compute and need, from config, tokenizer and lengths, against what it does."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from benchmarks.memory import compare
from benchmarks.pairs import PairList, synthetic_pairs
from sampo_cli import footprint, tables
from sampo_cli.batch import Draw, Pair, collate, micro_batches, row_positions
from sampo_cli.config import Recipe
from sampo_cli.dry_run import dry_run, parse_memory
from sampo_cli.errors import UsageError
from sampo_cli.footprint import Rehearsal, optimizer_bytes
from sampo_cli.forecast import changes, forecast
from sampo_cli.ledger import Ledger
from sampo_cli.model import load_config, load_policy
from sampo_cli.optim import make_optimizer
from sampo_cli.pair_builder import truncate
from sampo_cli.plan import resolve_recipe
from sampo_cli.policy import reference
from sampo_cli.rounds import Schedule
from sampo_cli.skeleton import storages
from sampo_cli.target import CPU_LIBRARIES, Device, named_card
from sampo_cli.template import Encoded
from sampo_cli.workload import Lengths, planned, scored_tokens, work
from tests import tiny
from tests.test_trainer import Silent


def make_recipe(folder: Path | str, data: str = "unused", **sections: Any) -> Recipe:
    model = {"name": str(folder), "quantization": "none", "dtype": "float32"} | sections.pop("model", {})
    return resolve_recipe({"model": model, "data": {"sources": [data]}, **sections})


def rehearse(recipe: Recipe, device: str = "cpu") -> Rehearsal:
    return Rehearsal(recipe, load_config(recipe.model, Path(recipe.model.name)), Device(device, "it", 24 * 10**9, 0))


def make_lengths(count: int, longest: int, seed: int = 0) -> Lengths:
    rng = np.random.default_rng(seed)
    return Lengths(np.arange(count), *(rng.integers(1, longest, count, dtype=np.int32) for _ in range(3)))


def save_llama(folder: Path, **sizes: int) -> Path:
    config = LlamaConfig(**tiny.SIZES | {"max_position_embeddings": 4096} | sizes)
    return tiny.save_model(config, folder)


def a_pair(prompt: int, chosen: int, rejected: int) -> Pair:
    return Pair(0, *(np.ones(size, np.int32) for size in (prompt, chosen, rejected)))


def test_the_ledger_by_hand() -> None:
    """256 float32 are 1,024 bytes. A view costs nothing, what is freed no longer counts, the peak keeps its parts."""
    with Ledger("a") as ledger:
        first = torch.zeros(256)
        second = first * 2
        view = second[:10]
        with ledger.booking("b"):
            third = first.double()
        assert ledger.live == {"a": 2048, "b": 2048}
        del second, third
        assert ledger.live == {"a": 2048, "b": 0}  # the view holds what it looks at
        del view
        assert ledger.live["a"] == 1024
        assert ledger.peak["a"] == 2048
        assert ledger.peak["b"] == 2048
        ledger.restart()
        assert sum(ledger.peak.values()) == 1024
        ledger.book([first], "c")
        assert ledger.live == {"a": 0, "b": 0, "c": 1024}


@pytest.mark.parametrize(
    ("name", "quantization"), [*((name, "nf4") for name in sorted(tiny.CONFIGS)), ("gemma2", "none"), ("gpt2", "none")]
)
def test_the_skeleton_has_the_parameters_of_the_loaded_policy(name: str, quantization: str, tmp_path: Path) -> None:
    folder = tiny.save_model(tiny.CONFIGS[name](), tmp_path / name)
    recipe = make_recipe(folder, model={"quantization": quantization})
    policy, facts = load_policy(recipe.model, recipe.lora, seed=0)
    (folder / "model.safetensors").unlink()
    found = rehearse(recipe)
    assert found.trainable_parameters == facts.trainable_parameters
    assert found.total_parameters == facts.total_parameters
    assert found.parameter_bytes == facts.parameter_bytes
    assert found.layout == facts.layout
    stored = [sum(part.nbytes for _, part in storages(model)) for model in (policy.model, found.policy.model)]
    assert stored[0] == stored[1] >= facts.parameter_bytes


def test_on_a_cpu_some_layers_stay_as_they_are(tmp_path: Path) -> None:
    """Layers with 96 inputs are no whole blocks of 64; on CUDA they are quantized all the same."""
    folder = save_llama(tmp_path / "model", hidden_size=96, head_dim=24)
    recipe = make_recipe(folder, model={"quantization": "nf4"})
    _, facts = load_policy(recipe.model, recipe.lora, seed=0)
    assert rehearse(recipe).parameter_bytes == facts.parameter_bytes
    assert rehearse(recipe, "cuda").parameter_bytes < facts.parameter_bytes


OTHERS = [
    ("none", {"targets": ["q_proj", "v_proj"]}),
    ("none", {"dora": True}),
    ("nf4", {"dora": True}),
    ("int8", {"r": 3}),
]


@pytest.mark.parametrize(("quantization", "lora"), OTHERS)
def test_and_so_with_other_adapters(tiny_llama: Path, quantization: str, lora: dict[str, Any]) -> None:
    recipe = make_recipe(tiny_llama, model={"quantization": quantization}, lora=lora)
    _, facts = load_policy(recipe.model, recipe.lora, seed=0)
    found = rehearse(recipe)
    assert found.trainable_parameters == facts.trainable_parameters
    assert found.parameter_bytes == facts.parameter_bytes


def measured(recipe: Recipe, pair: Pair) -> dict[str, int]:
    """The peak of a forward and backward pass of the real policy, in the order of a step, without what was loaded."""
    policy, _ = load_policy(recipe.model, recipe.lora, seed=0, checkpointing=recipe.train.checkpointing)
    batch = collate([pair], Draw("sample", 0, 0), policy.layout)
    ledger = Ledger("tensors")
    ledger.book((*policy.parameters(), *policy.buffers()), "loaded")
    with ledger:
        with reference(policy):
            before = policy(batch)
        (policy(batch) - before).sum().backward()
    return {**ledger.peak}


@pytest.mark.parametrize("checkpointing", ["all", "selective", "none"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_fake_tensors_take_what_real_ones_do(name: str, checkpointing: str, tmp_path: Path) -> None:
    """The same step on real weights, counted in the same way; the kernels' own memory is for `benchmarks.memory`."""
    folder = tiny.save_model(tiny.CONFIGS[name](), tmp_path / name)
    recipe = make_recipe(folder, model={"quantization": "nf4"}, train={"checkpointing": checkpointing})
    pair = a_pair(100, 150, 90)
    real = measured(recipe, pair)["tensors"]
    parts = rehearse(recipe).footprint([pair], others=False).parts
    predicted = sum(size for part, size in parts.items() if part not in ("weights", "adapter", "optimizer"))
    assert predicted == pytest.approx(real, rel=0.03)


@pytest.fixture(scope="module")
def deep_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of 8 layers, without weights."""
    folder = tmp_path_factory.mktemp("deep")
    LlamaConfig(**tiny.SIZES | {"num_hidden_layers": 8}, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return folder


def test_two_depths_tell_of_all_layers(deep_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 layers, foretold from 1 and 2, and run whole."""
    for checkpointing in ("all", "none"):
        rehearsal = rehearse(make_recipe(deep_llama, train={"checkpointing": checkpointing}))
        foretold = rehearsal.footprint([a_pair(60, 90, 70)], others=True)
        with monkeypatch.context() as patch:
            patch.setattr(footprint, "_period", lambda kinds: 8)
            whole = rehearsal.footprint([a_pair(60, 90, 70)], others=True)
        assert foretold.total == pytest.approx(whole.total, rel=0.01)


def test_what_each_setting_saves(deep_llama: Path) -> None:
    """On CUDA: less kept with checkpointing, less again with offload; gradients and 8-bit states by their bytes."""
    pair = a_pair(800, 900, 1200)

    def parts(**train: Any) -> dict[str, int]:
        recipe = make_recipe(deep_llama, model={"dtype": "bfloat16"}, train=train)
        return dict(rehearse(recipe, "cuda").footprint([pair], others=True).parts)

    none, some, whole = (parts(checkpointing=policy) for policy in ("none", "selective", "all"))
    away = parts(checkpointing="all", offload_activations=True)
    kept = [
        sum(found[part] for part in ("activations", "logits", "attention masks")) for found in (none, some, whole, away)
    ]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 1.5 * kept[2] > 1.5 * kept[3]
    trainable = rehearse(make_recipe(deep_llama)).trainable_parameters
    assert whole["gradients"] == whole["adapter"] == 4 * trainable
    assert parts(optimizer="adamw")["optimizer"] == 8 * trainable


def test_methods_differ_in_what_they_keep(tiny_llama: Path) -> None:
    """A method that needs the whole vocabulary of the reference holds a second chunk of logits."""

    def total(method: str) -> int:
        return (
            rehearse(make_recipe(tiny_llama, method={"name": method}))
            .footprint([a_pair(100, 300, 200)], others=False)
            .total
        )

    assert total("simpo") <= total("dpo") < total("tdpo")
    assert total("sampo") <= total("dpo")  # fewer tokens are scored


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_the_optimizer_remembers_so_many_bytes(name: str) -> None:
    """A small tensor keeps two float32 states in bitsandbytes too; a large one 2 bytes an element and scales."""
    weights = [torch.nn.Parameter(torch.zeros(size)) for size in (300, 5000)]
    settings = make_recipe("model", train={"optimizer": name, "learning_rate": 1e-3}).train
    optimizer = make_optimizer(weights, settings, torch.device("cpu"))
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    states = [value for state in optimizer.state.values() for key, value in state.items() if "qmap" not in key]
    held = sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.numel() > 1)
    assert optimizer_bytes([300, 5000], name) == held


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("most_pairs", [None, 3])
@pytest.mark.parametrize("budget", [100, 900, 4000, 20000])
def test_the_plan_of_an_epoch_is_that_of_its_steps(layout: Any, most_pairs: int | None, budget: int) -> None:
    """77 pairs in steps of 16, the last of 13."""
    lengths = make_lengths(77, 300)
    passes, positions, rows = 0, 0, 2 if layout == "separate" else 1
    for start in range(0, 77, 16):
        pairs = [lengths[index] for index in range(start, min(77, start + 16))]
        for group in micro_batches(pairs, budget, layout, most_pairs):
            passes += 1
            positions += len(group) * rows * max(max(p.row_lengths(layout)) for p in group)
    assert planned(row_positions(lengths, layout), 16, budget, most_pairs) == (positions, passes)


@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
@pytest.mark.parametrize("method", ["dpo", "sampo"])
def test_scored_tokens_are_those_of_a_batch(method: str, sft_weight: float) -> None:
    lengths = make_lengths(20, 40)
    settings = make_recipe("model", method={"name": method, "sft_weight": sft_weight}).method
    assert settings.reduction is not None
    batch = collate([lengths[i] for i in range(20)], Draw(settings.reduction, 0, 0, whole_chosen=bool(sft_weight)))
    assert scored_tokens(lengths, settings).sum() == len(batch.positions)


def test_draws_that_may_coincide_count_as_expected() -> None:
    """2 of 4 tokens, drawn twice: 4 * (1 - 1/2 ** 2) = 3, beside the 2 of the shorter response."""
    lengths = Lengths(np.array([0]), *(np.array([size], np.int32) for size in (5, 4, 2)))
    settings = make_recipe("model", method={"draws": 2}).method
    assert scored_tokens(lengths, settings).tolist() == [5]


@pytest.mark.parametrize("max_length", [10, 37, 60])
def test_shorter_lengths_are_those_of_truncation(max_length: int) -> None:
    lengths = make_lengths(50, 50)
    cut = lengths.cut(max_length, min_prompt=12)
    for index in range(50):
        pair = lengths[index]
        whole = Encoded(*(part.tolist() for part in (pair.prompt, pair.chosen, pair.rejected)))
        shorter, _ = truncate(whole, max_length, 12, None)
        after = cut[index]
        assert [len(after.prompt), len(after.chosen), len(after.rejected)] == [
            len(shorter.prompt), len(shorter.chosen), len(shorter.rejected)
        ]  # fmt: skip


def test_the_work_of_a_run(tmp_path: Path) -> None:
    """10 pairs of 3 + 4 + 2 tokens in steps of 4, 2.5 epochs: 8 steps of the 3 of an epoch."""
    lengths = Lengths(np.arange(10), *(np.full(10, size, np.int32) for size in (3, 4, 2)))
    recipe = make_recipe("model", train={"batch_pairs": 4, "epochs": 2.5})
    found = work(lengths, Schedule(list(range(10)), recipe), recipe, "shared", budget=9)
    assert found.steps == 8
    assert found.needed == found.computed == round(90 * 8 / 3)
    assert found.passes == round(10 * 8 / 3)
    assert found.scored == round(40 * 8 / 3)
    assert found.responses == round(60 * 8 / 3)
    once = make_recipe("model", train={"batch_pairs": 4, "max_steps": 1})
    assert work(lengths, Schedule(list(range(10)), once), once, "separate", budget=14).computed == 4 * 2 * 7


def test_a_million_pairs_are_planned_at_once() -> None:
    lengths = make_lengths(1_000_000, 1500)
    recipe = make_recipe("model")
    started = time.process_time()
    found = work(lengths, Schedule(list(range(1_000_000)), recipe), recipe, "shared", budget=8192)
    assert time.process_time() - started < 5
    assert found.needed < found.computed < 1.05 * found.needed


def rehearsed(recipe: Recipe) -> Rehearsal:
    return rehearse(recipe, "cuda")


def test_the_budget_is_halved_until_it_fits(tiny_llama: Path) -> None:
    recipe = make_recipe(tiny_llama, train={"batch_pairs": 64})
    rehearsal, lengths = rehearsed(recipe), make_lengths(200, 100)
    most = forecast(rehearsal, lengths, named_card(10**10))
    assert (most.tokens, most.fits) == (8192, True)
    assert most.longest[0] * most.longest[1] <= 8192
    less = forecast(rehearsal, lengths, named_card(int((most.needed - 10**6) / 0.95)))
    assert (less.tokens, less.fits) == (4096, True)
    assert less.needed < most.needed
    none = forecast(rehearsal, lengths, named_card(10**6))
    assert (none.tokens, none.fits) == (256, False)  # the longest pair has between 256 and 512 positions
    given = make_recipe(tiny_llama, train={"batch_pairs": 64, "tokens_per_microbatch": 1000})
    for card in (10**6, 10**10):
        assert forecast(rehearsed(given), lengths, named_card(card)).tokens == 1000
    assert changes(given, lengths, named_card(10**6), rehearsed)[0].flags == "--set train.tokens_per_microbatch=null"


def test_changes_are_tried_before_they_are_named(tiny_llama: Path) -> None:
    """A card with a little less room than the smallest budget needs."""
    recipe = make_recipe(tiny_llama, model={"dtype": "bfloat16"}, train={"checkpointing": "none"})
    lengths = make_lengths(50, 700)
    least = forecast(rehearsed(recipe), lengths, Device("cuda", "none", 1, 0))
    card = Device("cuda", "a small one", int(0.9 * least.needed / 0.95), 0)
    found = changes(recipe, lengths, card, rehearsed)
    assert found[0].flags == "--set train.checkpointing=all"
    assert found[0].fits
    assert [change.fits for change in found] == sorted((change.fits for change in found), reverse=True)
    shorter = next(change for change in found if change.flags.startswith("--max-length"))
    length = int(shorter.flags.split()[-1])
    at, above = (forecast(rehearsed(recipe), lengths.cut(n, 128), card) for n in (length, length + 64))
    assert (at.fits, at.needed) == (True, shorter.needed)
    assert not above.fits


@pytest.mark.parametrize(
    ("text", "memory"), [("24GB", 24 * 10**9), ("24GiB", 24 * 2**30), ("80g", 80 * 10**9), ("1.5 T", 15 * 10**11)]
)
def test_amounts_of_memory(text: str, memory: int) -> None:
    assert parse_memory(text) == memory


@pytest.mark.parametrize("text", ["24", "GB", "0GB", "24 bytes", "-1GB", "nanGB"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(UsageError, match="not an amount of memory"):
        parse_memory(text)


def test_a_dry_run_needs_no_weights(tmp_path: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save_model(tiny.CONFIGS["llama"](), tmp_path / "llama")
    (folder / "model.safetensors").unlink()
    recipe = make_recipe(
        folder, str(pairs_file), model={"quantization": "nf4"}, train={"batch_pairs": 8, "epochs": 2.0}
    )
    result = dry_run(recipe, Silent(), tmp_path / "run", gpu_memory=24 * 10**9)
    assert json.loads(json.dumps(result)) == result
    assert result["steps"] == 2 * 3  # 23 of 24 pairs train
    assert result["memory"]["fits"] is True
    assert result["memory"]["needed"] == sum(result["memory"]["parts"].values())
    assert result["tokens"]["that matter"] <= result["tokens"]["computed"]
    assert result["changes"] == []
    tables.print_dry_run(result)
    assert "fits with 8,192 tokens a micro-batch" in capsys.readouterr().out
    small = dry_run(recipe, Silent(), tmp_path / "run", gpu_memory=10**6)
    assert not small["memory"]["fits"]
    tables.print_dry_run(small)
    assert "nothing of this is enough" in capsys.readouterr().out


def test_a_model_that_cannot_be_foretold_says_so(tmp_path: Path, pairs_file: Path) -> None:
    folder = tiny.save_model(tiny.CONFIGS["mamba"](), tmp_path / "mamba")
    notes: list[str] = []
    view = Silent()
    view.note = notes.append  # type: ignore[method-assign]
    result = dry_run(make_recipe(folder, str(pairs_file)), view, tmp_path / "run")
    assert result["memory"] is None
    assert result["parameters"]["trainable"] > 0
    assert any("MambaForCausalLM cannot be predicted" in note for note in notes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("checkpointing", ["all", "selective", "none"])
def test_sdpa_on_cuda_with_fewer_heads_of_keys_than_of_queries(tmp_path: Path, checkpointing: str, dtype: str) -> None:
    """Long rows in pieces, without a mask: flash attention in 16 bits, in 32 the kernel that wants keys repeated."""
    kept = {}
    for groups in (1, 4):
        sizes = {"num_attention_heads": 4, "num_key_value_heads": groups, "head_dim": 64}
        folder = save_llama(tmp_path / str(groups), **sizes)
        model = {"attention": "sdpa", "dtype": dtype, "quantization": "none"}
        recipe = make_recipe(folder, model=model, train={"checkpointing": checkpointing})
        kept[groups] = rehearse(recipe, "cuda").footprint([a_pair(300, 500, 400)], others=False).parts["activations"]
    assert kept[1] < kept[4]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["all", "none"])
def test_the_forecast_is_what_a_step_takes_on_a_cpu(tmp_path: Path, checkpointing: str) -> None:
    """6 layers of 256, 8,000 tokens: resident memory of a process, but for what libraries keep."""
    folder = save_llama(
        tmp_path / "model", hidden_size=256, intermediate_size=700, num_hidden_layers=6, vocab_size=8000, head_dim=64
    )
    recipe = make_recipe(folder, train={"batch_pairs": 2, "pairs_per_microbatch": 1, "checkpointing": checkpointing})
    found = compare(recipe, PairList(synthetic_pairs(2, 1500, 8000, seed=0)))
    assert found.parameters_predicted == found.parameters_loaded
    assert found.predicted - CPU_LIBRARIES == pytest.approx(found.measured - found.libraries, rel=0.15)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("checkpointing", ["all", "none"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_forecast_is_what_a_step_allocates_on_cuda(
    tmp_path: Path, quantization: str, checkpointing: str, attention: str
) -> None:
    """A Llama of 110 million weights, pairs of 2,000 tokens, without Liger's kernels, which keep less."""
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 32000}
    folder = save_llama(tmp_path / "model", **sizes, num_attention_heads=12, num_key_value_heads=4, head_dim=64)
    model = {"quantization": quantization, "dtype": "bfloat16", "attention": attention, "kernels": "none"}
    train = {"batch_pairs": 2, "pairs_per_microbatch": 1, "checkpointing": checkpointing, "optimizer": "adamw"}
    recipe = make_recipe(folder, model=model, train=train)
    found = compare(recipe, PairList(synthetic_pairs(2, 1500, 32000, seed=0)))
    assert found.parameters_predicted == found.parameters_loaded
    assert found.predicted == pytest.approx(found.measured, rel=0.15)
