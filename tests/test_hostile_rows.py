"""Every row of a data set is used as it is meant, or dropped with a reason that is counted. Nothing else happens.

The short forms run the same cases every time; the long ones (`-m long`) other cases each time.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sampo_cli.config import DataConfig
from sampo_cli.dataset import PairDataset, prepare
from sampo_cli.errors import DataError
from sampo_cli.formats import Conversation, Unusable
from sampo_cli.template import PairEncoder
from tests import hostile, tiny
from tests.hostile import Said
from tests.reliability import record

TOKENIZER = tiny.make_tokenizer()
SPECIAL = {TOKENIZER.convert_tokens_to_ids(text) for text in ("<|pad|>", "<|im_start|>", "<|im_end|>")}
DOCUMENTED = set(
    re.findall(
        r"^\| `([^`]+)` \| ", (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8"), re.MULTILINE
    )
)
PLENTY = 4_000_000

Line = tuple[str, bytes, Said | None]  # good, junk or broken; what stands in the file; what it says


def run(strategy: st.SearchStrategy[Any], check: Callable[[Any, Counter[str]], None], examples: int) -> Counter[str]:
    """Check that many examples: with fewer than a thousand the same ones every time. Returns what `check` counted."""
    tally: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        derandomize=examples < 1000,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def checked(example: Any) -> None:
        check(example, tally)

    checked()
    return tally


def report(tally: Counter[str]) -> None:
    dropped = {reason: count for reason, count in tally.most_common() if reason not in ("rows", "used", "files")}
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
    result = f"{tally['rows']:,} rows in {tally['files']:,} files: {tally['used']:,} used, dropped: {reasons}"
    record(result)


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder with an empty cache of its own."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMPO_CACHE", str(Path(name) / "cache"))
        yield Path(name)


def read(path: Path, **settings: Any) -> PairDataset:
    config = DataConfig(sources=[str(path)], **{"max_length": PLENTY, "on_bad_row": "drop", **settings})
    return prepare(config, TOKENIZER)


def read_or_refused(path: Path, **settings: Any) -> PairDataset | DataError:
    """The pairs, or an error with a message that names the file and that a terminal can show."""
    try:
        return read(path, **settings)
    except DataError as error:
        problem = error
    assert str(path) in problem.message
    assert problem.message.isprintable()
    return problem


def special_in(ids: Any) -> int:
    return sum(id in SPECIAL for id in ids.tolist())


def check_exact(pair: Any, x: Said) -> None:
    """The tokens say what the row says, and only the template's special tokens are special."""
    expected = x.rendered()
    for ids, text in zip((pair.prompt, pair.chosen, pair.rejected), expected, strict=True):
        same = TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text
        assert same, repr(text[:300])  # a megabyte of differences takes minutes to show
    special = [special_in(ids) for ids in (pair.prompt, pair.chosen, pair.rejected)]
    assert special == [2 * len(x.turns()) + 1, 1, 1]


def check_counts(dataset: PairDataset, rows: int) -> None:
    counts = dataset.counts
    assert counts.rows == rows == counts.kept + sum(counts.dropped.values())
    assert len(dataset) == counts.kept
    assert set(counts.dropped) <= DOCUMENTED
    for lengths in (dataset.prompt_tokens, dataset.chosen_tokens, dataset.rejected_tokens):
        assert lengths.min() >= 1
    longest = dataset.prompt_tokens + np.maximum(dataset.chosen_tokens, dataset.rejected_tokens)
    assert longest.max() <= dataset.max_length


# Lines of JSON ------------------------------------------------------------------------------------------------------


@st.composite
def lines(draw: Any) -> Line:
    kind = draw(st.sampled_from(("good", "good", "good", "junk", "junk", "broken")))
    if kind == "broken":
        return kind, draw(hostile.broken_lines), None
    if kind == "junk":
        return kind, hostile.line_of(draw(hostile.junk_rows()), draw(st.booleans())), None
    row, x = draw(hostile.good_rows())
    return kind, hostile.line_of(row, draw(st.booleans())), x


@st.composite
def files(draw: Any) -> tuple[list[Line], bytes, bytes, bool]:
    """Rows, what ends a line, what the file begins with, whether it is packed."""
    rows = draw(st.lists(lines(), min_size=1, max_size=12))
    end = draw(st.sampled_from((b"\n", b"\r\n", b"\n\n", b"\n \t\r\n")))
    return rows, end, draw(st.sampled_from((b"", b"\xef\xbb\xbf", b"\n\n"))), draw(st.booleans())


def write(folder: Path, rows: list[Line], end: bytes, start: bytes, packed: bool) -> Path:
    content = start + end.join(line for _, line, _ in rows) + end
    path = folder / ("rows.jsonl.gz" if packed else "rows.jsonl")
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    return path


def refused_as_a_whole(rows: list[Line], start: bytes) -> bool:
    """The first line can show that the file is no file of lines: a JSON array, or UTF-16."""
    first = rows[0][1]
    return not start.startswith(b"\n") and (first.startswith(b"[{") or (not start and first.startswith(b"\xff\xfe")))


def check_file(example: tuple[list[Line], bytes, bytes, bool], tally: Counter[str]) -> None:
    rows, end, start, packed = example
    sure = {index: x for index, (_, _, x) in enumerate(rows) if x is not None}
    usable = {index for index, x in sure.items() if not x.faults()}
    with workplace() as folder:
        path = write(folder, rows, end, start, packed)
        tally.update(rows=len(rows), files=1)
        dataset = read_or_refused(path)
        if isinstance(dataset, DataError):
            assert refused_as_a_whole(rows, start) or not usable
            tally["in a file without a usable row"] += len(rows)
            return
        check_counts(dataset, len(rows))
        kept = {int(pair_id): dataset[index] for index, pair_id in enumerate(dataset.pair_ids)}
        assert usable == kept.keys() & sure.keys()
        assert not kept.keys() & {index for index, (kind, _, _) in enumerate(rows) if kind == "broken"}
        for index in usable:
            check_exact(kept[index], sure[index])
        assert Counter(dataset.counts.dropped) == dropped_one_by_one(folder, rows)
        tally.update(used=dataset.counts.kept, **dataset.counts.dropped)
        check_again(path, dataset, rows, end, start)


def dropped_one_by_one(folder: Path, rows: list[Line]) -> Counter[str]:
    """The reasons again, each row in a file of its own behind one that is always used."""
    good = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    reasons: Counter[str] = Counter()
    for kind, line, x in rows:
        if kind != "good" or (x is not None and x.faults()):
            (folder / "one.jsonl").write_bytes(good + line + b"\n")
            found = read(folder / "one.jsonl").counts.dropped
            assert sum(found.values()) <= 1
            if kind == "broken":
                assert found == {"cannot be parsed": 1}
            if x is not None:
                assert set(found) <= x.faults()
            reasons.update(found)
    return reasons


def check_again(path: Path, dataset: PairDataset, rows: list[Line], end: bytes, start: bytes) -> None:
    """Strictly, the same store or an error at the first bad row; and the same bytes another time."""
    bad = [index for index, (kind, line, _) in enumerate(rows) if kind == "broken" or not is_object(line)]
    strict = read_or_refused(path, on_bad_row="error")
    if isinstance(strict, DataError):
        number = start.count(b"\n") + bad[0] * end.count(b"\n") + 1
        assert strict.message.startswith(f"{path}:{number}:")
        return
    assert not bad
    assert strict.counts == dataset.counts
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMPO_CACHE", str(path.parent / "another"))
        again = read(path)
    assert again.fingerprint == dataset.fingerprint
    assert (
        [written(pair) for pair in again] == [written(pair) for pair in strict] == [written(pair) for pair in dataset]
    )


def written(pair: Any) -> bytes:
    return b"".join(ids.tobytes() for ids in (pair.prompt, pair.chosen, pair.rejected))


def is_object(line: bytes) -> bool:
    return isinstance(json.loads(line), dict)


def test_lines() -> None:
    tally = run(files(), check_file, 150)
    assert tally["rows"] > 500
    assert tally["used"] > 150
    assert len(tally) > 10  # reasons


@pytest.mark.long
def test_lines_long() -> None:
    tally = run(files(), check_file, 5000)
    assert tally["rows"] >= 20_000
    report(tally)


# Tables and arrays ---------------------------------------------------------------------------------------------------

TABLES: dict[str, tuple[Callable[[Said], dict[str, Any]], ...]] = {
    "strings": hostile.STRINGS,
    "messages": (hostile.with_strings, hostile.share_gpt_with_strings),
    "whole": (hostile.whole,),
}


@st.composite
def tables(draw: Any) -> tuple[str, list[tuple[dict[str, Any], Said]], bool]:
    """Format, rows and whether it is packed. A column has one type; in CSV, each row has each column."""
    suffix = draw(st.sampled_from((".json", ".csv", ".parquet")))
    if suffix == ".json":
        return suffix, draw(st.lists(hostile.good_rows(), min_size=1, max_size=8)), draw(st.booleans())
    kind = "strings" if suffix == ".csv" else draw(st.sampled_from(sorted(TABLES)))
    makers = draw(st.lists(st.sampled_from(TABLES[kind]), min_size=1, max_size=1 if suffix == ".csv" else 4))
    text = hostile.usual.filter(lambda text: not any(map(hostile.is_surrogate, text)))
    one = hostile.said(text, history=kind != "strings").filter(hostile.fits_a_string)
    said = draw(st.lists(one, min_size=1, max_size=8))
    rows = [(draw(st.sampled_from(makers))(x), x) for x in said]
    return suffix, rows, draw(st.booleans())


def write_table(folder: Path, suffix: str, rows: list[dict[str, Any]], packed: bool) -> Path:
    path = folder / f"table{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows, indent=len(rows) % 3 or None))
    elif suffix == ".parquet":
        columns = list(dict.fromkeys(name for row in rows for name in row))
        table = pyarrow.table({name: pyarrow.array([row.get(name) for row in rows]) for name in columns})
        pyarrow.parquet.write_table(table, path, row_group_size=3)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
    if packed:
        packed_path = folder / f"{path.name}.gz"
        packed_path.write_bytes(gzip.compress(path.read_bytes(), 1))
        return packed_path
    return path


def check_table(example: tuple[str, list[tuple[dict[str, Any], Said]], bool], tally: Counter[str]) -> None:
    suffix, rows, packed = example
    usable = {index for index, (_, x) in enumerate(rows) if not x.faults()}
    tally.update(rows=len(rows), files=1)
    with workplace() as folder:
        dataset = read_or_refused(write_table(folder, suffix, [row for row, _ in rows], packed))
        if isinstance(dataset, DataError):
            assert not usable
            tally["in a file without a usable row"] += len(rows)
            return
        check_counts(dataset, len(rows))
        assert set(dataset.pair_ids.tolist()) == usable
        for pair in dataset:
            check_exact(pair, rows[pair.pair_id][1])
        tally.update(used=dataset.counts.kept, **dataset.counts.dropped)


def test_tables() -> None:
    tally = run(tables(), check_table, 150)
    assert tally["rows"] > 400
    assert tally["used"] > 150


@pytest.mark.long
def test_tables_long() -> None:
    tally = run(tables(), check_table, 2000)
    assert tally["rows"] >= 5_000
    report(tally)


# What is cut ---------------------------------------------------------------------------------------------------------


@st.composite
def limits(draw: Any) -> tuple[list[Said], int, int]:
    said = draw(st.lists(hostile.said().filter(lambda x: not x.faults()), min_size=1, max_size=6))
    return said, draw(st.integers(2, 60)), draw(st.integers(1, 80))


def check_cut(example: tuple[list[Said], int, int], tally: Counter[str]) -> None:
    """Prompts lose their beginning behind the BOS, responses their end, nobody everything."""
    said, most, least_prompt = example
    conversations = [Conversation(x.turns(), x.chosen.strip(), x.rejected.strip()) for x in said]
    whole = PairEncoder(TOKENIZER, "2024-07-26").encode(conversations)
    tally.update(rows=len(said), files=1)
    with workplace() as folder:
        path = folder / "rows.jsonl"
        path.write_bytes(b"".join(hostile.line_of(hostile.whole(x), True) + b"\n" for x in said))
        dataset = read_or_refused(path, max_length=most, min_prompt_tokens=least_prompt)
        kept = {} if isinstance(dataset, DataError) else {int(pair.pair_id): pair for pair in dataset}
        if not isinstance(dataset, DataError):
            check_counts(dataset, len(said))
            assert set(dataset.counts.dropped) <= {"identical after truncation"}
        for index, full in enumerate(whole):
            assert not isinstance(full, Unusable)
            floor = min(len(full.prompt), max(1, min(least_prompt, most // 2)))
            if index in kept:
                check_parts(kept[index], full, most, floor)
            else:
                assert full.chosen[: most - floor] == full.rejected[: most - floor]
                tally["identical after truncation"] += 1
        tally["used"] += len(kept)


def check_parts(pair: Any, full: Any, most: int, floor: int) -> None:
    prompt, chosen, rejected = pair.prompt.tolist(), pair.chosen.tolist(), pair.rejected.tolist()
    assert len(prompt) >= floor
    assert chosen != rejected
    assert prompt[1:] == full.prompt[len(full.prompt) - len(prompt) + 1 :]
    assert prompt[0] == (full.prompt[0] if len(prompt) > 1 else full.prompt[-1])
    assert (chosen, rejected) == (full.chosen[: len(chosen)], full.rejected[: len(rejected)])
    longest = max(len(full.chosen), len(full.rejected))
    if len(full.prompt) + longest <= most:
        assert (prompt, chosen, rejected) == (full.prompt, full.chosen, full.rejected)
    else:
        assert len(prompt) + max(len(chosen), len(rejected)) == most
    if len(prompt) > floor:  # the responses give way only when the prompt cannot
        assert (chosen, rejected) == (full.chosen, full.rejected)


def test_cut() -> None:
    tally = run(limits(), check_cut, 60)
    assert tally["rows"] > 100
    assert tally["used"] > 75


@pytest.mark.long
def test_cut_long() -> None:
    tally = run(limits(), check_cut, 1500)
    report(tally)


# What is large -------------------------------------------------------------------------------------------------------

SECONDS = 20.0  # of this process, for 1 MB or 10,000 turns; 1 to 4 where this was written


def turns(count: int, text: str) -> list[dict[str, str]]:
    return [hostile.turn("assistant" if i % 2 else "user", f"{text} {i}") for i in range(count)]


def large(size: int) -> dict[str, Said]:
    """Conversations of about `size` characters, or of a hundredth as many turns."""
    return {
        "one-word": Said(turns(1, "x" * size), "yes", "no"),
        "spaces": Said(turns(1, "a" + " " * size + "b"), "yes", "no"),
        "answers": Said(turns(1, "long?"), "the user " * (size // 9), "🙂" * (size // 4)),
        "special-tokens": Said(turns(1, "<|im_end|></s><|pad|>" * (size // 21)), "yes", "no"),
        "turns": Said(turns(size // 100 - 1, "hi there"), "yes", "no"),
        "turns-special": Said(turns(size // 100 - 1, "<|im_end|>"), "yes <|im_start|>", "no"),
    }


def check_large(folder: Path, row: dict[str, Any], x: Said, most: float) -> float:
    """Time grows with the text, not with its square."""
    path = folder / "rows.jsonl"
    path.write_bytes(hostile.line_of(row, False))
    start = time.process_time()
    dataset = read(path)
    seconds = time.process_time() - start
    check_exact(dataset[0], x)
    assert seconds < most
    return seconds


@pytest.mark.parametrize("name", large(100))
def test_large(tmp_path: Path, name: str) -> None:
    x = large(100_000)[name]
    check_large(tmp_path, hostile.whole(x), x, SECONDS / 5)


@pytest.mark.long
@pytest.mark.parametrize("name", large(100))
def test_large_long(tmp_path: Path, name: str) -> None:
    x = large(1_000_000)[name]
    seconds = check_large(tmp_path, hostile.whole(x), x, SECONDS)
    record(f"{name}: {seconds:.1f} s")
