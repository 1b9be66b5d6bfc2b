"""Several processes do what one does: the same losses and adapter, one folder, one voice, one end.

Processes are forks of one that is ready, with the environment that torchrun, or accelerate's launcher, leaves them;
they talk over gloo on the CPU. `test_launch.py` starts them with the launchers themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from sampo_cli import metrics
from sampo_cli.batch import Pair, shares
from sampo_cli.config import validate
from sampo_cli.errors import ExitCode, UsageError
from sampo_cli.sharding import check
from sampo_cli.zero import hidden, zero_settings
from tests import tiny
from tests.test_kill import TIMING
from tests.warm import Outcome, Warm

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
}
"""What accelerate's launcher makes of `recipes/accelerate/fsdp-qlora.yaml`."""

ZERO = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
}
"""And of `deepspeed-zero3.yaml`."""

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed (the extra 'deepspeed')"
)

FLAGS = (
    *("--batch-pairs", 5, "--save-every", 2, "--eval-fraction", 0.2, "--learning-rate", 1e-3, "--epochs", 1),
    *("--set", "model.dtype=float32", "--set", "train.checkpointing=none", "--set", "train.eval_every=2"),
    *("--set", "train.tokens_per_microbatch=150"),
)
"""24 pairs, 19 of them to train on: steps of 5, 5, 5 and 4 pairs, each cut into several micro-batches."""


ADAPTER_BYTES = 4 * 32_768
HEAD_BYTES = 4 * 320 * 64
"""Of the tiny Llama's adapter in float32, of its embeddings and of its head: they stay whole."""


class Place:
    """A model, pairs, and folders for runs."""

    def __init__(self, warm: Warm, home: Path, model: Path) -> None:
        self.warm, self.home, self.model = warm, home, model
        self.data = tiny.write_pairs(home / "pairs.jsonl", 24)

    def train(
        self, name: str, count: int, *flags: object, environment: Sequence[dict[str, str]] = (), **fault: Any
    ) -> tuple[Path, list[Outcome]]:
        """A run in `count` processes with a cache of its own; one alone has nothing of a launcher around it."""
        run, cache = self.home / name / "run", self.home / name / "cache"
        command = ("train", "--model", self.model, "--data", self.data, *FLAGS, *flags, "--output", run)
        if count == 1:
            return run, [self.warm.run(*command, cache=cache)]
        return run, self.warm.run_ranks(count, *command, cache=cache, environment=environment, **fault)

    def finish(self, name: str, count: int, *flags: object, environment: Sequence[dict[str, str]] = ()) -> Path:
        run, outcomes = self.train(name, count, *flags, environment=environment)
        assert [outcome.code for outcome in outcomes] == [0] * count, [outcome.stderr for outcome in outcomes]
        for other in outcomes[1:]:
            assert (other.stdout, other.stderr) == ("", "")
        return run


@pytest.fixture(scope="module")
def place(warm: Warm, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(warm, tmp_path_factory.mktemp("ranks"), tiny_llama)


@pytest.fixture(scope="module")
def rounds(place: Place) -> Path:
    """One process: 4 bits, two rounds with cached references, evaluations."""
    return place.finish("rounds-1", 1, *ROUNDS)


ROUNDS = ("--quantization", "nf4", "--iterations", 2, "--cache-reference", "on")


def assert_same(found: Path, expected: Path) -> None:
    """Rows, held-out pairs and adapters are equal but for the rounding of sums that are added up in another order."""
    for name in ("metrics.jsonl", "held_out.jsonl"):
        rows, others = list(metrics.read(found / name)), list(metrics.read(expected / name))
        assert len(rows) == len(others)
        for row, other in zip(rows, others, strict=True):
            assert row.keys() == other.keys()
            for key in row.keys() - set(TIMING):
                if isinstance(row[key], float) and key not in ("accuracy", "sum_accuracy"):
                    assert row[key] == pytest.approx(other[key], abs=1e-4, rel=1e-4), (name, row["step"], key)
                elif isinstance(row[key], int):
                    assert row[key] == other[key], (name, row["step"], key)
    for folder in ("adapter", "best", *(f"rounds/{path.name}" for path in (expected / "rounds").glob("*"))):
        weights, others = (load_file(run / folder / "adapter_model.safetensors") for run in (found, expected))
        assert weights.keys() == others.keys()
        assert max(float(np.abs(weights[key] - others[key]).max()) for key in weights) < 2e-5
    a, b = (json.loads((run / "summary.json").read_text()) for run in (found, expected))
    for key in ("pairs", "steps", "adapter_step", "state", "stopped_early"):
        assert a[key] == b[key]


def test_pairs_are_split_by_tokens() -> None:
    """Rows of 9, 7, 6, 5, 4 and 3 positions on two: 9 | 7, then 6 to 7, 5 to 9, 4 to 13, 3 to 14: 17 and 17."""
    lengths = {0: 3, 1: 9, 2: 5, 3: 7, 4: 6, 5: 4}
    pairs = [Pair(n, *(np.zeros(k, np.int32) for k in (length - 2, 1, 1))) for n, length in lengths.items()]
    first, second = shares(pairs, 2)
    assert ([pair.pair_id for pair in first], [pair.pair_id for pair in second]) == ([1, 2, 0], [3, 4, 5])
    assert [len(part) for part in shares(pairs[:2], 3)] == [1, 1, 0]


@pytest.mark.parametrize("count", [2, 3])
def test_rounds_over_4_bits_with_cached_references(place: Place, rounds: Path, count: int) -> None:
    run = place.finish(f"rounds-{count}", count, *ROUNDS)
    assert_same(run, rounds)
    assert json.loads((run / "summary.json").read_text())["processes"] == count


@pytest.mark.parametrize(
    "flags",
    [
        (
            "--method",
            "bco-pair",
            "--set",
            "train.early_stopping.metric=margin",
            "--set",
            "train.early_stopping.patience=1",
        ),
        ("--method", "tdpo", "--batch-pairs", "2", "--max-steps", "3"),
    ],
    ids=["a mean over earlier steps, and early stopping", "the whole vocabulary, and fewer pairs than processes"],
)
def test_methods(place: Place, flags: tuple[str, ...]) -> None:
    runs = [place.finish(f"{flags[1]}-{count}", count, "--quantization", "none", *flags) for count in (1, 3)]
    assert_same(runs[1], runs[0])


def test_another_number_of_processes_goes_on(place: Place, rounds: Path) -> None:
    """Two stop inside the second round, at a signal that the first alone hears; three go on; all in all, it is one."""
    after_5 = {"event": "open", "path": "metrics.jsonl", "at": 13}
    run, outcomes = place.train("stopped", 2, *ROUNDS, signals=[15], **after_5)
    assert [outcome.code for outcome in outcomes] == [ExitCode.TERMINATED] * 2
    assert outcomes[1].stderr == ""
    summary = json.loads((run / "summary.json").read_text())
    assert summary["state"] == "interrupted"
    assert 4 < summary["steps"]["done"] < 8
    again = place.warm.run_ranks(3, "train", "--resume", run, cache=run.parent / "cache")
    assert [outcome.code for outcome in again] == [0] * 3, again[0].stderr
    assert_same(run, rounds)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_fsdp(place: Place, quantization: str) -> None:
    """Each process keeps a part of the base; steps of 2 pairs leave some of them without any."""
    flags = ("--quantization", quantization, "--batch-pairs", 2, "--max-steps", 3, "--cache-reference", "on")
    runs = [place.finish(f"whole-{quantization}", 1, *flags)]
    runs.append(place.finish(f"shared-{quantization}", 3, *flags, environment=[FSDP] * 3))
    assert_same(runs[1], runs[0])
    with_others, layers = kept(runs[1])
    assert with_others > 0.4 * layers  # two thirds of them; 4-bit scales stay whole


def kept(run: Path) -> tuple[int, int]:
    """Bytes of a run's layers that its first process left to the others, and of the layers."""
    told = re.search(r"each process keeps ([\d,]+) of ([\d,]+) bytes", (run / "run.log").read_text())
    assert told
    own, whole = (int(size.replace(",", "")) for size in told.groups())
    return whole - own, whole - ADAPTER_BYTES - 2 * HEAD_BYTES


@pytest.fixture
def all_parts(tmp_path: Path) -> dict[str, str]:
    """ZeRO-3 that lets go of the smallest weight: by default a tiny model's stay once they are gathered."""
    file = tmp_path / "zero.json"
    settings = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": "auto"}
    file.write_text(json.dumps({"zero_optimization": settings}))
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}


@needs_deepspeed
@pytest.mark.parametrize(
    ("count", "flags"),
    [
        (2, ("--iterations", 2, "--cache-reference", "on", "--set", "train.checkpointing=all")),
        (3, ("--method", "tdpo", "--batch-pairs", 2, "--max-steps", 3)),
    ],
    ids=["rounds, cached references, layers computed twice", "the whole vocabulary, and fewer pairs than processes"],
)
def test_zero3(place: Place, all_parts: dict[str, str], count: int, flags: tuple[object, ...]) -> None:
    flags = ("--quantization", "none", *flags)
    one = place.finish(f"zero-{count}-one", 1, *flags)
    several = place.finish(f"zero-{count}", count, *flags, environment=[all_parts] * count)
    assert_same(several, one)
    with_others, layers = kept(several)
    assert with_others == pytest.approx((1 - 1 / count) * layers, rel=0.01)  # the final norm stays whole; padding


@needs_deepspeed
def test_zero3_goes_on_without_deepspeed(place: Place) -> None:
    """Two processes stop at a signal after a step; one alone, with the base whole, does the rest."""
    flags = ("--quantization", "none")
    one = place.finish("zero-whole", 1, *flags)
    run, outcomes = place.train(
        "zero-stopped", 2, *flags, environment=[ZERO] * 2, signals=[15], event="open", path="metrics.jsonl", at=5
    )
    assert [outcome.code for outcome in outcomes] == [ExitCode.TERMINATED] * 2
    assert place.warm.run("train", "--resume", run, cache=run.parent / "cache").code == 0
    assert_same(run, one)


@needs_deepspeed
def test_zero2_is_data_parallel_and_says_what_stays_whole(place: Place) -> None:
    flags = ("--quantization", "nf4", "--max-steps", 2)
    environment = [ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}] * 2
    run = place.finish("zero2", 2, *flags, environment=environment)
    assert_same(run, place.finish("zero2-one", 1, *flags))
    assert "ZeRO-2: gradients and optimizer of an adapter are at most" in (run / "run.log").read_text()


def test_what_zero_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, all_parts: dict[str, str]) -> None:
    for name, value in ZERO.items():
        monkeypatch.setenv(name, value)
    assert zero_settings() == {"stage": 3, "offload_param": {"device": "none"}}
    file = Path(all_parts["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    assert zero_settings()["stage3_param_persistence_threshold"] == 0
    assert "stage3_max_live_parameters" not in zero_settings()
    for text in ("{", "[]", "{}", '{"zero_optimization": {"offload_param": "cpu"}}'):
        file.write_text(text)
        with pytest.raises(UsageError, match=r"DeepSpeed config .*zero\.json") as caught:
            zero_settings()
        assert caught.value.hint
    file.unlink()
    with pytest.raises(UsageError, match="FileNotFoundError"):
        zero_settings()


def test_deepspeed_sees_layers_without_adapters_and_all_is_put_back() -> None:
    """embed, layers[0..1].{proj, lora_A}, norm: of these it sees the two proj and what holds them."""
    from torch import nn

    def layer() -> nn.Module:
        return nn.ModuleDict({"proj": nn.Linear(2, 2), "lora_A": nn.Linear(2, 1)})

    layers = nn.ModuleList([layer(), layer()])
    body = nn.ModuleDict({"embed": nn.Embedding(3, 2), "layers": layers, "norm": nn.LayerNorm(2)})
    before = list(body.state_dict())
    with hidden(body, list(layers)):
        seen = {name.removesuffix(".weight") for name in body.state_dict() if name.endswith("weight")}
        assert seen == {"layers.0.proj", "layers.1.proj"}
    assert list(body.state_dict()) == before


def test_an_error_in_one_process_ends_all(place: Place) -> None:
    """The second cannot write its cache. It says so, once; nobody waits for it."""
    nowhere = {"SAMPO_CACHE": "/dev/null/cache"}
    run, outcomes = place.train("one-fails", 2, environment=[{}, nowhere])
    assert [outcome.code for outcome in outcomes] == [ExitCode.DATA] * 2
    assert outcomes[1].stderr.startswith("error: process 2 of 2: cannot write the cache of tokenised pairs")
    assert "error" not in outcomes[0].stderr
    assert max(outcome.seconds for outcome in outcomes) < 40
    assert not (run / "summary.json").exists() or json.loads((run / "summary.json").read_text())["state"] == "failed"


def test_an_error_in_all_processes_is_said_once(place: Place) -> None:
    _, outcomes = place.train("all-fail", 2, "--method", "nope")
    assert [outcome.code for outcome in outcomes] == [ExitCode.USAGE] * 2
    assert outcomes[0].stderr.startswith("error: unknown method 'nope'")
    assert outcomes[1].stderr == ""


def recipe(**sections: Any) -> Any:
    return validate({"model": {"name": "m"}, "data": {"sources": ["d"]}, **sections})


def refuses(recipes: dict[str, Any]) -> None:
    for what, one in recipes.items():
        with pytest.raises(UsageError, match=what) as caught:
            check(one)
        assert caught.value.hint


def test_what_fsdp_cannot_do_is_refused_with_an_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    int8 = recipe(model={"name": "m", "quantization": "int8"})
    check(int8)
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    check(recipe())
    refused = {
        "int8": int8,
        "train.generate": recipe(train={"generate": {"prompts": 2}}),
        "offload_activations": recipe(train={"offload_activations": True}),
    }
    refuses(refused)
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UsageError, match="FSDP 1"):
        check(recipe())


def test_what_zero3_cannot_do_is_refused_with_an_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"name": "m", "quantization": "none"}
    for name, value in ZERO.items():
        monkeypatch.setenv(name, value)
    check(recipe(model=whole))
    refuses(
        {
            "ZeRO-3 with model.quantization=nf4": recipe(),
            "int8": recipe(model={"name": "m", "quantization": "int8"}),
            "lora.dora": recipe(model=whole, lora={"dora": True}),
            "checkpointing=selective": recipe(model=whole, train={"checkpointing": "selective"}),
            "train.generate": recipe(model=whole, train={"generate": {"prompts": 2}}),
            "offload_activations": recipe(model=whole, train={"offload_activations": True}),
        }
    )
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "nvme")
    refuses({"NVMe": recipe(model=whole)})
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    check(recipe())
