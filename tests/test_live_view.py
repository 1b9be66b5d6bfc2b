"""The live view: curves, what fits, and that log lines and resizes leave it whole; plain lines without a terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sampo_cli import console
from sampo_cli.console import RunView, Terminal, eval_line, generate_line
from sampo_cli.live_view import LiveView, curve
from scripts import make_screenshot


def train_row(step: int, **values: Any) -> dict[str, Any]:
    row = {"kind": "train", "step": step, "loss": 0.7 - step / 100, "margin": step / 100, "accuracy": 0.5}
    more = {"kept_tokens": 5, "response_tokens": 9, "learning_rate": 1e-4, "grad_norm": 1.0}
    return {**row, **more, "tokens_per_second": 1000.0, "memory_bytes": 2**30, **values}


def eval_row(step: int, spearman: float | None = 0.25) -> dict[str, Any]:
    bias = {"length_bias": {"spearman": spearman}, "sum_length_bias": {"spearman": 0.5}}
    row = {"kind": "eval", "step": step, "loss": 0.61, "margin": 0.2, "accuracy": 0.75, "pairs": 8}
    return {**row, "kl_per_token": 0.0123, **bias}


def generate_row(step: int) -> dict[str, Any]:
    row = {"kind": "generate", "step": step, "prompts": 4, "tokens": 110.0, "base_tokens": 100.0}
    return {**row, "length_ratio": 1.1, "ended": 0.75, "repetition": 0.1}


def filled(steps: int = 40) -> LiveView:
    now = iter(range(10_000))
    view = LiveView(clock=lambda: float(next(now)))
    view.begin(100, 0)
    for step in range(1, steps + 1):
        view.add(train_row(step))
    for step in (20, 40):
        view.add(eval_row(step, spearman=step / 100))
        view.add(generate_row(step))
    return view


def drawn(view: LiveView, width: int, **options: Any) -> list[str]:
    shown = Console(file=io.StringIO(), width=width, **options)
    shown.print(view)
    return shown.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_curve_by_hand() -> None:
    """8 levels from the least to the largest; more values than columns are averaged: (0 + 1) / 2, (2 + 3) / 2."""
    assert curve([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert curve([0, 7], 8) == "▁█"
    assert curve([0, 1, 2, 3], 2) == "▁█"
    assert curve([3, 3, 3], 8) == "▅▅▅"
    assert curve([], 8) == ""
    assert len(curve(list(range(1000)), 28)) == 28


def test_what_is_shown() -> None:
    head, *body = drawn(filled(), 100)
    assert re.match(r"step 40/100 +\S+ +40% ETA \d:\d\d:\d\d", head)
    shown = {line[:11].strip(): line for line in body}
    assert list(shown) == ["loss", "margin", "accuracy", "length bias", "answers", "tokens/s"]
    for name, parts in {
        "loss": ("0.3000", "held out 0.6100", "█"),
        "margin": ("+0.400", "held out +0.200"),
        "accuracy": ("0.50", "held out 0.75", "▅▅▅"),
        "length bias": ("+0.40", "▁█", "of DPO's sum +0.50"),
        "answers": ("110", "tokens; base 100, ratio 1.10"),
        "tokens/s": ("1,000", "memory 1.0 GiB"),
    }.items():
        assert all(part in shown[name] for part in parts), shown[name]


def test_a_correlation_that_is_not_known_is_no_point() -> None:
    view = filled()
    view.add(eval_row(41, spearman=None))
    assert next(line for line in view.lines() if line.name == "length bias").history == [0.2, 0.4]


@pytest.mark.parametrize("width", [12, 20, 30, 40, 57, 60, 79, 80, 81, 100, 200])
def test_no_line_is_as_wide_as_the_terminal(width: int) -> None:
    lines = drawn(filled(), width)
    assert max(map(len, lines)) < (width if width >= 30 else width + 1)
    assert len(lines) == 7
    assert width < 38 or "ETA 0:00:0" in lines[0]


def test_a_terminal_without_blocks_gets_ascii() -> None:
    shown = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80)
    shown.print(filled())
    shown.file.flush()
    text = shown.file.buffer.getvalue().decode("ascii")
    assert "step 40/100" in text
    assert "##%%%" in text
    assert "...__" in text


def test_the_time_to_go() -> None:
    """10 steps in 50 s: 90 more take 450 s. Of a resumed run, the steps since then count."""
    now = [0.0]
    view = LiveView(clock=lambda: now[0])
    view.begin(100, 0)
    assert view.eta() == "-:--:--"
    for step in range(1, 11):
        view.add(train_row(step))
    now[0] = 50.0
    assert view.eta() == "0:07:30"
    resumed = LiveView(clock=lambda: now[0])
    for step in range(1, 51):
        resumed.add(train_row(step))
    resumed.begin(100, 50)
    now[0] = 60.0
    resumed.add(train_row(51))
    assert resumed.eta() == "0:08:10"


# On a terminal -------------------------------------------------------------------------------------------------------


class Screen:
    """As much of a terminal as Rich's live display needs: text, new lines, up, erase."""

    def __init__(self) -> None:
        self.lines, self.row, self.column = [""], 0, 0

    def feed(self, text: str) -> None:
        for control, move, plain in re.findall(r"\x1b\[(\??[\d;]*)([A-Za-z])|([^\x1b])", text):
            if plain == "\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif plain == "\r":
                self.column = 0
            elif plain:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + plain + line[self.column + 1 :]
                self.column += 1
            elif move == "A":
                self.row -= int(control or 1)
            elif move == "K":
                self.lines[self.row] = ""
            else:
                assert move in "mhl", move

    def shown(self) -> list[str]:
        return [line.rstrip() for line in self.lines if line.strip()]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    fake = Console(file=io.StringIO(), force_terminal=True, width=80, height=30, color_system=None)
    monkeypatch.setattr(console, "stderr", fake)
    return fake


def test_log_lines_go_above_the_view_and_resizes_leave_one_view(terminal: Console, tmp_path: Path) -> None:
    view = RunView(screen=Terminal())
    view.begin(tmp_path, 100, 0)
    for step in range(1, 6):
        view.train_row(train_row(step))
    view.note("warning: something [to] be read")
    terminal.width = 120
    view.eval_row(eval_row(5))
    terminal.width = 60
    view.generate_row(generate_row(5))
    view.train_row(train_row(6))
    view._screen.live.refresh()  # type: ignore[union-attr]
    screen = Screen()
    screen.feed(terminal.file.getvalue())  # type: ignore[attr-defined]
    shown = screen.shown()
    assert shown[:2] == [f"training 100 steps into {tmp_path}", "warning: something [to] be read"]
    assert shown[2] == eval_line(eval_row(5))
    assert shown[3] == generate_line(generate_row(5))
    assert shown[4].startswith("step 6/100")
    assert [line.split()[0] for line in shown[5:]] == ["loss", "margin", "accuracy", "length", "answers", "tokens/s"]
    view.close()
    screen = Screen()
    screen.feed(terminal.file.getvalue())  # type: ignore[attr-defined]
    assert screen.shown() == shown[:4]
    log = (tmp_path / "run.log").read_text().splitlines()
    assert sum(line.startswith("step ") for line in log) == 6


def test_a_resumed_run_shows_its_past(terminal: Console, tmp_path: Path) -> None:
    rows = [train_row(1), train_row(2), eval_row(2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    view = RunView(screen=Terminal())
    view.begin(tmp_path, 10, 2)
    view.close()
    assert "step 2/10" in terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "held out 0.6100" in terminal.file.getvalue()  # type: ignore[attr-defined]


def test_a_resumed_run_that_is_finished_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with console.run_view(quiet=False) as view:
        view.begin(tmp_path, 10, 10)
    assert capfd.readouterr().err == f"all 10 steps are done in {tmp_path}\n"


def test_without_a_terminal_there_is_a_line_a_step(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with console.run_view(quiet=False) as view:
        view.begin(tmp_path, 2, 0)
        view.train_row(train_row(1))
        view.eval_row(eval_row(1))
        view.generate_row(generate_row(1))
    lines = capfd.readouterr().err.splitlines()
    assert lines[1].startswith("step 1/2  loss 0.6900")
    assert lines[2] == (
        "evaluation after step 1: loss 0.6100  margin +0.200  accuracy 0.75  length bias +0.25 (DPO's sum +0.50)  "
        "KL (estimated) 0.0123 a token  (8 held-out pairs)"
    )
    assert lines[3] == (
        "answers after step 1: 110 tokens, the base's 100 (ratio 1.10)  ended 75%  repetition 10%  (4 prompts)"
    )
    assert len(lines) == 4


SESSION = """
import sys, time
from pathlib import Path
from sampo_cli import console
from tests.test_live_view import train_row
with console.run_view(quiet=False) as view:
    view.begin(Path(sys.argv[1]), 9, 0)
    for step in range(1, 9):
        view.train_row(train_row(step))
        time.sleep(0.15)
        if step == 5:
            print("a library's own line", file=sys.stderr)
"""


def test_a_real_terminal_that_changes_its_size(tmp_path: Path) -> None:
    def resize(width: int) -> None:
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))

    ours, theirs = pty.openpty()
    resize(100)
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", SESSION, str(tmp_path)], stderr=theirs, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, env={key: value for key, value in environment.items() if key != "COLUMNS"},
    )  # fmt: skip
    os.close(theirs)
    received, began = b"", time.monotonic()
    while time.monotonic() - began < 60:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        received += part
        text = received.decode("utf-8", "ignore")
        resize(50 if re.search("step [3-8]/9", text) else 100)
    assert process.wait(timeout=20) == 0
    os.close(ours)
    text = received.decode("utf-8", "replace").replace("\r\n", "\n")
    last_frame = text[text.rindex("step 8/9") :]
    assert max(len(re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", line)) for line in last_frame.split("\n")) < 50
    screen = Screen()
    screen.feed(text)
    assert screen.shown() == [f"training 9 steps into {tmp_path}", "a library's own line"]


def test_the_screenshot_is_made_from_a_runs_rows(tmp_path: Path) -> None:
    rows = [train_row(step) for step in range(1, 31)] + [eval_row(20), generate_row(20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "summary.json").write_text(json.dumps({"steps": {"done": 30, "planned": 60}}))
    (tmp_path / "run.log").write_text("model: a line of the log\n")
    picture = tmp_path / "view.svg"
    make_screenshot.main([str(tmp_path), "--step", "25", "--output", str(picture)])
    text = picture.read_text(encoding="utf-8").replace("&#160;", " ")
    assert text.startswith("<svg")
    assert "url(http" not in text
    for part in ("step 25/60", "length bias", "held out 0.6100", "ETA"):
        assert part in text, part
