"""Files that are cut short, mixed up, unreadable or gone, and a process that is killed while it reads one.

Each file goes through the command line: file, line and reason are in the message, and the exit code is the one for
data. Broken rows within a good file are in test_sources.py, hostile ones in test_hostile_rows.py.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from sampo_cli.config import DataConfig
from sampo_cli.datafile import digest
from sampo_cli.dataset import PairDataset, prepare
from sampo_cli.errors import DataError, ExitCode
from sampo_cli.readers import read_rows
from sampo_cli.sources import find
from tests import tiny
from tests.reliability import record
from tests.test_cli import check_failure, refuses, sampo

__all__ = ["refuses"]  # a fixture

ROWS = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(400)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = b"prompt,chosen,rejected\n" + b"".join(f"question {i},yes {i},no {i}\n".encode() for i in range(3))
TWO = LINES.splitlines(keepends=True)[:2]


def parquet(columns: dict[str, Any] | None = None) -> bytes:
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_pylist(ROWS) if columns is None else pyarrow.table(columns)
    pyarrow.parquet.write_table(table, sink, write_page_checksum=True)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def two_columns_of_one_name() -> bytes:
    sink = pyarrow.BufferOutputStream()
    columns = [pyarrow.array([text]) for text in ("p", "a", "b", "c")]
    table = pyarrow.Table.from_arrays(columns, names=["prompt", "chosen", "chosen", "rejected"])
    pyarrow.parquet.write_table(table, sink)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


NOT_SPLIT = b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}\n'
BROKEN: dict[str, tuple[str, bytes, str]] = {
    "half-a-line": ("a.jsonl", TWO[0] + TWO[1][:40], r"a\.jsonl:2:\d+: not JSON: Unterminated string"),
    "half-a-file": ("a.jsonl", LINES[: len(LINES) // 2], r"a\.jsonl:\d+:\d+: not JSON"),
    "latin-1": ("a.jsonl", TWO[0] + NOT_SPLIT, r"a\.jsonl:2:16: not UTF-8: invalid continuation byte"),
    "utf-16": ("a.jsonl", LINES.decode().encode("utf-16"), r"a\.jsonl:1:1: not UTF-8: it begins like UTF-16"),
    "utf-16-without-mark": ("a.jsonl", LINES.decode().encode("utf-16-le"), r"a\.jsonl:1:2: not JSON"),
    "array-of-one-line": ("a.jsonl", json.dumps(ROWS).encode(), r"a\.jsonl:1: a JSON array(.|\n)*name it \.json"),
    "array-of-lines": ("a.jsonl", json.dumps(ROWS, indent=1).encode(), r"a\.jsonl:1: a JSON array"),
    "two-values-of-a-key": (
        "a.jsonl",
        TWO[0] + b'{"prompt": "p", "chosen": "a", "chosen": "b", "rejected": "c"}\n',
        r'a\.jsonl:2: the key "chosen" is there twice',
    ),
    "zeros": ("a.jsonl", TWO[0] + b"\0" * 4096, r"a\.jsonl:2:1: not JSON"),
    "empty": ("a.jsonl", b"", r"a\.jsonl': it is empty"),
    "white-space": ("a.jsonl", b"\n \r\n\t\n", r"a\.jsonl': it is empty"),
    "mark-alone": ("a.jsonl", b"\xef\xbb\xbf", r"a\.jsonl': it is empty"),
    "cut-gzip": ("a.jsonl.gz", gzip.compress(LINES)[:-200], r"a\.jsonl\.gz after line \d+: broken gzip: Compressed f"),
    "flipped-gzip": ("a.jsonl.gz", flipped(gzip.compress(LINES), -6), r"a\.jsonl\.gz after line 400: broken gzip: CRC"),
    "gzip-and-rubbish": ("a.jsonl.gz", gzip.compress(LINES) + b"rubbish", r"a\.jsonl\.gz after line 400: broken gzip"),
    "gzip-of-nothing": ("a.jsonl.gz", gzip.compress(b""), r"a\.jsonl\.gz': it is empty"),
    "zero-byte-gzip": ("a.jsonl.gz", b"", r"a\.jsonl\.gz': it is empty"),
    "not-gzip": ("a.jsonl.gz", LINES, r"a\.jsonl\.gz after line 0: broken gzip: Not a gzipped file"),
    "cut-gzip-array": ("a.json.gz", gzip.compress(json.dumps(ROWS).encode())[:-200], r"a\.json\.gz.*: broken gzip"),
    "cut-array": ("a.json", json.dumps(ROWS, indent=1).encode()[:-20], r"a\.json:\d{4}: row 400: not JSON: Untermin"),
    "open-array": ("a.json", b"[" + TWO[0], r"a\.json:2: row 2: not JSON: expected a comma or the closing bracket"),
    "bad-element": ("a.json", b"[\n" + TWO[0] + b",\n{]\n", r"a\.json:4: row 2: not JSON: Expecting property name"),
    "no-comma": ("a.json", b"[" + TWO[0] + TWO[1] + b"]", r"a\.json:2: row 2: not JSON: expected a comma"),
    "two-arrays": ("a.json", json.dumps(ROWS).encode() * 2, r"a\.json:1: row 400: not JSON: something follows"),
    "latin-1-array": ("a.json", b"[" + TWO[0] + b",\n" + NOT_SPLIT + b"]", r"a\.json:3:16: not UTF-8"),
    "object": ("a.json", json.dumps({"rows": ROWS}).encode(), r"a\.json': no known format; its columns are rows"),
    "empty-array": ("a.json", b" [ ] ", r"a\.json': it is empty"),
    "ragged": ("a.csv", CSV + b"a,b\n", r"a\.csv:5: 2 fields, but the header has 3"),
    "open-quote": ("a.csv", CSV + b'a,"b,c\n' + CSV, r"a\.csv:5: not CSV: a quote opens.*4 lines behind"),
    "stray-quote": ("a.csv", CSV + b'a,"b"c,d\n', r"a\.csv:5: not CSV: ',' expected after '\"'"),
    "latin-1-csv": ("a.csv", CSV * 1000 + b"caf\xe9,a,b\n", r"a\.csv:4001:4: not UTF-8"),
    "utf-16-csv": ("a.csv", CSV.decode().encode("utf-16"), r"a\.csv:1:1: not UTF-8: it begins like UTF-16"),
    "semicolons": ("a.csv", CSV.replace(b",", b";"), r"a\.csv': no known format; its columns are prompt;chosen"),
    "header-twice": ("a.csv", b"prompt,prompt,chosen\na,b,c\n", r"a\.csv:1: two columns have one name"),
    "header-alone": ("a.csv", CSV[:23], r"a\.csv': it is empty"),
    "empty-csv": ("a.csv", b"\n\n", r"a\.csv': it is empty"),
    "numbers": ("a.parquet", parquet({"prompt": [1], "chosen": [2.5], "rejected": [True]}), r"1 not text .*: float"),
    "nested": (
        "a.parquet",
        parquet({"prompt": ["p"], "chosen": [[["a"]]], "rejected": [{"b": {"c": 1}}]}),
        r"1 not text \(.*a\.parquet row 1: a message is list",
    ),
    "column-twice": ("a.parquet", two_columns_of_one_name(), r"a\.parquet: two columns have one name"),
    "no-rows": ("a.parquet", parquet({"prompt": pyarrow.array([], pyarrow.string())}), r"a\.parquet': it is empty"),
    "cut-parquet": ("a.parquet", parquet()[:-30], r"a\.parquet after row 0: not Parquet: Parquet magic bytes"),
    "cut-start": ("a.parquet", parquet()[100:], r"a\.parquet after row \d+: not Parquet"),
    "flipped-page": ("a.parquet", flipped(parquet(), 400), r"a\.parquet after row 0: not Parquet: .*(CRC|checksum)"),
    "empty-parquet": ("a.parquet", b"", r"a\.parquet after row 0: not Parquet: Parquet file size is 0 bytes"),
    "packed-nonsense": ("a.parquet.gz", gzip.compress(b"x" * 99), r"a\.parquet\.gz after row 0: not Parquet"),
    "csv-named-parquet": ("a.parquet", CSV, r"a\.parquet after row 0: not Parquet"),
    "unknown-suffix": ("a.txt", LINES, r"a\.txt: not a format that is read"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file(tmp_path: Path, tiny_llama: Path, refuses: Callable[..., str], case: str) -> None:
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    stderr = refuses(ExitCode.DATA, "data", tmp_path / name, "--model", tiny_llama)
    assert re.search(message, stderr), stderr
    record(stderr.splitlines()[0].replace(str(tmp_path), ""))


def test_a_run_is_refused_too(tmp_path: Path, tiny_llama: Path, refuses: Callable[..., str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(TWO[0] + b"{")
    flags = ["--model", tiny_llama, "--data", tmp_path / "a.jsonl", "--output", tmp_path / "run"]
    assert "a.jsonl:2:2: not JSON" in refuses(ExitCode.DATA, "train", "--dry-run", *flags)
    assert "a.jsonl:2:2: not JSON" in refuses(ExitCode.DATA, "train", *flags)
    assert not (tmp_path / "run" / "adapter").exists()


def test_broken_rows_are_dropped_and_counted(tmp_path: Path, tiny_llama: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(TWO[0] + b"{\n" + NOT_SPLIT + b"[1]\n" + TWO[1])
    outcome = sampo("data", path, "--model", tiny_llama, "--json", "--set", "data.on_bad_row=drop")
    assert outcome.returncode == ExitCode.OK, outcome.stderr
    counts = json.loads(outcome.stdout)["counts"]
    assert (counts["rows"], counts["kept"]) == (5, 2)
    assert counts["dropped"] == {"cannot be parsed": 2, "not an object": 1}


# Folders and paths ---------------------------------------------------------------------------------------------------

FOLDERS: dict[str, tuple[dict[str, bytes], str]] = {
    "nothing": ({}, "folder"),
    "text": ({"notes.txt": b"hello"}, r"notes\.txt: not a format that is read"),
    "read-me": ({"README.md": b"# Pairs\n"}, "folder"),
    "hidden": ({".a.jsonl": LINES}, "folder"),
    "mixed": (
        {"a.jsonl": LINES, "b.csv": CSV, "c.csv": CSV, "notes.txt": b"x"},
        r"files of several formats; a\.jsonl would be left out \(1 in all\)",
    ),
    "mixed-packed": ({"a.jsonl": LINES, "more/b.csv.gz": gzip.compress(CSV)}, r"more/b\.csv\.gz would be left out"),
    "one-is-broken": ({"a.jsonl": LINES, "b.jsonl": b"{"}, r"folder/b\.jsonl:1:2: not JSON"),
    "one-is-empty": ({"a.parquet": b""}, r"folder/a\.parquet after row 0: not Parquet"),
    "other-splits": ({"dev.jsonl": LINES, "test.jsonl": LINES}, r"no split 'train'; it has test, validation"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_broken_folder(tmp_path: Path, tiny_llama: Path, refuses: Callable[..., str], case: str) -> None:
    files, message = FOLDERS[case]
    (tmp_path / "folder").mkdir()
    for name, content in files.items():
        (tmp_path / "folder" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    stderr = refuses(ExitCode.DATA, "data", tmp_path / "folder", "--model", tiny_llama)
    assert re.search(message, stderr), stderr


def test_files_that_belong_together(tmp_path: Path) -> None:
    """JSON and JSON lines are one format to the datasets library; a README may say which files are meant."""
    for name, content in {
        "a.jsonl": LINES,
        "b.json": json.dumps(ROWS).encode(),
        "c.jsonl.gz": gzip.compress(LINES),
    }.items():
        (tmp_path / name).write_bytes(content)
    assert len(find(str(tmp_path))) == 3
    (tmp_path / "other.csv").write_bytes(CSV)
    with pytest.raises(DataError, match=r"other\.csv would be left out"):
        find(str(tmp_path))
    (tmp_path / "README.md").write_text('---\nconfigs: [{"config_name": "default", "data_files": "other.csv"}]\n---\n')
    assert [file.path.name for file in find(str(tmp_path))] == ["other.csv"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}/gone.jsonl", "there is no file or folder"),
        ("{}/link.jsonl", "there is no file or folder"),
        ("{}/pipe.jsonl", "there is no file or folder"),
        ("{}/" + "x" * 300 + ".jsonl", "File name too long"),
        ("~nobody-of-this-name/a.jsonl", "Could not determine home directory"),
        ("a\0b.jsonl", "there is no file or folder"),
    ],
)
def test_a_path_that_leads_nowhere(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=message):
        find(name.format(tmp_path))


@contextmanager
def somebody_else() -> Iterator[None]:
    """Without root's right to read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_file_that_may_not_be_read() -> None:
    with tempfile.TemporaryDirectory() as name:  # of its own: the folders above pytest's are open to nobody else
        place, locked = Path(name), Path(name) / "locked"
        locked.mkdir()
        (place / "a.jsonl").write_bytes(LINES)
        (locked / "b.jsonl").write_bytes(LINES)
        (file,) = find(str(place / "a.jsonl"))
        assert len(find(str(locked))) == 1  # and all is imported that somebody else may not read where Python lies
        (place / "a.jsonl").chmod(0)
        locked.chmod(0)
        place.chmod(0o755)
        try:
            with somebody_else():
                for attempt in (lambda: digest(file), lambda: next(read_rows(file))):
                    with pytest.raises(DataError, match=r"a\.jsonl: Permission denied"):
                        attempt()
                with pytest.raises(DataError, match=r"b\.jsonl': Permission denied"):
                    find(str(locked / "b.jsonl"))
                with pytest.raises(DataError, match=r"locked/README\.md: Permission denied"):
                    find(str(locked))
        finally:
            locked.chmod(0o755)


def read(path: Path, cache: Path, **more: Any) -> PairDataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMPO_CACHE", str(cache))
        return prepare(DataConfig(sources=[str(path)]), tiny.make_tokenizer(), **more)


def test_a_file_that_goes_away_or_grows_while_it_is_read(tmp_path: Path) -> None:
    """Rows are read in chunks; after the first one, something happens to the file."""
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"

    def grow() -> None:
        with path.open("ab") as file:
            file.write(TWO[0])

    def replace() -> None:
        (tmp_path / "new").write_bytes(LINES)
        (tmp_path / "new").rename(path)

    for change, message in (
        (grow, "it was written to while"),
        (replace, "it was written to"),
        (path.unlink, "No such file"),
    ):
        path.write_bytes(LINES)
        with pytest.raises(DataError, match=rf"a\.jsonl: {message}"):
            read(path, cache, progress=lambda done, total, change=change: change())
        assert not list((cache / "pairs").iterdir())
    (file,) = find(str(write(path)))
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: No such file"):
        digest(file)
    assert len(read(write(path), cache)) == 400


def write(path: Path) -> Path:
    path.write_bytes(LINES)
    return path


# A process that is killed while it tokenises -------------------------------------------------------------------------

WORKER = """
import sys
from sampo_cli.config import DataConfig
from sampo_cli.dataset import prepare
from tests import tiny
dataset = prepare(DataConfig(sources=[sys.argv[1]]), tiny.make_tokenizer())
print(len(dataset))
"""
MANY = 6_000


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Rows enough to be caught while they are tokenised."""
    return tiny.write_pairs(tmp_path / "many.jsonl", MANY)


def start(source: Path, cache: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"SAMPO_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(source)], stdout=subprocess.PIPE, text=True, env=environment
    )


def wait_until_building(worker: subprocess.Popen[str], cache: Path) -> Path:
    """The folder in which it builds, once some of the pairs are in there and others are not."""
    for _ in range(100_000):
        for tokens in (cache / "pairs").glob(".building-*/tokens.bin"):
            if tokens.stat().st_size:
                return tokens.parent
        assert worker.poll() is None, "it was over before it was noticed"
        time.sleep(0.001)
    raise AssertionError("it never began")


def content(dataset: PairDataset) -> list[bytes]:
    return [b"".join(ids.tobytes() for ids in (p.prompt, p.chosen, p.rejected)) for p in dataset]


@pytest.mark.slow
def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path, many: Path) -> None:
    cache = tmp_path / "cache"
    worker = start(many, cache)
    left = wait_until_building(worker, cache)
    worker.kill()
    assert worker.wait() == -signal.SIGKILL
    assert left.is_dir()
    assert len(read(write(tmp_path / "other.jsonl"), cache)) == 400  # by a run that reads something else
    assert not left.exists()
    again = read(many, cache)
    assert not again.cached
    assert content(again) == content(read(many, tmp_path / "undisturbed"))


@pytest.mark.slow
def test_a_process_at_work_is_left_alone(tmp_path: Path, many: Path) -> None:
    cache = tmp_path / "cache"
    worker = start(many, cache)
    building = wait_until_building(worker, cache)
    worker.send_signal(signal.SIGSTOP)
    try:
        assert len(read(write(tmp_path / "other.jsonl"), cache)) == 400
        assert building.is_dir()
        second = start(many, cache)  # wants the same pairs, and waits for them
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(timeout=5)
    finally:
        worker.send_signal(signal.SIGCONT)
    for process in (worker, second):
        assert process.communicate(timeout=120)[0].strip() == str(MANY)
        assert process.returncode == 0
    assert not building.exists()
    assert read(many, cache).cached


@pytest.mark.long
def test_killed_at_random_moments(tmp_path: Path, many: Path) -> None:
    cache, undisturbed = tmp_path / "cache", content(read(many, tmp_path / "undisturbed"))
    generator, left = random.Random(), 0
    for kill in range(20):
        worker = start(many, cache)
        wait_until_building(worker, cache)
        time.sleep(generator.uniform(0, 1.5))
        worker.kill()
        worker.wait()
        left += bool(list((cache / "pairs").glob(".building-*")))
        assert content(read(many, cache)) == undisturbed, kill
        (entry,) = (cache / "pairs").iterdir()
        assert not entry.name.startswith(".")
        for file in entry.iterdir():
            file.unlink()
        entry.rmdir()
    assert left > 5
    result = f"20 kills at random moments, {left} of them within the work: the next run made the same store each time"
    record(result)


def test_a_full_disk(tmp_path: Path, many: Path) -> None:
    """A limit on the size of files, which a process may set for itself, in the place of a disk."""
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    code = limited + WORKER.replace("dataset = ", "from sampo_cli.cli import main\nmain(sys.argv[2:])\ndataset = ")
    model = tiny.save_model(tiny.CONFIGS["llama"](), tmp_path / "model")
    command = [sys.executable, "-c", code, str(many), "data", str(many), "--model", str(model)]
    environment = os.environ | {"SAMPO_CACHE": str(tmp_path / "cache")}
    outcome = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    stderr = check_failure(ExitCode.DATA, outcome.returncode, outcome.stdout, outcome.stderr)
    assert "cannot write the cache of tokenised pairs" in stderr
    assert "File too large" in stderr
    assert not list((tmp_path / "cache" / "pairs").iterdir())
