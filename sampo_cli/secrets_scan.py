"""Tokens, keys and passwords: found in files that are going to be published, and masked in text that is shown.

They are known by their forms, by the names beside them, and by being in this process's environment; what has none of
these is not found. A finding says where a secret is and of which kind, never what it is.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TEXT_FILES = (".json", ".md", ".yaml", ".yml", ".txt", ".jinja", ".py", "")
SHORTEST_VALUE = 8

_BY_NAME = ("a key or token by its name", "a password by its name")
"""Kinds that say less than a form; not told of a line where a form was found."""

# Kind, form, and what every one of them contains: files are large and secrets rare, so that is looked for first.
_FORMS = tuple(
    (kind, re.compile(form), pieces.split())
    for kind, form, pieces in (
        ("a Hugging Face token", r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}", "hf_ api_org_"),
        ("an API key", r"\bsk-(?:[A-Za-z0-9]+-)*[A-Za-z0-9_]{20,}", "sk-"),
        ("an AWS access key", r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b", "AKIA ASIA"),
        ("a GitHub token", r"\b(?:gh[pousr]|github_pat)_\w{22,}", "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_"),
        ("a GitLab token", r"\bglpat-[\w-]{20,}", "glpat-"),
        ("a Slack token", r"\bxox[a-z]-[A-Za-z0-9-]{10,}", "xox"),
        ("a Google API key", r"\bAIza[\w-]{35}", "AIza"),
        ("a private key", r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY", "PRIVATE"),
        ("a password in a URL", r"(?<=://)[^\s/:@\"']*:[^\s/:@\"']+(?=@)", "://"),
        (
            _BY_NAME[0],
            r"(?i)(?:api|access|auth|secret|private|client)[_-]?(?:key|token|secret)[\"']?\s*[:=]\s*[\"']?"
            r"(?=[\w/+.-]*\d)[\w/+.-]{16,}",
            "",
        ),
        (_BY_NAME[1], r"(?i)passw(?:or)?d[\"']?\s*[:=]\s*[\"'][^\"'\s]{6,}[\"']", ""),
    )
)
_SECRET_NAME = re.compile(r"(?:^|_)(?:KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
_PREFIX = re.compile(r"[A-Za-z]{2,4}[-_]")


@dataclass(frozen=True)
class Finding:
    """What looks like a secret: the file's path in the repository, the line from 1, which kind it seems to be."""

    path: str
    line: int
    kind: str

    def describe(self) -> str:
        """One line for people."""
        return f"{self.path}:{self.line} looks like {self.kind}"


def scan(files: Iterable[tuple[str, Path | bytes]]) -> list[Finding]:
    """Findings in the text files among (path, file or content), in their order, each line and kind once."""
    found: list[Finding] = []
    for name, source in files:
        if Path(name).suffix.lower() in TEXT_FILES:
            content = source if isinstance(source, bytes) else source.read_bytes()
            text = content.decode("utf-8", errors="replace")
            places = {(text.count("\n", 0, match.start()) + 1, kind) for kind, match in _matches(text)}
            by_form = {line for line, kind in places if kind not in _BY_NAME}
            told = (place for place in sorted(places) if place[0] not in by_form or place[1] not in _BY_NAME)
            found += [Finding(name, line, kind) for line, kind in told]
    return found


def mask(text: str) -> str:
    """The text without secrets that are known by their form, or by value from the environment or `hf auth login`."""
    for value in _known_values():
        text = text.replace(value, _hidden(value))
    for _, match in list(_matches(text)):
        text = text.replace(match.group(), _hidden(match.group()))
    return text


def _matches(text: str) -> Iterator[tuple[str, re.Match[str]]]:
    for kind, form, pieces in _FORMS:
        if not pieces or any(piece in text for piece in pieces):
            for match in form.finditer(text):
                yield kind, match


def _hidden(secret: str) -> str:
    prefix = _PREFIX.match(secret)
    return f"{prefix.group() if prefix else ''}…"


def _known_values() -> list[str]:
    """Secrets of this process, longest first. A token from a file counts only if the Hub's client was loaded."""
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    if "huggingface_hub" in sys.modules:
        values.add(_token_from_file())
    return sorted((value for value in values if len(value) >= SHORTEST_VALUE), key=len, reverse=True)


@cache
def _token_from_file() -> str:
    """What `hf auth login` wrote. Read once: texts are masked far more often than anybody logs in."""
    from huggingface_hub import constants

    try:
        return Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
