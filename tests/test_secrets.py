"""Tokens: found before they are published, and never shown or written by any command, whatever a server answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from sampo_cli import hub
from sampo_cli.cli import main
from sampo_cli.errors import ExitCode
from sampo_cli.remote import first_line
from sampo_cli.secrets_scan import Finding, mask, scan
from tests import tiny
from tests.hub_server import HubServer
from tests.test_hub import make_run

LETTERS = "aZ3bY4cX5dW6eV7fU8gT9hS0iR1jQ2kP3lO4mN5"
SECRETS = {
    f"hf_{LETTERS[:34]}": "a Hugging Face token",
    f"api_org_{LETTERS[:34]}": "a Hugging Face token",
    f"sk-{LETTERS}": "an API key",
    f"sk-proj-{LETTERS}": "an API key",
    f"sk-ant-api03-{LETTERS}": "an API key",
    "AKIAIOSFODNN7EXAMPLE": "an AWS access key",
    f"ghp_{LETTERS[:36]}": "a GitHub token",
    f"github_pat_{LETTERS}": "a GitHub token",
    f"glpat-{LETTERS[:20]}": "a GitLab token",
    f"xoxb-123456789012-{LETTERS[:24]}": "a Slack token",
    f"AIza{LETTERS[:35]}": "a Google API key",
    "-----BEGIN OPENSSH PRIVATE KEY-----": "a private key",
    "-----BEGIN RSA PRIVATE KEY-----": "a private key",
    "-----BEGIN PRIVATE KEY-----": "a private key",
    "https://ann:geheim@example.org/x": "a password in a URL",
    f'api_key="{LETTERS[:20]}"': "a key or token by its name",
    f'"client_secret": "{LETTERS[:20]}"': "a key or token by its name",
    f"AWS_SECRET_ACCESS_KEY={LETTERS}": "a key or token by its name",
    f"auth-token: {LETTERS[:24]}": "a key or token by its name",
    '"password": "correct-horse"': "a password by its name",
}
HARMLESS = [
    "hf_hub_download(repo_id, token=None)",
    "pip install sk-learn; sk-something-else-entirely",
    "api_key = os.environ['OPENAI_API_KEY']  # auth_token: your_token_goes_here",
    '"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]',
    '"added_tokens": [{"id": 128000, "content": "<|begin_of_text|>"}], "password": 23987, "ApiKey": 98231',
    "@inproceedings{lu2024sampo, title={Eliminating Biased Length Reliance}, year={2024}}",
    "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "https://huggingface.co/acme/base-1B/blob/main/LICENSE https://arxiv.org/abs/2406.10957",
    "-----BEGIN PUBLIC KEY-----",
    "MAKIAVELLI and AKIA, xox and oxo, ghp_",
    "{{ messages[0]['content'] }}{% if token %}secret: {{ token }}{% endif %}",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_what_looks_like_a_secret_is_found_and_never_repeated(secret: str, tmp_path: Path) -> None:
    text = f"first line\n\n  before {secret} after\nlast line {secret}"
    (tmp_path / "x").write_text(text)
    expected = [Finding("a.md", 3, SECRETS[secret]), Finding("a.md", 4, SECRETS[secret])]
    assert scan([("a.md", text.encode())]) == scan([("a.md", tmp_path / "x")]) == expected
    said = repr(expected) + expected[0].describe()
    assert expected[0].describe() == f"a.md:3 looks like {SECRETS[secret]}"
    assert LETTERS[:16] not in said
    assert secret not in said
    masked = mask(text)
    assert secret not in masked
    assert masked.startswith("first line\n\n  before ")
    assert "…" in masked


@pytest.mark.parametrize("text", HARMLESS)
def test_what_looks_like_none_is_left_alone(text: str) -> None:
    assert scan([("a.json", text.encode())]) == []
    assert mask(text) == text


def test_only_text_is_scanned() -> None:
    token = next(iter(SECRETS)).encode()
    names = [
        "a.json",
        "a.md",
        "a.yaml",
        "a.txt",
        "a.jinja",
        "a.py",
        "LICENSE",
        "x/a.JSON",
        "a.safetensors",
        "tokenizer.model",
    ]
    assert [finding.path for finding in scan((name, b"\xff\xfe\n" + token) for name in names)] == names[:8]
    assert [finding.line for finding in scan([("a.md", b"\n" * 41 + token * 2)])] == [42]


def test_tokenizers_have_no_secrets(shared: Path) -> None:
    files = [path for path in (shared / "tokenizers").rglob("*.json") if path.stat().st_size < 3_000_000]
    assert len(files) > 3
    assert scan((path.name, path) for path in files) == []


def test_values_of_the_environment_are_masked_whatever_their_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "no.known-form")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789")
    monkeypatch.setenv("SOME_PASSWORD", "short")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true-or-so")
    assert mask("no.known-form in http://x/?t=no.known-form, 0123456789") == "… in http://x/?t=…, …"
    assert mask("short true-or-so") == "short true-or-so"
    assert first_line(ValueError("bad no.known-form\x1b[31m\nsecond line")) == "bad …�[31m"


def a_run_with_secrets(folder: Path) -> Path:
    run = make_run(folder)
    secrets = list(SECRETS)
    text = json.dumps({"auth_token": secrets[0], "x": secrets[1]}, indent=1)
    (run / "adapter" / "tokenizer_config.json").write_text(text)
    (run / "adapter" / "LICENSE").write_text(f"terms\n{secrets[11]}\n")
    (run / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    return run


WARNINGS = [
    "LICENSE:2 looks like a private key: take it out before others can read it",
    "tokenizer_config.json:2 looks like a Hugging Face token: take it out before others can read it",
    "tokenizer_config.json:3 looks like a Hugging Face token: take it out before others can read it",
]


def test_a_push_warns_of_secrets_before_anything_is_sent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = a_run_with_secrets(tmp_path / "run")
    assert list(hub.plan(run, repo="tester/tiny").warnings) == WARNINGS
    for flags in ([], ["--quiet"], ["--json"]):
        with pytest.raises(SystemExit) as end:
            main(["push-to-hub", str(run), "--repo", "tester/tiny", "--dry-run", *flags])
        assert end.value.code == ExitCode.OK
        shown = capfd.readouterr()
        assert shown.err.splitlines() == [f"warning: {warning}" for warning in WARNINGS]
        assert LETTERS[:16] not in shown.out + shown.err
        assert "PRIVATE KEY" not in shown.out + shown.err
        if flags == ["--json"]:
            assert json.loads(shown.out)["warnings"] == WARNINGS


def test_what_is_published_is_a_list(tmp_path: Path) -> None:
    """Whatever lies in the folder: what is not on the list is not sent."""
    run = make_run(tmp_path / "run")
    before = [file.path for file in hub.plan(run, repo="tester/tiny").files]
    never = (
        "state.pt optimizer.bin scheduler.pt checkpoint.json trainer_state.json rng_state.pth training_args.bin run.log"
    )
    never += " .env .netrc .git/config .ssh/id_rsa .lock .LICENSE additional_chat_templates/.x.jinja LICENSE\x1b[31m"
    never += (
        " adapter_model.bin checkpoints/step-1/state.pt best/x.json wandb/x.json metrics.jsonl events.out.tfevents.1"
    )
    never += " recipe.yaml summary.json config.yaml additional_chat_templates/x.txt train.py notes.txt README.md.bak"
    for name in never.split(" "):
        (run / "adapter" / name).parent.mkdir(parents=True, exist_ok=True)
        (run / "adapter" / name).write_text("{}")
    assert [file.path for file in hub.plan(run, repo="tester/tiny").files] == before


# A marked token, and everything that the commands leave ---------------------------------------------------------------

TOKEN = "Marked-Token.of.this-test-0123456789"
"""Of no known form, so that only its value gives it away."""

PROGRAM = """
import json, os, subprocess, sys
words = open("children.txt", "a")
def hook(event, arguments):
    if event in ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.system", "os.spawn"):
        words.write(repr((event, arguments[:2])) + "\\n")
        words.flush()
sys.addaudithook(hook)
subprocess.run([sys.executable, "-c", "'that the hook sees it'"])
from sampo_cli import upload
from sampo_cli.cli import main
upload.RETRY_WAITS = (0.01, 0.01, 0.01)
for line in sys.stdin:
    arguments = json.loads(line)
    try:
        main(arguments)
    except SystemExit as end:
        print("EXIT", end.code, *arguments[:2], file=sys.stderr, flush=True)
"""

MODEL, DATA = "acme/base-1B", "acme/pairs"


@dataclass(frozen=True)
class Told:
    """A folder in which commands ran, and all that they said."""

    folder: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Told:
    """A train, a merge, three pushes and many failures, with TOKEN in HF_TOKEN and sent back by the server."""
    folder = tmp_path_factory.mktemp("marked")
    a_run_with_secrets(folder / "leaky")
    rows = "".join(json.dumps(row) + "\n" for row in tiny.make_rows(12))
    with HubServer() as server:
        server.accounts = {TOKEN: "tester"}
        server.add_repo(
            MODEL, "model", {path.name: path.read_bytes() for path in tiny_llama.iterdir() if path.is_file()}
        )
        server.add_repo(DATA, "dataset", {"train.jsonl": rows.encode()})
        for status in (401, 403, 500):
            for name in (f"m{status}", f"d{status}"):
                kind = "models" if name[0] == "m" else "datasets"
                server.fail(f"/api/{kind}/acme/{name}", status=status, times=99, message=f"no, {TOKEN}: Bearer {TOKEN}")
            server.fail(f"/api/models/tester/p{status}/commit/", status=status, times=9, message=f"bad token={TOKEN}")
        moved = {"Location": f"/nowhere?token={TOKEN}"}
        server.fail("/api/models/acme/moved", status=307, times=99, headers=moved)
        train = ["train", "--model", MODEL, "--data", DATA, "--output", "run", "--max-steps", "2", "--batch-pairs", "4"]
        commands = [
            [*train, "--eval-fraction", "0.2", "--report-to", "tensorboard", "--debug"],
            ["merge", "run", "--debug"],
            ["push-to-hub", "run", "--repo", "tester/tiny", "--json"],
            ["push-to-hub", "run", "--repo", "tester/merged", "--merged", "--debug"],
            ["push-to-hub", "leaky", "--repo", "tester/leaky", "--json", "--quiet"],
        ]
        for status in (401, 403, 500):
            commands += [["push-to-hub", "run", "--repo", f"tester/p{status}", *flags] for flags in ([], ["--debug"])]
            commands += [["data", DATA, "--model", f"acme/m{status}", *flags] for flags in ([], ["--debug"])]
            commands += [["data", f"acme/d{status}", "--model", MODEL, "--debug"]]
        commands += [["data", DATA, "--model", "acme/moved", "--debug"]]
        commands += [["train", "--model", MODEL, "--data", DATA, "--set", f"model.token={TOKEN}", "--debug"]]
        environment = {
            **{"HF_ENDPOINT": server.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "home")},
            **{"SAMPO_CACHE": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": os.getcwd()},
        }
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            input="".join(json.dumps(command) + "\n" for command in commands),
            **{"cwd": folder, "env": os.environ | environment, "capture_output": True, "text": True, "timeout": 300},
        )
        sent = [request.token for request in server.requests]
    codes = re.findall(r"^EXIT (\d+)", done.stderr, re.MULTILINE)
    assert codes == ["0"] * 5 + ["7"] * 16 + ["2"], done.stderr.replace(TOKEN, "<TOKEN>")[-3000:]
    assert TOKEN in sent  # it was used
    return Told(folder, done.stdout, done.stderr)


def test_the_token_is_not_in_what_is_said(told: Told) -> None:
    assert told.stderr.count("Traceback") >= 10
    assert "Bearer …" in told.stderr
    assert "token=…" in told.stderr
    lines = [line for line in (told.stdout + told.stderr).splitlines() if TOKEN in line]
    assert [line.replace(TOKEN, "<TOKEN>") for line in lines] == []


def test_the_token_is_in_no_file(told: Told) -> None:
    files = [path for path in told.folder.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"recipe.yaml", "metrics.jsonl", "summary.json", "run.log", "README.md", "adapter_config.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert any("merged" in path.parts for path in files)
    assert [str(path) for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_the_token_is_no_argument_of_a_child(told: Told) -> None:
    children = (told.folder / "children.txt").read_text()
    assert "that the hook sees it" in children
    assert TOKEN not in children


def test_a_push_says_what_looked_like_a_secret(told: Told) -> None:
    """Before it is sent on stderr, which --quiet does not silence, and in the result."""
    decoder, at = json.JSONDecoder(), [match.start() for match in re.finditer(r"^\{", told.stdout, re.MULTILINE)]
    clean, leaky = (decoder.raw_decode(told.stdout, start)[0] for start in at)
    assert clean["warnings"] == []
    assert leaky["warnings"] == WARNINGS
    assert [line for line in told.stderr.splitlines() if line.startswith("warning: ")] == [
        f"warning: {w}" for w in WARNINGS
    ]
    assert LETTERS[:16] not in told.stdout + told.stderr
