"""Fixtures that many tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is loaded: tiny models on several threads spin more than they compute.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from sampo_cli.cli import main
from tests import tiny
from tests.reliability import record_outcome
from tests.warm import Warm

Sampo = Callable[..., tuple[int, str, str]]
"""See the fixture `sampo`."""

for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:  # as nohup and shells in the background leave it to their children
        signal.signal(number, usual)


def pytest_configure(config: pytest.Config) -> None:
    """Only tests marked `gpu` see one: the others say what a CPU gives, to the last bit."""
    if not config.option.markexpr.startswith("gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Each test's outcome, once: with several workers, their controller hears of it too."""
    if "PYTEST_XDIST_WORKER" not in os.environ and (report.when == "call" or report.outcome != "passed"):
        record_outcome(report.nodeid, report.outcome)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data, tokenizers and golden numbers beside the checkout; absent on a user's machine."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip(f"no golden numbers and real data in {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of 2 layers, a byte-level tokenizer and a chat template."""
    return tiny.save_model(tiny.CONFIGS["llama"](), tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Runs commands in processes of their own that start at once."""
    process = Warm(tmp_path_factory.mktemp("warm"))
    yield process
    process.close()


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """24 short pairs, chosen longer in some and shorter in others."""
    return tiny.write_pairs(tmp_path / "pairs.jsonl", 24)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenized pairs are cached per test session, not in the user's folder."""
    monkeypatch.setenv("SAMPO_CACHE", str(tmp_path_factory.getbasetemp() / "sampo-cache"))


@pytest.fixture
def sampo(capfd: pytest.CaptureFixture[str]) -> Sampo:
    """Runs a command in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run
