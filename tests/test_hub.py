"""Pushing with the real client against a stand-in Hub: what is sent, who may see it, what is said when it fails.

huggingface_hub reads HF_ENDPOINT when it is imported, so the client runs in a process of its own; one is kept for the
whole file. There hf_xet is installed and the stand-in does not speak it: each push also goes over to plain HTTP.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sampo_cli import hub, upload
from sampo_cli.errors import ExitCode, HubError, ModelError, SampoError, UsageError
from sampo_cli.hub import PushFile, PushPlan
from sampo_cli.upload import PushResult
from tests.hub_server import HubServer

ROOT = Path(__file__).resolve().parents[1]
REPO = "tester/tiny"


def safetensors(floats: int, name: str = "w") -> bytes:
    """A whole safetensors file with one float32 tensor of random bytes."""
    header = json.dumps({name: {"dtype": "F32", "shape": [floats], "data_offsets": [0, 4 * floats]}}).encode()
    return struct.pack("<Q", len(header)) + header + os.urandom(4 * floats)


ADAPTER = {
    "adapter_model.safetensors": safetensors(700_000),
    "adapter_config.json": b'{"base_model_name_or_path": "acme/base-1B", "peft_type": "LORA", "r": 8}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"eos_token": "</s>", "name_or_path": "acme/base-1B"}',
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "sampo.json": b'{"format": 1, "base_model": "acme/base-1B", "method": "sampo"}',
    "LICENSE": b"do as you like",
}
NOT_FOR_PUBLICATION = {
    "metrics.jsonl": b"{}",
    "run.log": b"/home/ann",
    "checkpoints/step-000010/optimizer.pt": b"x",
    "adapter/optimizer.pt": b"x",
    "adapter/.env": b"HF_TOKEN=hf_secret",
    "adapter/.git/config": b"x",
    "adapter/notes.txt": b"x",
    "adapter/README.md": b"not this one",
    "adapter/adapter_model.bin": b"pickle",
    "adapter/train.py": b"print()",
}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def make_run(folder: Path, base: str = "acme/base-1B", **changes: Any) -> Path:
    """A finished run whose adapter folder also holds things that nobody should see."""
    summary = {"format": 1, "state": "finished", "model": {"name": base, "commit": None}, "method": {"name": "sampo"}}
    write(folder / "adapter", ADAPTER)
    write(folder, NOT_FOR_PUBLICATION | {"summary.json": json.dumps(summary | changes).encode()})
    write(folder, {"recipe.yaml": b"data: {sources: [acme/pairs]}"})
    return folder


def a_plan(repo: str = REPO, private: bool = True, content: bytes = b"# hello\n", weights: bytes = b"") -> PushPlan:
    """A small plan, with one large file if `weights` are given."""
    card = b"---\ntags: [sampo]\n---\n" + content
    files = [PushFile("README.md", len(card), card)]
    files += [PushFile("adapter_model.safetensors", len(weights), weights)] if weights else []
    return PushPlan(repo, private, tuple(files), card.decode())


def contents(plan: PushPlan) -> dict[str, bytes]:
    """What the plan's files hold."""
    read = {file.path: file.source for file in plan.files}
    return {path: source if isinstance(source, bytes) else source.read_bytes() for path, source in read.items()}


# The process with the client.


def enter_environment(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def push_there(plan: PushPlan, token: str | None, waits: tuple[float, ...]) -> PushResult:
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    upload.RETRY_WAITS = waits
    return upload.push(plan)


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    home = str(tmp_path_factory.mktemp("hf-home"))
    environment = {"HF_ENDPOINT": server.endpoint, "HF_HOME": home, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, enter_environment, (environment,)) as pool:
        yield pool


Push = Callable[..., PushResult]


@pytest.fixture
def push(server: HubServer, client: ProcessPoolExecutor) -> Push:
    """`upload.push` in the client's process, with waits of 10 ms between its tries; the server is emptied before."""
    for store in (server.repos, server.objects, server.requests, server.faults):
        store.clear()
    server.part_size = None

    def run(plan: PushPlan, token: str | None = server.token, waits: tuple[float, ...] = (0.01,) * 3) -> PushResult:
        return client.submit(push_there, plan, token, waits).result(timeout=60)

    return run


def refused(push: Push, plan: PushPlan, **options: Any) -> SampoError:
    """The error that a push ends with: one line, with a hint, and no token in it."""
    with pytest.raises(SampoError) as caught:
        push(plan, **options)
    error = caught.value
    assert "\n" not in error.message
    assert error.hint
    assert not re.search(r"hf_\w", f"{error.message} {error.hint}")
    return error


# The plan.


def test_plan_of_a_run_is_an_explicit_list(tmp_path: Path) -> None:
    plan = hub.plan(make_run(tmp_path / "run"), repo=REPO)
    assert [file.path for file in plan.files] == sorted([*ADAPTER, "README.md"])
    assert plan.private
    assert plan.notes == ()
    assert contents(plan) == ADAPTER | {"README.md": plan.card.encode()}
    assert [file.size for file in plan.files] == [len(contents(plan)[file.path]) for file in plan.files]
    assert "base_model: acme/base-1B" in plan.card
    assert not hub.plan(tmp_path / "run", repo=REPO, public=True).private
    listed = plan.to_dict()
    assert (listed["repo"], listed["private"], listed["card"], listed["notes"]) == (REPO, True, plan.card, [])
    assert listed["files"][0] == {"path": "LICENSE", "size": len(b"do as you like")}


def test_plan_of_the_merged_model(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(ModelError, match="no merged model") as caught:
        hub.plan(run, repo=REPO, merged=True)
    assert caught.value.hint == f"make one: sampo merge {run}"
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    model = {shard: safetensors(10) for shard in shards} | {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "config.json": b'{"model_type": "llama"}',
        "generation_config.json": b"{}",
        "tokenizer.json": b"{}",
        "modeling_acme.py": b"class Acme: ...",
    }
    write(run / "merged", model | {"consolidated.safetensors": b"x", "optimizer.pt": b"x", "train.py": b"x"})
    plan = hub.plan(run, repo=REPO, merged=True)
    assert contents(plan) == model | {"README.md": plan.card.encode()}
    assert "library_name: transformers" in plan.card
    assert hub.plan(run / "merged", repo=REPO) == plan


def test_weights_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        hub.plan(run, repo=REPO)
    weights.unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        hub.plan(run, repo=REPO)


def test_a_local_base_is_not_published(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", base="/home/ann/llama")
    config = run / "adapter" / "adapter_config.json"
    config.write_text('{"base_model_name_or_path": "/home/ann/llama", "r": 8}')
    record = {"base_model": "/home/ann/llama", "method": "sampo", "parent": {"adapter": "../sft"}, "run": "x"}
    (run / "adapter" / "sampo.json").write_text(json.dumps(record))
    (run / "adapter" / "tokenizer_config.json").write_text('{"name_or_path": "/home/ann/llama", "eos_token": "/s"}')
    plan = hub.plan(run, repo=REPO)
    sent = {name: json.loads(content) for name, content in contents(plan).items() if name.endswith("g.json")}
    assert sent == {
        "adapter_config.json": {"base_model_name_or_path": None, "r": 8},
        "tokenizer_config.json": {"name_or_path": "", "eos_token": "/s"},
    }
    cleaned = {"base_model": None, "method": "sampo", "parent": {"adapter": None}, "run": "x"}
    assert json.loads(contents(plan)["sampo.json"]) == cleaned
    assert plan.notes == ("the base model has no name on the Hub: adapter_config.json is published without one",)
    assert b"/home/ann" not in b"".join(contents(plan).values())
    assert "/home/ann/llama" in config.read_text()


def test_a_cached_base_is_published_by_its_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", model={"name": "acme/base-1B", "commit": "0" * 40})
    config = run / "adapter" / "adapter_config.json"
    config.write_text('{"base_model_name_or_path": "/root/.cache/huggingface/hub/models--acme--base-1B/snapshots/0"}')
    assert json.loads(contents(hub.plan(run, repo=REPO))[config.name]) == {"base_model_name_or_path": "acme/base-1B"}


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "tester/", "tester/ti ny", "tester/-x", "tester/x--y", "", "./x"])
def test_names_that_the_hub_would_not_take(tmp_path: Path, repo: str) -> None:
    with pytest.raises(UsageError, match="not a name on the Hub"):
        hub.plan(tmp_path, repo=repo)


def test_what_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no such folder"):
        hub.plan(tmp_path / "nowhere", repo=REPO)
    with pytest.raises(ModelError, match="neither a run nor an adapter nor a model"):
        hub.plan(tmp_path, repo=REPO)
    (tmp_path / "summary.json").write_text('{"state": "running"}')
    with pytest.raises(ModelError, match="the run has no adapter yet"):
        hub.plan(tmp_path, repo=REPO)


def test_a_run_that_was_interrupted_is_named_so(tmp_path: Path) -> None:
    plan = hub.plan(make_run(tmp_path / "run", state="interrupted"), repo=REPO)
    assert plan.notes == ("the run is not complete: its state is 'interrupted'",)


# The push.


def test_what_arrives_is_what_was_planned(tmp_path: Path, server: HubServer, push: Push) -> None:
    plan = hub.plan(make_run(tmp_path / "run"), repo=REPO)
    assert server.requests == []  # planning (and so --dry-run) sends nothing
    result = push(plan)
    repo = server.repos["model", REPO]
    assert repo.files == contents(plan) | {".gitattributes": b""}
    assert repo.private
    assert result == PushResult(f"{server.endpoint}/{REPO}", repo.sha, tuple(f.path for f in plan.files), True)
    assert len(server.seen("PUT /lfs/")) == 1
    # Again: nothing has changed, so there is no new commit, and the weights are not sent.
    assert push(plan).commit == repo.sha
    # A change of one file is a commit of that file.
    kept = tuple(file for file in plan.files if file.path != "README.md")
    again = push(dataclasses.replace(plan, files=(*kept, PushFile("README.md", 9, b"# changed"))))
    assert again.commit == repo.sha != result.commit
    assert repo.files["README.md"] == b"# changed"
    assert repo.files["tokenizer.json"] == ADAPTER["tokenizer.json"]
    assert len(server.seen("PUT /lfs/")) == 1


def test_a_large_file_in_parts(server: HubServer, push: Push) -> None:
    server.part_size = 1_000_000
    weights = safetensors(700_000)  # 2.8 MB: three parts
    server.fail(r"PUT /lfs/\w+/2", reset_after=1000)
    push(a_plan(weights=weights))
    assert server.repos["model", REPO].files["adapter_model.safetensors"] == weights
    assert [request.path[-2:] for request in server.seen("PUT /lfs/")] == ["/1", "/2", "/2", "/3"]


def test_a_public_repository_is_not_filled_by_a_private_push(server: HubServer, push: Push) -> None:
    server.add_repo(REPO, files={"README.md": b"old"})
    error = refused(push, a_plan(weights=safetensors(10)))
    assert isinstance(error, UsageError)
    assert error.message == f"'{REPO}' is there and public: a private push would publish these files"
    assert error.hint == "--public to publish them, or another --repo"
    assert server.seen("POST|PUT") == []
    push(a_plan(private=False))
    assert server.repos["model", REPO].files["README.md"].endswith(b"# hello\n")


def test_public_makes_a_public_repository_and_opens_none(server: HubServer, push: Push) -> None:
    assert not push(a_plan("tester/open", private=False)).private
    assert not server.repos["model", "tester/open"].private
    server.add_repo(REPO, private=True)
    error = refused(push, a_plan(private=False))
    assert isinstance(error, UsageError)
    assert "there and private" in error.message
    assert server.repos["model", REPO].private
    assert server.repos["model", REPO].files == {}


def test_weights_of_another_shape_are_not_mixed_with_these(server: HubServer, push: Push) -> None:
    server.add_repo(REPO, files={"model-00001-of-00002.safetensors": b"", "config.json": b""}, private=True)
    error = refused(push, a_plan(weights=safetensors(10)))
    assert isinstance(error, UsageError)
    assert "holds other weights (model-00001-of-00002.safetensors)" in error.message
    assert server.seen("POST|PUT") == []


# What breaks and passes.


def test_a_broken_upload_is_repeated_and_arrives_whole(server: HubServer, push: Push) -> None:
    weights = safetensors(700_000)
    server.fail("PUT /lfs/", reset_after=500_000)
    push(a_plan(weights=weights))
    assert server.repos["model", REPO].files["adapter_model.safetensors"] == weights
    assert [request.status for request in server.seen("PUT /lfs/")] == [0, 200]


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("POST /api/models/.*/commit/", {"status": 503}),
        ("POST /api/models/.*/commit/", {"reset_after": 0}),
        ("POST /api/validate-yaml", {"status": 502, "headers": {"Content-Type": "text/html"}}),
        ("POST /api/repos/create", {"status": 500, "times": 2}),
        (f"GET /api/models/{REPO}$", {"status": 504, "times": 3}),
    ],
)
def test_what_the_client_asks_once_is_repeated(
    server: HubServer, push: Push, pattern: str, fault: dict[str, Any]
) -> None:
    server.fail(pattern, **fault)
    result = push(a_plan())
    assert server.repos["model", REPO].sha == result.commit
    assert server.repos["model", REPO].files["README.md"].endswith(b"# hello\n")


def test_the_hub_is_given_the_time_that_it_asks_for(server: HubServer, push: Push) -> None:
    server.fail("/commit/", status=429, headers={"Retry-After": "1"})
    start = time.monotonic()
    push(a_plan())
    assert 1.0 <= time.monotonic() - start < 5.0
    server.fail("/commit/", status=429, headers={"Retry-After": "3600"}, times=9)
    error = refused(push, a_plan(content=b"# more\n"))  # longer than anybody waits
    assert "too many requests (HTTP 429)" in error.message


def test_the_tries_are_bounded(server: HubServer, push: Push) -> None:
    server.fail("/commit/", status=503, times=99)
    error = refused(push, a_plan())
    assert "the Hub failed (HTTP 503)" in error.message
    assert len(server.seen("/commit/")) == 4


# What breaks and stays broken. Each is one line that says what to do.


@pytest.mark.parametrize(
    ("pattern", "fault", "said", "hint"),
    [
        ("/commit/", {"status": 403}, "access is denied (HTTP 403)", "token needs the right scope"),
        ("/commit/", {"status": 409}, "conflicts with what is there (HTTP 409)", "look at the repository"),
        ("/commit/", {"status": 404}, "does not exist, or is private (HTTP 404)", "check the name"),
        ("/commit/", {"status": 413}, "the Hub refused (HTTP 413): ordered by the test", "correct that"),
        ("/preupload/", {"status": 403}, "access is denied (HTTP 403): ordered by the test", "scope"),
        ("PUT /lfs/", {"status": 403}, "access is denied (HTTP 403)", "scope"),
        ("/validate-yaml", {"status": 400}, "Invalid metadata in README.md", "unexpected"),
        ("/repos/create", {"status": 402}, "the Hub refused (HTTP 402)", "correct that"),
        ("/commit/", {"status": 400, "message": "bad hf_stand_in_token_of_tester"}, "bad hf_…", "correct that"),
    ],
)
def test_refusals(server: HubServer, push: Push, pattern: str, fault: dict[str, Any], said: str, hint: str) -> None:
    server.fail(pattern, **fault)
    error = refused(push, a_plan(weights=safetensors(10)))
    assert error.exit_code == ExitCode.HUB
    assert error.message.startswith(f"push to '{REPO}': ")
    assert said in error.message
    assert hint in str(error.hint)


def test_no_token_and_a_wrong_one(server: HubServer, push: Push) -> None:
    error = refused(push, a_plan(), token=None)
    assert isinstance(error, HubError)
    assert (error.message, error.hint) == (
        f"push to '{REPO}': there is no Hugging Face token",
        "`hf auth login`, or set HF_TOKEN",
    )
    assert server.requests == []
    error = refused(push, a_plan(), token="hf_wrong")
    assert "you are not logged in, or the token is wrong (HTTP 401)" in error.message
    assert "hf auth login" in str(error.hint)


def test_a_foreign_name(server: HubServer, push: Push) -> None:
    error = refused(push, a_plan("somebody/model"))
    assert error.exit_code == ExitCode.HUB
    assert "access is denied (HTTP 403): You don't have the rights to create a model" in error.message
    server.add_repo("somebody/open", private=False)
    assert "HTTP 403" in refused(push, a_plan("somebody/open", private=False)).message


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process; a SampoError ends it as the command line does."""
    program = textwrap.dedent(code)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=kept | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


PUSH = """
from sampo_cli.hub import PushFile, PushPlan
from sampo_cli.upload import push
from sampo_cli.errors import SampoError
try:
    push(PushPlan("tester/tiny", True, (PushFile("README.md", 1, b"x"),), "x"))
except SampoError as error:
    print(error.message, "|", error.hint)
    raise SystemExit(int(error.exit_code))
"""


def test_offline_and_out_of_reach(tmp_path: Path) -> None:
    common = {"HF_TOKEN": "hf_secret_of_ann", "HF_HOME": str(tmp_path)}
    offline = python(PUSH, HF_HUB_OFFLINE="1", **common)
    with HubServer() as gone:
        closed = gone.endpoint
    start = time.monotonic()
    unreachable = python(PUSH, HF_ENDPOINT=closed, **common)
    assert (offline.returncode, unreachable.returncode) == (7, 7)
    assert offline.stdout == "push to 'tester/tiny': the network is switched off | unset HF_HUB_OFFLINE and try again\n"
    assert re.fullmatch(r"push to 'tester/tiny': .*refused.* \| check the connection .*\n", unreachable.stdout)
    assert time.monotonic() - start < 20
    assert "hf_secret" not in offline.stdout + offline.stderr + unreachable.stdout + unreachable.stderr


# Downloads: the stand-in as the other commands use it.


def fetch(*wanted: tuple[str, str], **environment: str) -> list[Any]:
    """Fetch repositories in a fresh process: for each {path: sha256}, or the error's text."""
    done = python(
        f"""
        import hashlib, json
        from sampo_cli.errors import SampoError
        from sampo_cli.remote import DATA_FILES, fetch, fetch_model
        found = []
        for name, kind in {list(wanted)!r}:
            try:
                folder = fetch_model(name) if kind == "model" else fetch(name, kind, revision=None, patterns=DATA_FILES)
                files = {{path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}}
                found.append({{name: hashlib.sha256(content).hexdigest() for name, content in files.items()}})
            except SampoError as error:
                found.append(f"{{error.message}} | {{error.hint}}")
        print(json.dumps(found))
        """,
        **environment,
    )
    assert done.returncode == 0, done.stderr
    answers: list[Any] = json.loads(done.stdout)
    return answers


def sha256(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def test_models_and_data_are_fetched_whole_and_then_read_offline(tmp_path: Path) -> None:
    model = {"config.json": b"{}", "model.safetensors": safetensors(3_000_000), "tokenizer.json": b"{}"}
    data = {"orca_rlhf.jsonl": b'{"question": "?"}\n' * 99, "README.md": b"---\nlicense: mit\n---\n"}
    llama, orca = ("meta-llama/Meta-Llama-3-8B-Instruct", "model"), ("Intel/orca_dpo_pairs", "dataset")
    with HubServer() as server:
        server.add_repo(*llama, model | {"original/consolidated.safetensors": b"no", "model.gguf": b"no"}, gated=True)
        server.add_repo(*orca, data | {"images/plot.png": b"no"})
        server.granted.add((server.user, llama[0]))
        server.fail("GET .*/model.safetensors", reset_after=11_000_000)
        common = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": server.token, "HF_HOME": str(tmp_path)}
        assert fetch(llama, orca, **common) == [sha256(model), sha256(data)]
        # The client writes blocks of 10 MiB: it goes on from there with a Range.
        assert [request.status for request in server.seen("GET .*/model.safetensors")] == [0, 206]
        count = len(server.requests)
        assert fetch(llama, orca, HF_HUB_OFFLINE="1", **common) == [sha256(model), sha256(data)]
        assert len(server.requests) == count


def test_why_something_cannot_be_fetched(tmp_path: Path) -> None:
    with HubServer() as server:
        server.add_repo("acme/gated", "model", {"config.json": b"{}", "model.safetensors": b"x" * 99}, gated=True)
        server.add_repo("acme/secret", "dataset", {"a.jsonl": b"{}"}, private=True)
        server.add_repo("acme/down", "dataset", {"a.jsonl": b"{}"})
        server.fail("/api/datasets/acme/down", status=503, times=99)
        wanted = [("acme/gated", "model"), ("acme/secret", "dataset"), ("acme/none", "model"), ("acme/down", "dataset")]
        common = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path)}
        gated, secret, none, down = fetch(*wanted, HF_TOKEN=server.token, **common)
        (anonymous,) = fetch(("acme/gated", "model"), **common)
        (offline,) = fetch(("acme/gated", "model"), HF_HUB_OFFLINE="1", **common)
    accept = "accept the licence on the model's page, then `hf auth login` or set HF_TOKEN"
    assert gated == f"model 'acme/gated': access is gated (HTTP 403) | {accept}"
    assert anonymous == f"model 'acme/gated': access is gated (HTTP 401) | {accept}"
    assert secret.startswith("dataset 'acme/secret': it does not exist, or is private (HTTP 404) | check the name")
    assert none.startswith("model 'acme/none': it does not exist, or is private (HTTP 404) | check the name")
    assert down == "dataset 'acme/down': the Hub failed (HTTP 503): ordered by the test | try again later"
    assert offline.startswith(
        "model 'acme/gated': HF_HUB_OFFLINE is set, and it is not (or not all) in the local cache"
    )


def test_the_card_s_example_runs_on_what_was_pushed(
    tmp_path: Path, tiny_llama: Path, server: HubServer, push: Push
) -> None:
    """In a fresh process that has nothing but the Hub: PEFT finds adapter, tokenizer and base by their names."""
    from tests.merge_models import save_adapter

    server.add_repo("acme/base-1B", files={path.name: path.read_bytes() for path in tiny_llama.iterdir()})
    adapter = save_adapter(tmp_path / "adapter", tiny_llama)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter / name).write_bytes((tiny_llama / name).read_bytes())
    (adapter / "sampo.json").write_text('{"base_model": "acme/base-1B", "method": "sampo"}')
    plan = hub.plan(adapter, repo=REPO)
    push(plan)
    (example,) = re.findall(r"```python\n(.*?)```", plan.card, re.DOTALL)
    home = str(tmp_path / "home")
    done = python(example.replace("256", "4"), HF_ENDPOINT=server.endpoint, HF_TOKEN=server.token, HF_HOME=home)
    assert done.returncode == 0, done.stderr
    assert json.loads(contents(plan)["adapter_config.json"])["base_model_name_or_path"] == "acme/base-1B"
