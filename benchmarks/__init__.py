"""Benchmarks: `python -m benchmarks.step` against trl, `python -m benchmarks.scale` against size. Not in the wheel."""
