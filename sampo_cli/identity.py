"""What a resumed run must find as it was: short descriptions by name, and recipes compared key by key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from sampo_cli.dataset import PairDataset
from sampo_cli.policy import Policy
from sampo_cli.reference import adapter_digest


def identity_of(
    dataset: PairDataset, tokenizer: PreTrainedTokenizerBase, base_fingerprint: str, policy: Policy
) -> dict[str, str]:
    """What everything that a run's numbers depend on is, its recipe aside. `policy` as it was loaded.

    The tokenizer and the template are part of what "the data" stands for, and are named so that a difference says
    which of them it is.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return {
        "the base": base_fingerprint,
        "the adapter that it goes on from": adapter_digest(policy),
        "the tokenizer": f"{len(vocabulary):,} tokens, {_short(vocabulary)}",
        "the chat template": _short(tokenizer.chat_template),
        "the data": f"{len(dataset):,} pairs, {dataset.fingerprint}",
    }


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def recipe_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys ("section.key") whose values differ between two dumped recipes, with both values."""
    return {
        f"{section}.{key}": (before[section][key], value)
        for section, values in after.items()
        for key, value in values.items()
        if before[section][key] != value
    }


def change_lines(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """A line each, as a person reads it."""
    return [f"{key}: {_shown(old)} → {_shown(new)}" for key, (old, new) in changes.items()]


def _shown(value: Any) -> str:
    return "empty" if value is None else str(value)
