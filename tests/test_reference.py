"""The reference's log-probs on disk: the same training, found again, never stale, on from where it stopped."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sampo_cli import metrics
from sampo_cli import reference as references
from sampo_cli.batch import Pair
from sampo_cli.cache import lock
from sampo_cli.errors import Interrupted, UsageError
from sampo_cli.method_table import METHODS
from sampo_cli.reference import ReferenceCache, find_or_build, key_parts
from sampo_cli.signals import StopRequest
from sampo_cli.trainer import Trainer
from tests import tiny
from tests.test_trainer import adapter, make_pairs, make_recipe, make_trainer, rows

TWICE = {"max_steps": None, "epochs": 2, "learning_rate": 1e-3}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAMPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


def run(base: Path, folder: Path, name: str = "sampo", *, cache: str = "auto", **sections: Any) -> Trainer:
    train = {**TWICE, "cache_reference": cache, **sections.pop("train", {})}
    trainer = make_trainer(make_recipe(base, name, train=train, **sections), folder, held_out=2)
    trainer.fit(StopRequest())
    return trainer


def assert_same(cached: Trainer, plain: Trainer) -> None:
    """All rows, of training and of evaluation, to rounding in float32; a margin of 0 may be rounded to either side."""
    for kind in ("train", "eval"):
        for one, other in zip(rows(cached, kind), rows(plain, kind), strict=True):
            assert one.pop("kind") == other.pop("kind")
            if other["margin"] == 0:
                one.pop("accuracy"), other.pop("accuracy")
            assert metrics.numbers(one) == pytest.approx(metrics.numbers(other), rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].caches_reference])
def test_training_is_the_same_with_the_cache(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    cached = run(tiny_llama, tmp_path / "cached", method)
    plain = run(tiny_llama, tmp_path / "plain", method, cache="off")
    assert cached.feed.reference is not None
    assert plain.feed.reference is None
    if method == "dpop":
        # Its penalty has a kink where policy and reference agree: rounding says on which side the first step is.
        one, other = (rows(trainer)[0] for trainer in (cached, plain))
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["chosen_logps"] == pytest.approx(other["chosen_logps"], rel=1e-5)
        return
    assert_same(cached, plain)
    for name, tensor in adapter(plain).items():
        torch.testing.assert_close(adapter(cached)[name], tensor, atol=2e-4, rtol=0)


@pytest.mark.parametrize("section", [{"sampling": "independent"}, {"sft_weight": 0.5}, {"draws": 3}])
def test_also_where_other_tokens_are_scored(tiny_llama: Path, tmp_path: Path, section: dict[str, Any]) -> None:
    cached = run(tiny_llama, tmp_path / "cached", method=section)
    plain = run(tiny_llama, tmp_path / "plain", cache="off", method=section)
    assert_same(cached, plain)


def test_the_reference_is_not_computed_again(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(make_recipe(tiny_llama, train=TWICE), tmp_path / "run")
    trainer.prepare_reference()
    monkeypatch.setattr(trainer.raw_policy, "adapted", None)  # switching adapters off raises
    row = trainer.train_step([0, 1, 2], 0)
    assert row["margin"] == pytest.approx(0, abs=1e-5)


def test_auto_is_for_more_than_one_epoch(tiny_llama: Path, tmp_path: Path, empty_cache: Path) -> None:
    """10 pairs in steps of 4 are 3 steps an epoch."""
    run(tiny_llama, tmp_path / "one", train={"epochs": None, "max_steps": 3})
    assert not empty_cache.exists()
    run(tiny_llama, tmp_path / "two", train={"epochs": None, "max_steps": 4})
    assert len([path for path in empty_cache.iterdir() if path.is_dir()]) == 1


def test_one_cache_for_every_method_and_seed(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_cache: Path
) -> None:
    run(tiny_llama, tmp_path / "sampo")
    monkeypatch.setattr(references, "collate", None)  # scoring anything raises
    run(tiny_llama, tmp_path / "ipo", "ipo", train={"seed": 7, "learning_rate": 1e-4})
    assert len([path for path in empty_cache.iterdir() if path.is_dir()]) == 1


def test_the_key_holds_what_changes_the_numbers(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(make_recipe(tiny_llama), tmp_path / "run")
    policy, identity = trainer.raw_policy, trainer.identity
    first = key_parts(policy, identity)
    assert key_parts(policy, identity) == first
    assert key_parts(policy, {**identity, "the data": "other"}) != first
    assert key_parts(policy, {**identity, "the base": "other"}) != first
    policy.layout = "separate"
    assert key_parts(policy, identity) != first
    policy.layout, policy.dtype = "shared", torch.bfloat16
    assert key_parts(policy, identity) != first
    quantized = make_trainer(make_recipe(tiny_llama, model={"quantization": "nf4", "dtype": "float32"}), tmp_path / "q")
    assert key_parts(quantized.raw_policy, identity) != first


def test_each_round_has_a_reference_of_its_own(tiny_llama: Path, tmp_path: Path, empty_cache: Path) -> None:
    rounds = {"iterations": {"count": 2}}
    cached = run(tiny_llama, tmp_path / "cached", **rounds)
    plain = run(tiny_llama, tmp_path / "plain", cache="off", **rounds)
    assert len([path for path in empty_cache.iterdir() if path.is_dir()]) == 2
    assert_same(cached, plain)


def test_a_reference_from_another_model_is_found_before_the_first_step(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(make_recipe(tiny_llama, train=TWICE), tmp_path / "run")
    trainer.prepare_reference()
    path = trainer.feed.reference.folder / references.LOGPS
    path.write_bytes((np.fromfile(path, np.float32) - 1).tobytes())
    with pytest.raises(Exception, match="policy and reference differ by 1 nats"):
        trainer.fit(StopRequest())


def test_tdpo_cannot_and_says_so(tiny_llama: Path, tmp_path: Path, empty_cache: Path) -> None:
    with pytest.raises(UsageError, match="tdpo needs the whole vocabulary of the reference"):
        make_recipe(tiny_llama, "tdpo", train={"cache_reference": "on"})
    with pytest.raises(UsageError, match="simpo has no reference"):
        make_recipe(tiny_llama, "simpo", train={"cache_reference": "on"})
    run(tiny_llama, tmp_path / "run", "tdpo")
    assert not empty_cache.exists()


def numbers(pairs: list[Pair], offset: float = 0.0) -> list[np.ndarray]:
    return [np.arange(len(p.chosen) + len(p.rejected), dtype=np.float32) + p.pair_id * 100 + offset for p in pairs]


class Stop:
    """True after so many blocks."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_pass_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    """12 pairs in blocks of 5; stopped after 2 blocks, then the file loses half a block, as in a crash."""
    monkeypatch.setattr(references, "BLOCK", 5)
    pairs, scored = tiny.PairList(make_pairs()), []

    def score(block: list[Pair]) -> list[np.ndarray]:
        scored.extend(pair.pair_id for pair in block)
        return numbers(block)

    with pytest.raises(Interrupted, match="what there is of them is kept"):
        find_or_build({"a": 1}, "x", pairs, range(12), score, lambda text: None, Stop(2))
    assert scored == list(range(10))
    (aside,) = [path for path in empty_cache.iterdir() if path.is_dir()]
    assert aside.name.startswith(".building-")
    file = aside / references.LOGPS
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 6)
    scored.clear()
    cache = find_or_build({"a": 1}, "x", pairs, range(12), score, lambda text: None)
    assert scored == [5, 6, 7, 8, 9, 10, 11]
    assert [path.name for path in empty_cache.iterdir() if path.is_dir()] == [cache.folder.name]
    for pair, expected in zip(pairs, numbers(pairs), strict=True):
        assert np.array_equal(cache(pair), expected)
    assert np.array_equal(ReferenceCache(cache.folder)(pairs[3]), numbers(pairs)[3])


def test_a_pair_that_is_not_in_it_is_an_error() -> None:
    pairs = tiny.PairList(make_pairs())
    cache = find_or_build({"a": 2}, "x", pairs, range(3, 9), numbers, lambda text: None)
    assert np.array_equal(cache(pairs[8]), numbers([pairs[8]])[0])
    for stranger in (pairs[0], replace(pairs[0], pair_id=99)):
        with pytest.raises(KeyError, match="is not in"):
            cache(stranger)


def test_two_runs_do_not_work_it_out_twice(empty_cache: Path) -> None:
    """The second waits for the lock of the first, and takes what that one wrote; asked to stop, it does."""
    pairs, notes = tiny.PairList(make_pairs()), []
    built = find_or_build({"a": 3}, "x", pairs, range(12), numbers, notes.append)
    aside = built.folder.rename(built.folder.with_name("hidden"))
    with lock("reference", built.folder.name):
        with pytest.raises(Interrupted):
            find_or_build({"a": 3}, "x", pairs, range(12), numbers, notes.append, Stop(0))
        assert "waiting" in notes[-1]
        found: list[ReferenceCache] = []
        other = threading.Thread(
            target=lambda: found.append(
                find_or_build({"a": 3}, "x", pairs, range(12), lambda block: None, notes.append)
            )
        )
        other.start()
        aside.rename(built.folder)
    other.join(10)
    assert np.array_equal(found[0](pairs[5]), numbers([pairs[5]])[0])
