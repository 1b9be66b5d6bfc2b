"""The notebook of the docs in a real kernel, and what a kernel's interrupt does to a run."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sampo_cli.live_view import LiveView
from sampo_cli.notebook import LEAST_SECONDS, Cell
from tests.test_live_view import train_row

nbformat = pytest.importorskip("nbformat", reason="notebooks need the extra dev")
nbclient = pytest.importorskip("nbclient", reason="notebooks need the extra dev")
pytest.importorskip("ipykernel", reason="notebooks need the extra dev")

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "notebook.ipynb"


@pytest.fixture(scope="module")
def kernel(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A notebook's client with a kernel that finds this sampo, a tiny model and an empty folder."""
    folder = tmp_path_factory.mktemp("notebook")
    patch = pytest.MonkeyPatch()
    patch.setenv("SAMPO_NOTEBOOK_MODEL", str(tiny_llama))
    patch.setenv("SAMPO_CACHE", str(folder / "cache"))
    patch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent))
    client = nbclient.NotebookClient(
        nbformat.read(NOTEBOOK, 4), timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    with client.setup_kernel():
        yield client, folder
    patch.undo()


def outputs(cell: Any, kind: str) -> list[Any]:
    return [output for output in cell.outputs if output.output_type == kind]


@pytest.mark.slow
def test_the_notebook_runs(kernel: tuple[Any, Path]) -> None:
    client, folder = kernel
    for index, cell in enumerate(client.nb.cells):
        client.execute_cell(cell, index)  # raises what the cell raises
    (training,) = [cell for cell in client.nb.cells if cell.cell_type == "code" and "run = train(" in cell.source]
    (shown,) = outputs(training, "display_data")
    assert shown.data["text/plain"].startswith("step 8/8 ")
    assert "held out" in shown.data["text/html"]
    assert "evaluation after step 8" in shown.data["text/html"]
    (run,) = folder.glob("outputs/notebook-*")
    assert {"adapter", "merged", "eval"} <= {path.name for path in run.iterdir()}
    streams = [output for cell in client.nb.cells if cell.cell_type == "code" for output in outputs(cell, "stream")]
    assert {stream.name for stream in streams} == {"stdout"}, "nothing but what the cells print"


INTERRUPTED = """
import os, signal
from sampo_cli import Interrupted, train
signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
before = list(map(signal.getsignal, signals))
model, settings = os.environ["SAMPO_NOTEBOOK_MODEL"], {"train.save_every": 10_000, "data.eval_fraction": 0.0}
try:
    train("quickstart", model=model, output="long", max_steps=10_000, batch_pairs=1, settings=settings)
except Interrupted as stopped:
    print(stopped.message, *stopped.__notes__, int(stopped.exit_code), sep=" | ")
print(before == list(map(signal.getsignal, signals)))
"""


@pytest.mark.slow
def test_an_interrupt_saves_and_the_kernel_goes_on(kernel: tuple[Any, Path]) -> None:
    """The stop button sends SIGINT to the kernel's process, as here."""
    client, folder = kernel
    rows = folder / "long" / "metrics.jsonl"

    def interrupt() -> None:
        while not (rows.is_file() and rows.read_text().count("\n") >= 2):
            time.sleep(0.05)
        os.kill(client.km.provisioner.pid, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    cell = nbformat.v4.new_code_cell(INTERRUPTED)
    client.nb.cells.append(cell)
    client.execute_cell(cell, len(client.nb.cells) - 1)
    said = "".join(output.text for output in outputs(cell, "stream"))
    stopped = re.fullmatch(
        r"stopped after step (\d+) of 10000; everything so far is saved \| "
        r"hint: go on with: sampo train --resume long \| 130\nTrue\n",
        said,
    )
    assert stopped, said
    assert (folder / "long" / "checkpoints" / f"step-{int(stopped[1]):06d}").is_dir()


def test_the_notebook_as_it_is_committed() -> None:
    """Outputs of one run from top to bottom, and nothing of the machine that it ran on."""
    cells = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/(home|tmp|root|work)/|Traceback|\berror\b", text)
    assert len(text) < 50_000


class Display:
    """Stands for IPython's: what is displayed first and what takes its place."""

    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []

    def __call__(self, content: dict[str, str], **options: object) -> Display:
        assert options == {"raw": True, "display_id": True}
        return self.update(content, raw=True)

    def update(self, content: dict[str, str], *, raw: bool) -> Display:
        self.shown.append(content)
        return self


def test_a_cell_has_one_output_that_is_not_drawn_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    display, now = Display(), [0.0]
    monkeypatch.setattr("IPython.display.display", display)
    cell, view = Cell(clock=lambda: now[0]), LiveView()
    cell.note("model: <b>tiny</b>")
    assert "&lt;b&gt;tiny" in display.shown[-1]["text/html"]
    view.begin(100, 0)
    cell.start(view)
    for step in range(1, 101):  # 100 steps in a second: drawn 4 times
        now[0] = step / 100
        view.add(train_row(step))
        cell.changed()
    assert len(display.shown) == 2 + 1 / LEAST_SECONDS
    cell.stop()
    assert display.shown[-1]["text/plain"].startswith("step 100/100")
    assert display.shown[-1]["text/plain"].endswith("model: <b>tiny</b>")
