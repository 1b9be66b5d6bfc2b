"""The length experiment: which runs are left, and what its page makes of their lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts import length_experiment, length_page
from scripts.length_experiment import BASE, EARLY, Cell, all_cells

BASE_TOKENS = [10, 20, 30, 40]


def line(cell: Cell | None, longer: int = 0, kl: float = 0.02) -> dict[str, Any]:
    """A line of results whose answers are all `longer` tokens longer than the base's."""
    tokens = [count + longer for count in BASE_TOKENS]
    answers = {"tokens": tokens, "ended": [True] * 4, "repetition": [0.0] * 4}
    if cell is None:
        return {"method": BASE, "step": 0, "answers": answers, "cpu_seconds": 1}
    reward = {"accuracy": {"value": 0.75}, "spearman": {"value": None}}
    rewards = dict.fromkeys(("sum", "sample", "mean", "own"), reward)
    pairs = {"pairs": 8, "kl": {"value": kl}, "rewards": rewards}
    facts = {"seed": cell.seed, "part": cell.part, "method": cell.method, "step": 15, "train_margin": 0.5}
    return {**facts, "pairs": pairs, "answers": answers, "cpu_seconds": 3}


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


@pytest.fixture
def results(tmp_path: Path) -> length_page.Results:
    """One seed: answers grow by 6 where chosen is longer, shrink by 2 where it is shorter; SamPO's by one less."""
    change = {"longer": 6, "shorter": -2, "whole": 0}
    lines = [line(None)]
    lines += [line(cell, change[cell.part] - (cell.method == "sampo")) for cell in all_cells() if cell.seed == 0]
    return length_page.read_results(written(tmp_path / "length.jsonl", lines))


def test_cells_that_have_their_line_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = all_cells()[:2]
    path = written(tmp_path / "length.jsonl", [line(None), line(first)])
    monkeypatch.setattr(length_experiment, "RESULTS", path)
    left = length_experiment.pending()
    assert left[0] == second
    assert len(left) == 3 * (3 * 4 + 1) - 1
    monkeypatch.setattr(length_experiment, "RESULTS", tmp_path / "nothing.jsonl")
    assert length_experiment.pending() == [None, *all_cells()]


def test_lengths_by_hand(results: length_page.Results) -> None:
    assert results.lengths["longer", "sampo"].tolist() == [[15, 25, 35, 45]]
    longer, shorter = (results.lengths[part, "dpo"] for part in ("longer", "shorter"))
    assert length_page.difference(longer, shorter) == (8.0, 8.0, 8.0)
    whole = length_page.contrast_table(results).splitlines()[4]
    assert whole.startswith("| whole | -1 (-1 to -1); 0.95 (")
    assert whole.endswith(" | +0 (+0 to +0); 1.00 (1.00 to 1.00) | +0 (+0 to +0); 1.00 (1.00 to 1.00) |")
    early, dpo = length_page.spread_table(results).splitlines()[2:4]
    assert early.startswith(f"| `dpo`, on shorter `{EARLY}` | 0.020 | 0.020 | +8 (+8 to +8) | 1.5 (")
    assert dpo.startswith("| `dpo` | 0.020 | 0.020 | +8 (+8 to +8) | 1.5 (")  # 16, 26 ... over 8, 18 ...
    first = length_page.runs_table(results).splitlines()[2].split(" | ")
    assert first[:7] == ["| longer", "`dpo`", "0.50", "0.75", "-", "0.020", "+6 (+6 to +6)"]
    assert first[7].startswith("1.30 (")  # sixteen, 26, 36 and 46 over 10, 20, 30 and 40
    assert first[8:] == ["1.00", "0.00 |"]


def test_dpo_that_stopped_early_is_compared_where_it_ran(results: length_page.Results) -> None:
    assert [cell.part for cell in all_cells() if cell.method == EARLY] == ["shorter"] * 3
    rows = length_page.early_table(results).splitlines()[2:]
    assert len(rows) == 5
    assert rows[1].startswith("| `sampo` | 15 | 0.020 | -1 (-1 to -1); 0.94 (")
    assert rows[4] == f"| `{EARLY}` | 15 | 0.020 |  |"
    assert EARLY not in length_page.contrast_table(results)


def test_a_ratio_of_usual_answers_by_hand() -> None:
    """Doubled in every answer: two, whichever prompts and seeds are drawn; one at the cap weighs as any other."""
    base = np.array([[10.0, 20.0, 1024.0]])
    assert length_page.ratio(2 * base, base) == pytest.approx((2.0, 2.0, 2.0))
    assert length_page.ratio(base * [1, 1, 8], base)[0] == pytest.approx(2.0)


def test_the_interval_covers_seeds_and_prompts() -> None:
    """Two seeds that differ by 100 in every answer: a mean of 50, and draws that see one of the two only."""
    group = np.array([[0.0] * 4, [100.0] * 4])
    assert length_page.interval([group], lambda groups: float(groups[0].mean())) == (50.0, 0.0, 100.0)
    assert length_page.difference(group + 3, group, paired=True) == (3.0, 3.0, 3.0)
    assert length_page.difference(group + 3, group) == (3.0, -97.0, 103.0)


def test_a_page_of_the_runs_that_are_there(tmp_path: Path) -> None:
    only = [line(None), line(Cell(0, "longer", "dpo"), 6), line(Cell(0, "longer", "simpo"), 5)]
    only.append(line(Cell(1, "longer", "simpo"), 7))  # of a seed that DPO has no run of
    found = length_page.read_results(written(tmp_path / "length.jsonl", only))
    assert "**3 of the 39 runs are there**" in length_page.tables(found)
    assert "| longer | - | - | -1 (-1 to -1); 0.96 (" in length_page.contrast_table(found)
    assert len(length_page.spread_table(found).splitlines()) == 2
    with pytest.raises(SystemExit, match="nothing to show yet"):
        length_page.read_results(written(tmp_path / "base.jsonl", only[:1]))


def test_the_figure_is_drawn(results: length_page.Results, tmp_path: Path) -> None:
    length_page.draw(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
