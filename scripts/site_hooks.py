"""What the documentation site needs beside docs/: files at the top of the checkout as pages, recipes, links to them.

mkdocs calls these (mkdocs.yml, `hooks`). Pages are written for the code host, where `../CONTRIBUTING.md` leads out of
docs/; in the site those files are pages of their own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
TOP_FILES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
TOP_LINKS = TOP_FILES | {"README.md": "index.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the files at the top as pages, and the recipes as they are."""
    for name, page in TOP_FILES.items():
        text = from_top((ROOT / name).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    for path in sorted((ROOT / "recipes").rglob("*.yaml")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of docs/ to the pages that those files are here."""
    for name, page in TOP_LINKS.items():
        markdown = re.sub(rf"\]\(\.\./{re.escape(name)}(#[^)]*)?\)", rf"]({page}\1)", markdown)
    return markdown.replace("](../recipes/", "](recipes/")


def from_top(markdown: str) -> str:
    """A page of the top as if it lay in docs/."""
    markdown = re.sub(r"\]\(docs/", "](", markdown)
    for name, page in TOP_LINKS.items():
        markdown = re.sub(rf"\]\({re.escape(name)}(#[^)]*)?\)", rf"]({page}\1)", markdown)
    return markdown
