"""The page about runs: its numbers are those of metrics.jsonl, and what a file says is text on it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sampo_cli.charts import PALETTE, Curve, curves, scatter, smoothed, svg
from sampo_cli.errors import UsageError
from sampo_cli.length_bias import BUCKETS
from sampo_cli.lock import held
from sampo_cli.run_files import find_runs, headline, read_run
from sampo_cli.run_report import differences, overview, sections_of, write_report
from sampo_cli.tables_report import print_runs

EVIL = '<script>alert(1)</script> $x_1$ & "q" \' {{ 7 * 7 }}'


def bias(spearman: float) -> dict[str, Any]:
    return {
        "spearman": spearman,
        "buckets": [{"name": name, "pairs": 4, "accuracy": 0.1 * place} for place, name in enumerate(BUCKETS)],
    }


def write_run(folder: Path, *, steps: int = 20, state: str = "finished", text: str = "Why?", **recipe: Any) -> Path:
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        rows.append({"kind": "train", "step": step, "loss": 1 / step, "margin": step / 10, "grad_norm": None})
        if step % 5 == 0:
            rows.append({"kind": "eval", "step": step, "loss": 2 / step, "accuracy": 0.5 + step / 100} | both(step))
            rows.append({"kind": "generate", "step": step, "tokens": 100.0 + step, "base_tokens": 100.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tr')
    summary = {
        "state": state,
        "method": {"name": "sampo"},
        "model": {"name": "tiny"},
        "steps": {"done": steps, "planned": steps},
        "evaluation": next((row for row in reversed(rows) if row["kind"] == "eval"), None),
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    sources = {"data": {"sources": ["pairs.jsonl", text]}}
    (folder / "recipe.yaml").write_text(json.dumps(sources | {"method": {"beta": 0.1} | recipe}))
    answer = {"prompt": text, "base": f"base {text}", "answer": f"tuned {text}", "base_tokens": 7, "tokens": 9}
    (folder / "generations.jsonl").write_text(json.dumps({"step": 5} | answer) + "\n")
    pairs = [{"gap": gap, "margin": 0.01 * gap + 0.5} for gap in (-100, 0, 50)]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def both(step: int) -> dict[str, Any]:
    return {"length_bias": bias(step / 100), "sum_length_bias": bias(step / 50)}


class Page(HTMLParser):
    """What a reader and a browser find: tags with their attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.said.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Path]:
    folder = tmp_path_factory.mktemp("runs")
    one = write_run(folder / "one", text=EVIL)
    two = write_run(folder / "b" / "one", steps=10, state="running", beta=0.5)
    files = write_report([one, two], folder / "out")
    assert files[0] == folder / "out" / "report.html"
    return Page(files[0].read_text(encoding="utf-8")), folder / "out"


def test_nothing_is_fetched_and_nothing_runs(page: tuple[Page, Path]) -> None:
    tags = page[0].tags
    assert not {"script", "iframe", "img", "object", "link"} & {tag for tag, _ in tags}
    for _, attributes in tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert str(attributes.get(name, "#")).startswith("#"), attributes


def test_what_files_say_is_text(page: tuple[Page, Path]) -> None:
    said = "".join(page[0].said)
    assert f"base {EVIL}" in said
    assert f"tuned {EVIL}" in said
    assert f"pairs.jsonl, {EVIL}" in said


def test_each_figure_has_words_numbers_and_a_file(page: tuple[Page, Path]) -> None:
    figures = [attributes for tag, attributes in page[0].tags if attributes.get("role") == "img"]
    files = sorted(path.stem for path in page[1].glob("*.png"))
    assert len(figures) == len(files) == [tag for tag, _ in page[0].tags].count("svg")
    length = ["accuracy-by-length", "generated-length", "length-bias"]
    assert files == ["accuracy", *length, "loss", "margin", "margin-by-gap"]
    (loss,) = [str(figure["aria-label"]) for figure in figures if str(figure["aria-label"]).startswith("Loss")]
    assert "one: from 1 at step 1 to 0.05 at step 20, and from 0.4 at step 5 to 0.1 at step 20 on held-out" in loss
    assert "one (2): from 1 at step 1 to 0.1 at step 10" in loss
    assert [tag for tag, _ in page[0].tags].count("table") == len(figures) + 2


def test_the_page_has_one_language_headings_in_order_and_known_anchors(page: tuple[Page, Path]) -> None:
    tags = page[0].tags
    assert ("html", {"lang": "en"}) in tags
    assert [tag for tag, _ in tags if tag in ("h1", "h2")][:2] == ["h1", "h2"]
    anchors = {str(attributes["href"])[1:] for tag, attributes in tags if tag == "a"}
    assert anchors <= {attributes.get("id") for _, attributes in tags}
    assert anchors == {"runs", "learning", "length", "answers", "recipes"}


def test_numbers_are_those_of_the_rows(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "one"))
    charts = {chart.key: chart for section in sections_of([run]) for chart in section.charts}
    assert charts["loss"].headings == ["step", "one", "one (held out)"]
    first, *_, last = charts["loss"].rows
    assert (first, last) == (["5", "0.2", "0.4"], ["20", "0.05", "0.1"])
    assert charts["length-bias"].rows == [["5", "0.05"], ["10", "0.1"], ["15", "0.15"], ["20", "0.2"]]
    assert charts["accuracy-by-length"].rows[1] == ["one, as DPO's sum", "0", "0.1", "0.2", "0.3", "0.4"]
    assert charts["generated-length"].rows[-1] == ["20", "120", "100"]
    assert charts["margin-by-gap"].rows == [["one", "3", "+1", "+0.5"]]  # 0.01 a token, 0.5 at equal lengths
    (row,) = overview([run])["rows"]
    assert row[:4] == ["one", "sampo", "tiny", "pairs.jsonl, Why?"]
    assert row[4:] == ["20 of 20", "finished", "0.1", "0.7", "none", "0.2"]


def test_what_differs(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, beta=beta)) for name, beta in (("a", 0.1), ("b", 0.5))]
    assert differences(runs) == {
        "caption": "What differs between the recipes",
        "headings": ["key", "a", "b"],
        "rows": [["method.beta", "0.1", "0.5"]],
    }


def test_a_run_that_was_killed_and_one_that_is_going(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "one", state="running")
    assert read_run(run).state == "crashed"
    with held(run):
        assert read_run(run).state == "running"


def test_a_folder_of_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "deep" / "one")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "summary.json").write_text("{")
    found = {Path(line["run"]).name: line for line in map(headline, find_runs(tmp_path))}
    assert found["broken"]["state"] == "broken"
    assert "summary.json" in found["broken"]["problem"]
    one = found["one"]
    assert (one["best_accuracy"], one["length_bias"], one["steps"]) == (0.7, 0.2, 20)
    assert (one["generated_tokens"], one["base_tokens"]) == (120, 100)
    with pytest.raises(UsageError, match="no such folder"):
        list(find_runs(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="not a run's folder"):
        read_run(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        read_run(tmp_path / "nowhere")


def test_the_table_of_runs_breaks_names_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs without generated answers have no column for them, and a state stays in one piece at 80 characters."""
    runs = [write_run(tmp_path / name, state=state) for name, state in (("a" * 30, "interrupted"), ("b", "finished"))]
    for run in runs:
        rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(row for row in rows if '"generate"' not in row))
    print_runs([headline(run) for run in find_runs(tmp_path)], tmp_path)
    out = capsys.readouterr().out
    assert "answers" not in out
    assert "interrupted" in out
    assert "20/20" in out


def test_values_of_other_types_count_as_not_there(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one")
    rows = [{"kind": "eval", "step": "x", "loss": 1}, {"kind": "eval", "step": 1, "loss": True, "length_bias": 3}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "held_out.jsonl").write_text('{"gap": "1", "margin": 2}\n[1]\n')
    (run / "summary.json").write_text('{"steps": [], "method": 3, "evaluation": "x", "state": 7}')
    assert sections_of([read_run(run)]) == []
    assert write_report([run], tmp_path / "out")[0].is_file()


def test_a_moving_mean() -> None:
    assert smoothed([1, 2, 3]) == [1, 2, 3]
    assert smoothed([*range(40)])[-1] == 38.5  # of the last two


def test_svg_is_well_formed_and_takes_the_pages_colours() -> None:
    text = svg(curves("x", EVIL, "nats", [Curve(EVIL, [1, 2], [3, 4])]))
    root = ElementTree.fromstring(text)
    assert "viewBox" in root.attrib
    assert "width" not in root.attrib
    assert "currentColor" in text
    assert "<script" not in text


def test_a_line_through_pairs_of_one_gap_is_flat() -> None:
    assert scatter("x", "x", {"a": ([3, 3], [1, 2])}, "y").rows == [["a", "2", "+0", "+1.5"]]


def test_a_base_is_drawn_dashed_in_its_runs_colour() -> None:
    """Two runs and the base of the second: two colours of the palette, and no third."""
    dots = {"held_out_steps": [0, 1], "held_out": [80, 90]}
    text = svg(
        curves("x", "t", "tokens", [Curve("a", **dots), Curve("b", **dots), Curve("b, base", **dots, base_of=1)])
    )
    found = {color for color in PALETTE if color.lower() in text.lower()}
    assert found == set(PALETTE[:2])
    dashed = re.findall(r'stroke-dasharray: [^;"]+[^"]*?stroke: (#[0-9a-f]{6})', text)
    assert set(dashed) == {PALETTE[1].lower()}
