"""The documentation site: it builds without a warning, its links lead somewhere, and it fetches nothing."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from sampo_cli import cli
from sampo_cli.config import Recipe
from sampo_cli.method_table import METHODS
from scripts import make_figures
from scripts.make_reference import commands

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MOST_PICTURE_BYTES = 200 * 1024
ELSEWHERE = ("http://", "https://", "//", "data:", "mailto:")


class Page(HTMLParser):
    """What an HTML page links to, what it loads, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.without_alt: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in ("script", "img", "iframe", "source") and "src" in found:
            self.loaded.append(found["src"])
        if tag == "link" and "href" in found and found.get("rel") not in ("next", "prev", "canonical"):
            self.loaded.append(found["href"])
        if tag == "img" and not found.get("alt"):
            self.without_alt.append(found.get("src", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    if find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed (the extra 'docs')")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    outcome = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert "WARNING" not in outcome.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def test_every_page_is_in_the_site(pages: dict[Path, Page]) -> None:
    built = {path.name for path in pages}
    assert {f"{path.stem}.html" for path in DOCS.glob("*.md")} | {"changelog.html", "contributing.html"} <= built


def test_links_of_the_site_lead_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # its links are from the site's root, wherever that will be
        for link in page.links:
            if link.startswith(ELSEWHERE):
                continue
            name, anchor = urldefrag(unquote(link))
            target = (path.parent / name).resolve() if name else path
            known = pages[target].anchors if target in pages else set()
            if not target.exists() or (anchor and anchor not in known and target.suffix == ".html"):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken


def test_the_site_fetches_nothing_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert not [address for address in page.loaded if address.startswith(ELSEWHERE)], path.name
    for sheet in [*site.rglob("*.css"), *site.rglob("*.svg")]:
        assert not re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_pictures_have_a_text_and_are_small(pages: dict[Path, Page]) -> None:
    assert {path.name: page.without_alt for path, page in pages.items() if page.without_alt} == {}
    for picture in (DOCS / "images").iterdir():
        assert picture.stat().st_size < MOST_PICTURE_BYTES, picture.name


def test_every_picture_is_on_a_page() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *DOCS.rglob("*.md")])
    assert [path.name for path in (DOCS / "images").iterdir() if f"images/{path.name}" not in text] == []


# --- How SamPO works: pictures and numbers ------------------------------------------------------------------------


def test_the_numbers_of_the_page_are_those_that_are_computed() -> None:
    """For instance: T_m / T = 10 / 26 = 0.38; beta * 0.05 * (600 - 200) = 0.1 * 20 = +2.0 of DPO where r is equal."""
    page = (DOCS / "how-sampo-works.md").read_text(encoding="utf-8")
    facts = make_figures.facts()
    assert facts["DPO, nothing learned, 600 tokens"] == f"{0.1 * 0.05 * (600 - 200):+.1f}"
    assert facts["SamPO, learned, 600 tokens"] == f"{0.1 * 2 * 0.05 * 200:+.1f}"
    assert facts["deviation, paired"] == "0"
    missing = {name: value for name, value in facts.items() if not re.search(rf"(?<![\d.]){re.escape(value)}\b", page)}
    assert not missing, "correct docs/how-sampo-works.md"


@pytest.mark.parametrize("name", make_figures.FIGURES)
def test_pictures_are_what_the_functions_draw(name: str) -> None:
    """Compared where matplotlib is the version that drew them; others place text a little differently."""
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    if version("matplotlib") != pinned["matplotlib"]:
        pytest.skip(f"matplotlib {version('matplotlib')}, and the pictures are of {pinned['matplotlib']}")
    written = (make_figures.IMAGES / f"{name}.svg").read_text(encoding="utf-8")
    assert written == make_figures.picture(name), "run: python -m scripts.make_figures"


# --- Tables that name the program's words -------------------------------------------------------------------------


def table_rows(page: str, section: str = "") -> Iterator[list[str]]:
    """Cells of a page's table rows without the headings, under a heading or on the whole page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    if section:
        text = re.split(r"^## ", text.split(f"\n## {section}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    for line, after in zip(text.splitlines(), [*text.splitlines()[1:], ""], strict=True):
        if line.startswith("|") and not line.startswith(("|---", "| ---")) and not after.startswith(("|---", "| ---")):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def said() -> list[str]:
    """Every text in the package, with a NUL where it has a value put in."""
    found = []
    for path in (ROOT / "sampo_cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_messages_of_troubleshooting_are_the_programs() -> None:
    texts = said()
    quoted = [row[0].strip("`") for row in table_rows("troubleshooting.md")]
    assert len(quoted) > 40
    for message in quoted:
        pattern = ".*?".join(re.escape(part) for part in message.split("…"))
        assert any(re.search(pattern, text, re.DOTALL) for text in texts), message


def ours() -> set[str]:
    """Every flag, recipe key and command."""
    names = {f"sampo {name}" for name in commands()}
    for command in commands().values():
        names |= {option for parameter in command.params for option in getattr(parameter, "opts", [])}
    for section, field in Recipe.model_fields.items():
        names |= {f"{section}.{key}" for key in field.annotation.model_fields}
    return names


def test_what_other_tools_settings_become_exists() -> None:
    assert cli.app.registered_commands
    known = ours()
    rows = list(table_rows("coming-from.md"))
    assert len(rows) > 80
    for row in rows:
        for name in re.findall(r"`([^`]+)`", row[1]):
            flag, _, value = name.partition(" ") if name.startswith("--") else (name.partition(":")[0], "", "")
            assert flag in known, row
            assert not value or value in METHODS, row


def test_trls_settings_are_trls() -> None:
    """Against the installed trl: the fields of DPOConfig, ScriptArguments and ModelConfig, and the names of losses."""
    trl = pytest.importorskip("trl", reason="trl is not installed (the extra 'dev')")
    fields = {
        field.name
        for kind in (trl.DPOConfig, trl.ScriptArguments, trl.ModelConfig)
        for field in dataclasses.fields(kind)
    }
    losses = set(re.findall(r"'(\w+)'", trl.DPOConfig.__doc__.partition("loss_type (")[2].partition("loss_weights")[0]))
    named = defaultdict(list)
    for row in table_rows("coming-from.md", "From trl"):
        for name in re.findall(r"`([^`]+)`", row[0]):
            field, _, value = name.partition("=")
            named[field] += re.findall(r"\w+", value)
    assert len(named) > 40
    assert set(named) <= fields, set(named) - fields
    assert set(named["loss_type"]) <= losses, set(named["loss_type"]) - losses
