"""Builds sdist and wheel into dist/, checks them, and cuts the release's notes from the changelog.

    make release

Publishes nothing. On a tagged commit, tag, version and the changelog's newest heading must be the same; elsewhere it is
a rehearsal, with the notes of what is unreleased.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from sampo_cli import __version__

ROOT = Path(__file__).resolve().parent.parent
WANTED = (
    "sampo_cli/cli.py",
    "sampo_cli/py.typed",
    "sampo_cli/_constraints.txt",
    "sampo_cli/_recipes/quickstart/recipe.yaml",
    "sampo_cli/_recipes/16gb/llama-3.1-8b.yaml",
)
NOT_WANTED = ("tests/", "scripts/", "docs/", "benchmarks/")
_HEADING = re.compile(r"^## \[([^\]]+)\](?: - (\d{4}-\d{2}-\d{2}))?[ \t]*$", re.MULTILINE)


def sections(changelog: str) -> dict[str, tuple[str | None, str]]:
    """(date, text) of each version of a changelog, newest first; without a date where it is not released."""
    parts = _HEADING.split(changelog)[1:]
    return {name: (date, text.strip()) for name, date, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True)}


def problems(version: str, changelog: str, tag: str | None) -> list[str]:
    """What keeps this commit from being the release of `version`; nothing where it is not tagged."""
    if tag is None:
        return []
    found = []
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, and sampo_cli.__version__ is {version}")
    released = [name for name, (date, _) in sections(changelog).items() if date]
    if not released or released[0] != version:
        newest = released[0] if released else "none"
        found.append(f"the newest dated heading of CHANGELOG.md is {newest}; it must be '## [{version}] - DATE'")
    if sections(changelog).get("Unreleased", (None, ""))[1]:
        found.append("CHANGELOG.md has lines under 'Unreleased'; move them under the version")
    return found


def notes(version: str, changelog: str) -> str:
    """The text of `version`, or of what is unreleased where it has no heading yet."""
    found = sections(changelog)
    _, text = found.get(version) or found["Unreleased"]
    return f"# sampo {version}\n\n{text}\n"


def build(output: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (sdist,), (wheel,) = output.glob("*.tar.gz"), output.glob("*.whl")
    return sdist, wheel


def check(sdist: Path, wheel: Path) -> list[str]:
    """What is wrong with the files: something missing, too much, or not as the checkout would give it."""
    with zipfile.ZipFile(wheel) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    found = [f"{wheel.name}: no {name}" for name in WANTED if name not in content]
    found += [f"{wheel.name}: {name}" for name in content if name.startswith(NOT_WANTED)]
    if not any(name.endswith("/licenses/LICENSE") for name in content):
        found.append(f"{wheel.name}: no LICENSE")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    found += [f"{sdist.name}: no {name}" for name in ("LICENSE", "README.md", "CHANGELOG.md") if name not in packed]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder, str(ROOT)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as archive:
            direct = {name: archive.read(name) for name in archive.namelist()}
    if direct != content:
        differing = sorted(name for name in direct.keys() | content.keys() if direct.get(name) != content.get(name))
        found.append(f"the sdist does not give the wheel of the checkout: {', '.join(differing[:5])}")
    return found


def tag_here() -> str | None:
    """The tag of this commit, if there is one."""
    command = ["git", "describe", "--tags", "--exact-match"]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return outcome.stdout.strip() if outcome.returncode == 0 else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    output: Path = parser.parse_args(arguments).output
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    tag = tag_here()
    wrong = problems(__version__, changelog, tag)
    if not wrong:
        shutil.rmtree(output, ignore_errors=True)
        sdist, wheel = build(output)
        wrong = check(sdist, wheel)
    if wrong:
        raise SystemExit("\n".join(wrong))
    (output / "NOTES.md").write_text(notes(__version__, changelog), encoding="utf-8")
    print("\n".join(str(path) for path in sorted(output.iterdir())))
    print(f"released as {tag}" if tag else "a rehearsal: this commit has no tag")


if __name__ == "__main__":
    main()
