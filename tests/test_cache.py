"""What sampo keeps: shown with what it is of, and deleted, but not under the hands of whoever writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sampo_cli.cache import UNFINISHED, clear, entries, lock
from sampo_cli.errors import UsageError
from tests.hostile_files import succeeds


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAMPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make(folder: Path, text: str = "12345") -> Path:
    folder.mkdir(parents=True)
    (folder / "a.bin").write_text(text)
    (folder / "meta.json").write_text(json.dumps({"of": "x", "sizes": {"a.bin": 5}}))
    return folder


def test_entries_say_what_they_are(cache: Path) -> None:
    make(cache / "pairs" / "aaa")
    make(cache / "reference" / "bbb", "cut")
    make(cache / "pairs" / f"{UNFINISHED}ccc")
    found = {entry.key: entry for entry in entries()}
    assert {key: (entry.kind, entry.state, entry.of) for key, entry in found.items()} == {
        "aaa": ("pairs", "whole", "x"),
        "bbb": ("reference", "broken", "x"),
        "ccc": ("pairs", "unfinished", "x"),
    }
    assert found["aaa"].bytes == sum(path.stat().st_size for path in (cache / "pairs" / "aaa").iterdir())


def test_pairs_are_kept_with_the_name_of_their_source(
    cache: Path, tiny_llama: Path, pairs_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    succeeds("data", pairs_file, "--model", tiny_llama, "--quiet")
    capfd.readouterr()
    succeeds("cache", "list", "--json")
    (entry,) = json.loads(capfd.readouterr().out)
    assert (entry["kind"], entry["state"], entry["of"]) == ("pairs", "whole", str(pairs_file))
    succeeds("cache", "clear", entry["key"][:6], "--json")
    assert json.loads(capfd.readouterr().out) == [entry]
    assert entries() == []


def test_what_a_run_is_writing_stays(cache: Path) -> None:
    whole, dead, alive = (make(cache / "reference" / name) for name in ("a1", f"{UNFINISHED}a2", f"{UNFINISHED}a3"))
    with lock("reference", "a3"):
        assert {entry.key for entry in clear(["a"])} == {"a1", "a2"}
    assert [path.exists() for path in (whole, dead, alive)] == [False, False, True]
    assert [entry.key for entry in clear()] == ["a3"]


def test_a_key_that_is_not_there(cache: Path) -> None:
    make(cache / "pairs" / "aaa")
    with pytest.raises(UsageError, match="begins with 'b'"):
        clear(["aa", "b"])
    assert len(entries()) == 1
