"""Writes docs/images/report-*.png: the page of `sampo report` about real runs, as a browser shows it.

    python -m scripts.make_report_pictures outputs/dpo outputs/sampo

Needs Chromium, which is no Python package: `apt install chromium`, or --browser. Light, dark and on a phone; as palette
images, which keeps them small.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sampo_cli.run_report import write_report

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
COLOURS = 256
QUIET = ("disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-component-update")


@dataclass(frozen=True)
class View:
    """What a picture shows: so many CSS pixels of the page, from `top` on; each is `scale` pixels wide in the file."""

    name: str
    width: int
    height: int
    scale: int = 1
    dark: bool = False
    top: int = 0


VIEWS = (
    View("report-light", 1200, 1130),
    View("report-dark", 1200, 1130, dark=True, top=1225),
    View("report-phone", 390, 844, scale=2),
)


def shoot(browser: str, page: Path, view: View, output: Path) -> None:
    """Take one picture."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars", *(f"--{flag}" for flag in QUIET)]
        command += [f"--user-data-dir={profile}", f"--window-size={view.width},{view.top + view.height}"]
        command += [f"--force-device-scale-factor={view.scale}", f"--screenshot={output}"]
        command += ["--blink-settings=preferredColorScheme=0"] * view.dark
        subprocess.run([*command, page.as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(output) as picture:
        shown = picture.convert("RGB").crop((0, view.top * view.scale, picture.width, picture.height))
    small = shown.quantize(COLOURS, dither=Image.Dither.NONE)
    small.save(output, optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--browser", default="chromium")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        page = write_report(given.runs, Path(folder))[0]
        for view in VIEWS:
            output = IMAGES / f"{view.name}.png"
            shoot(given.browser, page, view, output)
            print(f"wrote {output} ({output.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
