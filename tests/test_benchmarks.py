"""The benchmarks: a duel with trl on a tiny model, and the arithmetic of what it reports."""

from __future__ import annotations

import json
import math
import mmap
import os
import subprocess
import sys
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import measure, scale, startup
from benchmarks.compare import Disagreement, agreement, figures, margin_of, ratios
from benchmarks.contender import Work
from benchmarks.measure import Meter
from benchmarks.models import write_random
from benchmarks.ours import in_given_order
from benchmarks.pairs import PairList, order_of, step_sizes, synthetic_pairs
from benchmarks.settings import Settings, Variant, parse_variant, recipe_of
from sampo_cli.errors import UsageError
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
MEBIBYTE = 2**20


def make_settings(model: Path, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "model": str(model),
        "data": "synthetic:8:40",
        "pairs_per_step": 4,
        "pairs_per_microbatch": 2,
        "steps": 2,
        "warmup_steps": 1,
        "epochs": 1,
        "max_length": 64,
        "quantization": "none",
        "dtype": "float32",
        "checkpointing": "all",
        "learning_rate": 1e-2,
        "beta": None,
        "opponent_beta": None,
        "lora_r": 16,
        "lora_alpha": 32,
        "seed": 42,
        "trl_precompute": False,
    }
    return Settings(**values | changes)


@pytest.mark.slow
def test_a_duel_with_trl_agrees_and_reports_every_step(tiny_llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    """Two epochs, so that ours caches its reference and trl, which does not, still has the same losses."""
    command = [sys.executable, "-m", "benchmarks.step", "--opponent", "trl", "--model", str(tiny_llama)]
    command += ["--data", str(pairs_file), "--pairs-per-step", "8", "--steps", "2", "--epochs", "2", "--device", "cpu"]
    command += ["--dtype", "float32", "--learning-rate", "1e-2", "--method", "dpo", "--json"]
    environment = os.environ | {"SAMPO_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    trl, dpo = report["contenders"]
    assert [trl["name"], dpo["name"]] == ["trl", "dpo"]

    losses = {c["name"]: [step["loss"] for step in c["steps"]] for c in report["contenders"]}
    assert losses["dpo"] == pytest.approx(losses["trl"], abs=1e-4)  # the warm-up, and two steps of two epochs
    assert len(losses["dpo"]) == 5
    assert losses["dpo"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses["dpo"][1] < math.log(2) - 0.05, "an update that moves nothing shows nothing"
    assert dpo["agreement"]["second"] < 1e-4

    for contender in report["contenders"]:
        assert contender["computed_per_needed"] >= 1
        assert contender["peak_mib"] > contender["peak_above_model_mib"] > 0
        assert [step["needed_tokens"] for step in contender["steps"]] == [s["needed_tokens"] for s in trl["steps"]]
        assert sum(step["pairs"] for step in contender["steps"]) == 40
        assert all(step["computed_tokens"] >= step["needed_tokens"] for step in contender["steps"])
    assert dpo["computed_per_needed"] < trl["computed_per_needed"], "one row per pair"
    assert trl["reference_seconds"] == 0 < dpo["reference_seconds"]
    assert trl["ratio"] is None
    least, most = dpo["ratio"]["pairs_per_second_spread"]
    assert 0 < least <= most
    assert dpo["ratio"]["pairs_per_second"] == pytest.approx(dpo["pairs_per_second"] / trl["pairs_per_second"])
    assert "benchmarks.step" in report["command"]
    assert report["machine"]["versions"]["trl"]


def compete_here(settings: Settings, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Ours and trl one after the other, in threads of this process, which never wait for their turn."""
    from benchmarks import opponent, ours

    pairs, order = PairList(synthetic_pairs(8, 40, tiny.VOCABULARY, seed=0)), order_of(settings)
    found = {}
    for name, module in (("ours", ours), ("trl", opponent)):
        (folder / name).mkdir()
        here, there = Pipe()
        sizes = [step_sizes([pairs[index] for index in indices]) for _, indices in order]
        work = Work(settings, Variant("dpo", "dpo"), pairs, order, folder / "adapter.safetensors", folder / name)
        thread = Thread(target=module.run, args=(work, there))
        thread.start()
        assert here.recv()[0] == "ready"
        found[name] = []
        for size in sizes:
            here.send("go")
            found[name].append(here.recv()[1] | size)
        here.close()
        thread.join()
    return found


@pytest.mark.parametrize("changes", [{}, {"trl_precompute": True}, {"opponent_beta": 0.5}])
def test_another_loss_of_the_opponent_is_noticed(tiny_llama: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """With beta 0.5 instead of 0.1 the first loss is ln 2 all the same; the second is not."""
    found = compete_here(make_settings(tiny_llama, **changes), tmp_path)
    assert found["trl"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    if changes.get("opponent_beta"):
        with pytest.raises(Disagreement, match="after the first update"):
            agreement(found["ours"], found["trl"], same_loss=True, dtype="float32", beta=0.1)
    else:
        difference = agreement(found["ours"], found["trl"], same_loss=True, dtype="float32", beta=0.1)
        assert difference["second"] < 1e-4


def loss_rows(*losses: float) -> list[dict[str, Any]]:
    return [{"loss": loss, "pairs": 16, "response_tokens": 1600} for loss in losses]


def test_margins_by_hand() -> None:
    """-log sigmoid(2) = log(1 + e^-2) = 0.126928."""
    assert margin_of(math.log(2)) == pytest.approx(0, abs=1e-12)
    assert margin_of(math.log1p(math.exp(-2))) == pytest.approx(2)
    assert margin_of(math.log1p(math.exp(3))) == pytest.approx(-3)
    assert math.isnan(margin_of(math.nan))


@pytest.mark.parametrize("second", [0.3, 1e-3, math.nan])
def test_losses_that_differ_stop_the_benchmark(second: float) -> None:
    """100 tokens a pair, beta 0.1, a loss of 0.5 (margin 0.4328): in bfloat16 rounding explains

    1e-4 + 4 * 1.4142 * 0.1 * 0.06 * sqrt(100 / 16) + 0.2 * 0.4328 = 0.1715, a loss between 0.436 and 0.571.
    """
    rows, bad = loss_rows(math.log(2), 0.5), loss_rows(math.log(2), second)
    compare = partial(agreement, same_loss=True, beta=0.1)
    with pytest.raises(Disagreement, match=r"margins .* are 0\.4328 and .* in bfloat16 rounding explains .* 0\.17;"):
        compare(rows, bad, dtype="bfloat16")
    for near in (0.437, 0.570):
        assert compare(rows, loss_rows(math.log(2), near), dtype="bfloat16")["allowed"] == pytest.approx(
            0.1715, abs=1e-4
        )
        with pytest.raises(Disagreement, match="in float32"):
            compare(rows, loss_rows(math.log(2), near), dtype="float32")
    for far in (0.435, 0.572):
        with pytest.raises(Disagreement):
            compare(rows, loss_rows(math.log(2), far), dtype="bfloat16")
    agreement(rows, bad, same_loss=False, dtype="bfloat16", beta=0.1)  # another method than trl's
    with pytest.raises(Disagreement, match="before the first update"):
        agreement(rows, loss_rows(0.7, 0.5), same_loss=False, dtype="bfloat16", beta=0.1)
    agreement(rows, loss_rows(0.7, 0.5), same_loss=False, dtype="bfloat16", beta=0.1, cached=True)


def step_row(seconds: float, peak: int, *, timed: bool = True) -> dict[str, Any]:
    sizes = {"pairs": 8, "computed_tokens": 110, "needed_tokens": 100, "timed": timed}
    return {"seconds": seconds, "cpu_seconds": 2 * seconds, "peak_bytes": peak * MEBIBYTE, **sizes}


def test_figures_and_ratios_by_hand() -> None:
    """16 pairs in 1 + 3 seconds after a warm-up that only counts for memory, and 4 seconds of reference."""
    reference = {"seconds": 4.0, "cpu_seconds": 8.0, "peak_bytes": 150 * MEBIBYTE}
    rows = [step_row(9.0, 180, timed=False), step_row(1.0, 170), step_row(3.0, 160)]
    ours = figures({"settled_bytes": 100 * MEBIBYTE, "prepared": {"reference": reference}}, rows)
    assert ours["pairs_per_second"] == 16 / 8
    assert ours["pairs_per_cpu_second"] == 16 / 16
    assert ours["seconds_per_step"] == 2
    assert ours["computed_per_needed"] == 1.1
    assert (ours["peak_mib"], ours["peak_above_model_mib"]) == (180, 80)

    slow = [step_row(9.0, 180, timed=False), step_row(6.0, 260), step_row(10.0, 260)]
    theirs = figures({"settled_bytes": 100 * MEBIBYTE, "prepared": {}}, slow)
    found = ratios(ours, rows, theirs, slow)
    assert found["pairs_per_second"] == 2.0  # 16 / 8 against 16 / 16
    assert found["pairs_per_second_spread"] == [10 / 3, 6.0]
    assert found["peak_above_model"] == 80 / 160


def test_a_variant_is_a_method_and_changes_of_its_recipe(tiny_llama: Path) -> None:
    variant = parse_variant("sampo+no-prefix-sharing+no-length-sorting+train.checkpointing=none", "dpo")
    assert (variant.method, variant.sorting) == ("sampo", False)
    recipe = recipe_of(make_settings(tiny_llama, epochs=3), variant)
    assert recipe.method.reduction == "sample"
    assert (recipe.model.layout, recipe.train.checkpointing, recipe.train.epochs) == ("separate", "none", 3)
    assert parse_variant("no-cache", "dpo") == Variant("no-cache", "dpo", ("train.cache_reference=off",))
    with pytest.raises(UsageError, match="'faster' is unknown"):
        parse_variant("dpo+faster", "dpo")


def test_each_epoch_has_the_same_pairs_and_the_first_step_comes_twice(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, pairs_per_step=4, steps=3, epochs=2)
    order = order_of(settings)
    assert [epoch for epoch, _ in order] == [0, 0, 0, 0, 1, 1, 1]
    assert order[0] == order[1]
    longer = order_of(make_settings(tmp_path, pairs_per_step=4, steps=3, epochs=2, warmup_steps=5))
    assert longer == [order[1], order[1], order[2], order[3], order[4], *order[1:]]
    first, second = ([index for epoch, step in order[1:] if epoch == number for index in step] for number in (0, 1))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_random_pairs_have_the_length_asked_for() -> None:
    pairs = PairList(synthetic_pairs(20, 64, 512, seed=1))
    assert {len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs} == {64}
    assert {len(pair.prompt) for pair in pairs} == {24}  # 3/8 of 64
    assert min(min(len(p.chosen), len(p.rejected)) for p in pairs) >= 20  # half of the other 40
    responses = int((pairs.chosen_tokens + pairs.rejected_tokens).sum())
    assert step_sizes(pairs) == {"pairs": 20, "response_tokens": responses, "needed_tokens": responses + 20 * 24}
    assert [len(cut) for cut in in_given_order(8)(pairs, 4096, "shared", 8)] == [8, 8, 4]


@pytest.mark.parametrize("marks", ["kernel", "samples"])
def test_the_meter_sees_a_peak_that_is_gone_again(marks: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if marks == "samples":
        monkeypatch.setattr(measure, "CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    elif not os.access(measure.CLEAR_REFS, os.W_OK):
        pytest.skip("the high-water mark cannot be reset here")
    meter = Meter(torch.device("cpu"))
    settled = meter.settled_bytes([])
    meter.start()
    held = mmap.mmap(-1, 64 * MEBIBYTE)  # what malloc gives may stay resident after it was freed
    numbers = np.frombuffer(held)
    for _ in range(20):
        np.add(numbers, 1, out=numbers)  # long enough for a sample
    del numbers
    held.close()
    readings = meter.stop()
    assert 60 < (readings.peak_bytes - settled) / MEBIBYTE < 90
    assert 0 < readings.cpu_seconds <= 1.2 * readings.seconds + 0.1
    meter.start()
    assert (meter.stop().peak_bytes - settled) / MEBIBYTE < 30, "each stretch has a peak of its own"


@pytest.mark.parametrize("tied", [False, True])
def test_a_random_model_loads_and_has_its_own_tokenizer(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = tiny.CONFIGS["llama"]()
    config.tie_word_embeddings = tied
    write_random(config, tmp_path, shard_bytes=100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert model.model.layers[1].mlp.up_proj.weight.float().std().item() == pytest.approx(0.2, rel=0.05)
    assert torch.equal(model.model.norm.weight, torch.ones(64, dtype=torch.bfloat16))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("Grüße, 世界", add_special_tokens=False).input_ids
    assert len(ids) == len("Grüße, 世界".encode())
    assert tokenizer.decode(ids) == "Grüße, 世界"
    assert tokenizer.pad_token_id == 0


def test_the_start_of_a_run_is_measured_in_its_stages(tiny_llama: Path, tmp_path: Path) -> None:
    """What `start_up` does in processes of their own."""
    source = tmp_path / "rows.jsonl"
    startup.write_rows(source, 60)
    recipe, cache = startup.recipe_for(source, tiny_llama), str(tmp_path / "cache")
    assert startup._tokenize(recipe, cache)["tokenize"] > 0
    planned = startup._plan(recipe, cache)
    trained = startup._train(recipe, cache, tmp_path / "run")
    assert 0 < planned["plan"] < 60
    assert trained["start"] > 0
    assert trained["first_step"] > trained["step"] > 0
    assert (tmp_path / "run" / "adapter").is_dir()


@pytest.mark.slow
def test_scale_measures_a_length_and_draws_it(
    tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--model", str(tiny_llama), "--pairs", "", "--steps", "", "--lengths", "64", "--json"]
    assert scale.main([*arguments, "--plot", str(tmp_path / "scale.png")]) == 0
    report = json.loads(capfd.readouterr().out)
    (row,) = report["lengths"]
    assert 2 * (24 + 40 + 20) <= row["positions"] <= 2 * (24 + 40 + 40)  # two pairs of 64 tokens a side
    assert row["seconds"] > 0
    assert row["mib"] > 0
    assert (tmp_path / "scale.png").stat().st_size > 1000
    assert scale.table_of("lengths", report["lengths"]).row_count == 1
