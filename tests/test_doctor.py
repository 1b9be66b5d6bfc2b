"""`sampo doctor` on machines that lack something: each is told with what to do, and the rest is still checked."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sampo_cli.diagnosis import diagnose
from sampo_cli.doctor_device import NF4_ERROR, driver, quantization_errors
from sampo_cli.doctor_hub import check_hub
from sampo_cli.doctor_machine import Check, check_disks, check_packages, pinned_versions
from tests.hub_server import HubServer

FAKE_SMI = "#!/bin/sh\necho 'NVIDIA GeForce RTX 4090, 580.65.06'\n"


def doctor(*arguments: str, path: Path, **environment: str) -> tuple[int, dict[str, Check], str]:
    """The command in a process of its own, in which the modules and programs in `path` come first."""
    search = os.pathsep.join(filter(None, (str(path), os.environ.get("PYTHONPATH"))))
    programs = f"{path}{os.pathsep}{os.environ['PATH']}"
    outcome = subprocess.run(
        [sys.executable, "-m", "sampo_cli", "doctor", "--json", *arguments],
        env=os.environ | {"PYTHONPATH": search, "PATH": programs} | environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    report = json.loads(outcome.stdout)
    assert report["ok"] == (outcome.returncode == 0)
    return outcome.returncode, {check["name"]: Check(**check) for check in report["checks"]}, outcome.stderr


def test_a_machine_with_a_driver_and_a_torch_without_cuda(tmp_path: Path) -> None:
    """Such a torch would train on the CPU for days; and a bitsandbytes without its library stops nothing else."""
    if torch.version.cuda:
        pytest.skip("this torch has CUDA")
    smi = tmp_path / "nvidia-smi"
    smi.write_text(FAKE_SMI)
    smi.chmod(0o755)
    (tmp_path / "bitsandbytes.py").write_text("raise OSError('libbitsandbytes_cpu.so: cannot open')")
    code, found, said = doctor("--offline", path=tmp_path)
    assert code == 1
    assert found["GPU"].state == "fail"
    assert "RTX 4090, 580.65.06" in found["GPU"].found
    assert "without CUDA" in found["GPU"].found
    assert f"torch=={pinned_versions()['torch']}" in found["GPU"].advice
    assert found["bitsandbytes"].state == "fail"
    assert "libbitsandbytes_cpu.so: cannot open" in found["bitsandbytes"].found
    assert "--quantization none" in found["bitsandbytes"].advice
    assert said.startswith("error: failed: GPU, bitsandbytes\nhint: ")
    assert found["Hub (https://huggingface.co)"].state == "ok"
    assert {found[name].state for name in ("Python", "packages", "attention", "kernels", "bfloat16")} == {"ok"}


def test_a_torch_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    code, found, said = doctor("--offline", path=tmp_path)
    assert code == 1
    assert "libcudart.so.13" in found["torch"].found
    assert "--force-reinstall" in found["torch"].advice
    assert found["memory"].state in ("ok", "warn")
    assert "outputs" in found
    assert "Traceback" not in said


def test_a_layer_is_really_quantized_and_back() -> None:
    """Lloyd's bound for 16 levels is 0.0975 of a normal distribution's deviation; NF4 in blocks is a little better."""
    nf4, int8 = quantization_errors(torch.device("cpu"))
    assert nf4 == pytest.approx(0.092, abs=0.002)
    assert NF4_ERROR[0] < nf4 < NF4_ERROR[1]
    assert 0.004 < int8 < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_is_tried() -> None:
    """Its memory and driver are told, NF4 and the 8-bit optimizer run on it, flex attention compiles."""
    found = {check.name: check for check in diagnose(offline=True).checks}
    assert "compute capability" in found["GPU 0"].found
    assert "GPU kernels" not in found
    assert (found["bitsandbytes"].state, "8-bit AdamW steps" in found["bitsandbytes"].found) == ("ok", True)
    assert found["attention"].state == "ok", found["attention"].found
    assert found["kernels"].state in ("ok", "warn")


def test_a_driver_that_does_not_answer_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert driver() == []
    smi.write_text(FAKE_SMI)
    assert driver() == ["NVIDIA GeForce RTX 4090, 580.65.06"]


def distribution(folder: Path, *, name: str, version: str, requires: tuple[str, ...] = ()) -> None:
    """What an installed package leaves for importlib.metadata."""
    place = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir(parents=True)
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
    (place / "METADATA").write_text("Metadata-Version: 2.4\n" + "\n".join(lines) + "\n")


def test_versions_missing_outside_and_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft is not there, transformers is too old, torch newer than what was tested; an extra is only warned of."""
    needs = ("absent-peft<1,>=0.19", "transformers<6,>=5.17", "torch>=2.7", 'wandb>=0.22; extra == "report"')
    for name, version, requires in (
        ("sampo-cli", "9", needs),
        ("transformers", "4.57.1", ()),
        ("torch", "99.1.0+cu130", ()),
        ("wandb", "0.1", ()),
    ):
        distribution(tmp_path, name=name, version=version, requires=requires)
    monkeypatch.syspath_prepend(tmp_path)
    found = {check.name: check for check in check_packages()}
    assert found["absent-peft"] == Check("absent-peft", "fail", "not installed", "pip install 'absent-peft<1,>=0.19'")
    assert (found["transformers"].state, found["transformers"].advice) == (
        "fail",
        "pip install 'transformers<6,>=5.17'",
    )
    assert found["torch"].state == "warn"
    assert f"pip install 'torch=={pinned_versions()['torch']}'" in found["torch"].advice
    assert found["wandb"].state == "warn"
    assert "packages" not in found


def test_what_is_installed_here_is_tested() -> None:
    assert [check.state for check in check_packages()] == ["ok"]


def test_disks_that_cannot_be_written_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAMPO_CACHE", str(tmp_path / "file" / "below"))
    assert {check.name: check.state for check in check_disks()}["sampo cache"] == "fail"
    monkeypatch.setenv("SAMPO_CACHE", str(tmp_path / "to" / "come"))
    assert {check.name: check.state for check in check_disks()}["sampo cache"] in ("ok", "warn")


# The Hub --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The check against a Hub at an address, with a token or without."""
    from huggingface_hub import constants

    def run(endpoint: str, token: str = "", offline: bool = False) -> Check:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setenv("HF_TOKEN", token)
        (check,) = check_hub(offline)
        return check

    return run


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def test_the_hub_with_a_login_without_and_with_a_wrong_one(ask: Any, hub: HubServer) -> None:
    logged_in = ask(hub.endpoint, hub.token)
    assert (logged_in.state, logged_in.found) == ("ok", "reachable, logged in as tester")
    assert hub.token not in str(logged_in)
    nobody = ask(hub.endpoint)
    assert (nobody.state, nobody.found) == ("warn", "reachable, not logged in")
    assert "hf auth login" in nobody.advice
    wrong = ask(hub.endpoint, "hf_" + "x" * 30)
    assert wrong.state == "fail"
    assert "the token is wrong (HTTP 401)" in wrong.found
    assert "hf_xxx" not in str(wrong)


def test_a_hub_that_is_silent_or_away_and_one_that_is_not_asked(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that accepts and says nothing: the check is over after three seconds."""
    from sampo_cli import doctor_hub

    monkeypatch.setattr(doctor_hub, "SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert ask(address).state == "fail"
    gone = ask(address)
    assert (gone.state, "--offline" in gone.advice) == ("fail", True)
    assert ask(address, offline=True).found.startswith("not asked: --offline")
