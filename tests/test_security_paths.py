"""No name and no link leads out of its folder: nothing is read, copied, published or written there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sampo_cli import hub
from sampo_cli.errors import ExitCode, ModelError, UsageError
from sampo_cli.fingerprint import weight_files
from sampo_cli.trust import check_links
from tests.hostile_files import (
    Refuses,
    adapter,
    good_adapter,
    good_run,
    model,
    refuses,
    run,
    snapshot,
    succeeds,
)
from tests.hub_server import HubServer
from tests.test_cli import train_flags

__all__ = ["adapter", "good_adapter", "good_run", "model", "refuses", "run"]  # fixtures

INDEX = "model.safetensors.index.json"
ELSEWHERE = ["../../etc/passwd", "/etc/passwd", "../secret.safetensors", "a/../../b.safetensors", "sub/m.safetensors"]


@pytest.mark.parametrize(
    "name", [*ELSEWHERE, ".m.safetensors", "-m.safetensors", "m.safetensors\n", "m.bin", 3, None, []]
)
def test_an_index_names_files_beside_it(
    name: object, model: Path, good_adapter: Path, pairs_file: Path, tmp_path: Path, refuses: Refuses
) -> None:
    (model / "model.safetensors").rename(tmp_path / "secret.safetensors")
    weights = load_file(tmp_path / "secret.safetensors")
    save_file({"model.norm.weight": weights["model.norm.weight"]}, model / "m1.safetensors")
    names = {"model.norm.weight": "m1.safetensors", "lm_head.weight": name}
    (model / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError, match="is no safetensors file beside it"):
        weight_files(model)
    before = snapshot(tmp_path)
    for command in (
        train_flags(model, pairs_file, tmp_path / "run"),
        ["merge", good_adapter, "--base", model, "--output", tmp_path / "merged"],
        ["push-to-hub", model, "--repo", "tester/tiny"],
    ):
        assert "is no safetensors file beside it" in refuses(ExitCode.MODEL, *command)
    assert snapshot(tmp_path) == before


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the user's that no link may lead to."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "id_rsa").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk\n")
    (tmp_path / "home" / "a.jinja").write_text("mine")
    return tmp_path / "home" / "id_rsa"


LINKS = ["LICENSE", "chat_template.jinja", "tokenizer_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("name", LINKS)
def test_a_link_out_of_the_folder_is_not_published(name: str, adapter: Path, secret: Path, good_adapter: Path) -> None:
    source = secret
    if name.endswith((".json", ".safetensors")):  # something that would be read without a complaint
        source = secret.with_name(name)
        source.write_bytes((good_adapter / name).read_bytes() if (good_adapter / name).is_file() else b"{}")
    (adapter / name).unlink(missing_ok=True)
    (adapter / name).symlink_to(source)
    with pytest.raises(UsageError, match=f"{name} is a link that leads out of"):
        hub.plan(adapter, repo="tester/tiny")
    (adapter / name).unlink()
    (adapter / name).symlink_to(os.path.relpath(source, adapter))
    with pytest.raises(UsageError, match=f"{name} is a link that leads out of"):
        hub.plan(adapter, repo="tester/tiny")


def test_a_folder_behind_a_link_is_not_published(run: Path, adapter: Path, secret: Path) -> None:
    (adapter / "additional_chat_templates").symlink_to(secret.parent)
    with pytest.raises(UsageError, match=r"a\.jinja is a link that leads out of"):
        hub.plan(adapter, repo="tester/tiny")
    (run / "adapter").rename(secret.parent / "adapter")
    (run / "adapter").symlink_to(secret.parent / "adapter")
    with pytest.raises(UsageError, match="adapter is a link that leads out of"):
        hub.plan(run, repo="tester/tiny")


def test_links_inside_a_folder_and_to_the_hubs_own_blobs_are_followed(adapter: Path, tmp_path: Path) -> None:
    (adapter / "terms").write_text("as you like")
    (adapter / "LICENSE").symlink_to("terms")
    assert "LICENSE" in [file.path for file in hub.plan(adapter, repo="tester/tiny").files]
    repo = tmp_path / "hub" / "models--acme--x"
    (repo / "blobs").mkdir(parents=True)
    snapshot_folder = repo / "snapshots" / "0123"
    snapshot_folder.mkdir(parents=True)
    for path in adapter.iterdir():
        (repo / "blobs" / path.name).write_bytes(path.read_bytes())
        (snapshot_folder / path.name).symlink_to(f"../../blobs/{path.name}")
    assert len(hub.plan(snapshot_folder, repo="tester/tiny").files) >= 3


@pytest.mark.parametrize(
    ("place", "name"), [("base", "LICENSE"), ("base", "evil.py"), ("adapter", "chat_template.jinja")]
)
def test_a_link_out_of_base_or_adapter_is_not_copied_into_a_merged_model(
    place: str, name: str, model: Path, adapter: Path, secret: Path, tmp_path: Path, refuses: Refuses
) -> None:
    folder = model if place == "base" else adapter
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    output = tmp_path / "merged"
    assert "is a link that leads out of" in refuses(
        ExitCode.USAGE, "merge", adapter, "--base", model, "--output", output
    )
    assert not output.exists()
    (folder / name).unlink()
    (model / "LICENSES").mkdir()  # a folder of a name that files have: nothing of it is copied
    (model / "LICENSES" / "x").symlink_to(secret)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "x.txt").symlink_to(secret)
    succeeds("merge", adapter, "--base", model, "--output", output, "--quiet")
    assert not [path for path in output.rglob("*") if path.is_symlink() or b"PRIVATE" in path.read_bytes()[:100]]


@pytest.mark.parametrize(
    "name", ["run.log", "metrics.jsonl", "summary.json", "summary.json.tmp", "README.md", "checkpoints/x"]
)
def test_a_run_with_a_link_out_of_it_is_not_resumed(name: str, run: Path, secret: Path, refuses: Refuses) -> None:
    """It would be written through: a run from somebody else must not reach the user's own files."""
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(secret)
    before = secret.read_bytes()
    text = refuses(ExitCode.USAGE, "train", "--resume", run, "--max-steps", 3)
    assert f"{Path(name).name} is a link that leads out of" in text
    assert secret.read_bytes() == before
    (run / name).unlink()
    (run / name).symlink_to(secret.with_name("not_there_yet"))
    refuses(ExitCode.USAGE, "train", "--resume", run, "--max-steps", 3)
    assert not secret.with_name("not_there_yet").exists()


def test_links_that_stay_inside_do_not_stop_a_run(run: Path) -> None:
    (run / "latest").symlink_to("checkpoints/step-000002")
    check_links(run)


def test_a_file_of_the_hub_outside_of_its_repository_is_not_written(tmp_path: Path) -> None:
    """A Hub that lists `../../x.json` among a model's files."""
    with HubServer() as server:
        files = {"config.json": b"{}", "../../../../pwned.json": b"{}", "tokenizer.json": b"{}"}
        server.add_repo("acme/evil", "model", files)
        program = (
            "from sampo_cli.remote import fetch_model\nfrom sampo_cli.errors import SampoError\n"
            "try: print(fetch_model('acme/evil', weights=False))\n"
            "except SampoError as error: print(type(error).__name__, error.message, error.hint)"
        )
        home = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | home, capture_output=True, text=True, timeout=60
        )
    assert done.stdout.startswith("HubError model 'acme/evil': "), done.stderr
    assert "a file of a name that leads out of it" in done.stdout
    assert not list(tmp_path.rglob("pwned*"))


REPOS = [
    "../x",
    "tester/../x",
    "tester/x\n",
    "tester/x y",
    "-rf/x",
    "tester/<b>",
    "tester/x:y",
    "/tester/x",
    "tester/é",
    "a" * 300,
]


@pytest.mark.parametrize("repo", REPOS)
def test_a_repositorys_name_is_one(repo: str, adapter: Path) -> None:
    with pytest.raises(UsageError, match="not a name on the Hub"):
        hub.plan(adapter, repo=repo)
