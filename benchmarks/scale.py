"""`python -m benchmarks.scale`: what grows with the number of pairs, with their length and with the pairs of a step.

    python -m benchmarks.scale --plot scale.png

Each number comes from a process of its own. The default model is a tiny random one, so that what is seen is the
program and not the matrix products; with another one the lengths show what attention costs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table

from benchmarks.compare import figures, timed_rows
from benchmarks.duel import ContenderError, quiet_environment, run_duel, say_on_stderr
from benchmarks.measure import machine
from benchmarks.models import RANDOM_MODELS, random_model
from benchmarks.settings import Settings, Variant
from benchmarks.startup import start_up
from benchmarks.table import machine_lines, wide_console
from sampo_cli.errors import SampoError, UsageError
from sampo_cli.remote import fetch_model

Rows = list[dict[str, Any]]

PAIRS_OF_A_LENGTH = 2
LENGTH_OF_A_STEP = 256

COLUMNS: dict[str, Mapping[str, tuple[str, str]]] = {
    "pairs": {
        "pairs": ("pairs", "{:,}"),
        "tokenize": ("tokenize s", "{:.1f}"),
        "plan": ("plan s", "{:.2f}"),
        "plan_mib": ("plan MiB", "{:,.0f}"),
        "start": ("start s", "{:.2f}"),
        "first_step": ("budget and first step s", "{:.2f}"),
        "step": ("step s", "{:.3f}"),
        "run_mib": ("run MiB", "{:,.0f}"),
    },
    "lengths": {
        "length": ("tokens a side", "{:,}"),
        "positions": ("positions a step", "{:,}"),
        "seconds": ("step s", "{:.3f}"),
        "microseconds_per_position": ("µs a position", "{:.1f}"),
        "mib": ("MiB above the model", "{:,.0f}"),
    },
    "steps": {
        "pairs_per_step": ("pairs a step", "{:,}"),
        "positions": ("positions a step", "{:,}"),
        "seconds": ("step s", "{:.3f}"),
        "microseconds_per_position": ("µs a position", "{:.1f}"),
        "mib": ("MiB above the model", "{:,.0f}"),
    },
}
TITLES = {
    "pairs": "Number of pairs (already tokenized, but for the first column)",
    "lengths": f"Length ({PAIRS_OF_A_LENGTH} random pairs a step, one in a forward pass)",
    "steps": f"Pairs in a step ({LENGTH_OF_A_STEP} tokens a side, at most 4 pairs in a forward pass)",
}


def against_pairs(counts: Sequence[int], model: Path) -> Rows:
    """Start-up of a run, by its number of pairs."""
    rows = []
    with TemporaryDirectory(prefix="sampo-benchmark-") as folder, quiet_environment(Path(folder)):
        for count in counts:
            say_on_stderr(f"{count:,} pairs")
            rows.append(start_up(count, model, Path(folder)))
    return rows


def against_length(lengths: Sequence[int], model: Path, dtype: str) -> Rows:
    """A step, by the tokens of prompt and response."""
    return [{"length": length} | _step(model, dtype, length, PAIRS_OF_A_LENGTH, 1) for length in lengths]


def against_step(sizes: Sequence[int], model: Path, dtype: str) -> Rows:
    """A step, by its number of pairs."""
    return [{"pairs_per_step": size} | _step(model, dtype, LENGTH_OF_A_STEP, size, min(size, 4)) for size in sizes]


def _step(model: Path, dtype: str, length: int, pairs_per_step: int, pairs_per_microbatch: int) -> dict[str, Any]:
    """Seconds and memory of a step of random pairs, after one to warm up."""
    settings = Settings(
        model=str(model),
        data=f"synthetic:{2 * pairs_per_step}:{length}",
        pairs_per_step=pairs_per_step,
        pairs_per_microbatch=pairs_per_microbatch,
        steps=2,
        warmup_steps=1,
        epochs=1,
        max_length=length,
        quantization="none",
        dtype=dtype,
        checkpointing="all",
        learning_rate=1e-5,
        beta=None,
        opponent_beta=None,
        lora_r=16,
        lora_alpha=32,
        seed=42,
        trl_precompute=False,
    )
    say_on_stderr(f"{length:,} tokens a side, {pairs_per_step} pairs a step")
    (contender,) = run_duel(settings, [Variant("sampo", "sampo")], "none", lambda text: None)
    found = figures(contender.facts, contender.rows)
    positions = sum(row["computed_tokens"] for row in timed_rows(contender.rows)) // settings.steps
    return {
        "positions": positions,
        "seconds": found["seconds_per_step"],
        "microseconds_per_position": 1e6 * found["seconds_per_step"] / positions,
        "mib": found["peak_above_model_mib"],
    }


def table_of(kind: str, rows: Rows) -> Table:
    table = Table(title=TITLES[kind], title_justify="left")
    for heading, _ in COLUMNS[kind].values():
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(form.format(row[key]) for key, (_, form) in COLUMNS[kind].items()))
    return table


def plot(report: Mapping[str, Any], file: Path) -> None:
    """One column of panels for each kind: time above, MiB below, both from 0; a flat line of time is linear growth.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UsageError("--plot: matplotlib is not installed", hint="pip install matplotlib") from error
    mpl.use("Agg")
    from matplotlib import pyplot

    kinds = [kind for kind in COLUMNS if report[kind]]
    by_position = ("microseconds_per_position", "mib")
    drawn = {"pairs": ("start", "run_mib"), "lengths": by_position, "steps": by_position}
    figure, panels = pyplot.subplots(2, len(kinds), figsize=(4 * len(kinds), 6), sharex="col", squeeze=False)
    for kind, column in zip(kinds, panels.T, strict=True):
        columns, rows = COLUMNS[kind], report[kind]
        across = next(iter(columns))
        values = [row[across] for row in rows]
        for panel, key in zip(column, drawn[kind], strict=True):
            panel.semilogx(values, [row[key] for row in rows], "o-")
            panel.set_ylabel(columns[key][0])
            panel.set_ylim(0, 1.08 * max(row[key] for row in rows))
            panel.grid(alpha=0.3)
        panel.set_xticks(values, [f"{value:,}" for value in values], rotation=45)
        panel.set_xticks([], minor=True)
        panel.set_xlabel(columns[across][0])
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def _numbers(text: str) -> list[int]:
    return [int(float(number)) for number in text.split(",") if number]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default="tiny-random", help="a name on the Hub, a folder, or one of benchmarks/models.py")
    add("--pairs", type=_numbers, default=[10**n for n in range(3, 7)], help="1e3,1e4,1e5,1e6; empty for none")
    add("--lengths", type=_numbers, default=[2**n for n in range(8, 14)], help="256,512,...,8192; empty for none")
    add("--steps", type=_numbers, default=[1, 4, 16, 64], help="pairs of a step: 1,4,16,64; empty for none")
    # In bfloat16 a CPU keeps what it compiles for every new shape, up to a GiB, which would hide what a step takes.
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="float32", help="of lengths and steps")
    add("--plot", type=Path, help="draw it into this file (needs matplotlib)")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 if a process failed, 2 for flags or inputs that cannot be used."""
    arguments = parse(argv)
    name = arguments.model
    try:
        model = Path(random_model(name) if name in RANDOM_MODELS else fetch_model(name, None)).resolve()
        report: dict[str, Any] = {
            "command": shlex.join(["python", "-m", "benchmarks.scale", *(sys.argv[1:] if argv is None else argv)]),
            "machine": machine(),
            **_measured(arguments, model),
        }
        if arguments.plot:
            plot(report, arguments.plot)
    except ContenderError as error:
        say_on_stderr(f"error: {error}")
        return 1
    except SampoError as error:
        say_on_stderr(f"error: {error}" + (f"\n  {error.hint}" if error.hint else ""))
        return 2
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        tables = [table_of(kind, report[kind]) for kind in COLUMNS if report[kind]]
        wide_console().print(*tables, *machine_lines(report), sep="\n")
    return 0


def _measured(arguments: argparse.Namespace, model: Path) -> dict[str, Rows]:
    return {
        "pairs": against_pairs(arguments.pairs, model),
        "lengths": against_length(arguments.lengths, model, arguments.dtype),
        "steps": against_step(arguments.steps, model, arguments.dtype),
    }


if __name__ == "__main__":
    sys.exit(main())
