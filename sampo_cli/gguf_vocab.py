"""A fast tokenizer as the vocabulary of a GGUF file.

llama.cpp has its own tokenizers, so only those that it is known to do alike are written: byte-level BPE whose splitting
rule it has a name for, and BPE made of a SentencePiece vocabulary. All of it is read off the tokenizer's own rules,
nothing from its name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sampo_cli.errors import ModelError
from sampo_cli.fingerprint import read_json

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_SPLITS = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (_LLAMA3,): "llama-bpe",
    (_LLAMA3.replace("{1,3}", ""),): "qwen2",
}
"""How a byte-level tokenizer cuts text before it merges -> what llama.cpp calls it (`tokenizer.ggml.pre`)."""

_IGNORES_MERGES = {"llama-bpe"}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"


def write_vocab(writer: Any, folder: Path, tokenizer: Any, size: int) -> None:
    """Add everything that llama.cpp's tokenizer needs: tokens, merges or scores, special tokens, the chat template.

    Args:
        writer: a `gguf.GGUFWriter`.
        folder: of the model, for tokenizer.json and the chat template.
        tokenizer: its tokenizer, loaded.
        size: rows of its embedding; ids that the tokenizer does not use are filled up.

    Raises:
        ModelError: llama.cpp has no such tokenizer, as far as is known here.
    """
    import gguf

    rules = read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
    pieces = _is_pieces(folder, rules)
    tokens, kinds = _tokens(tokenizer, size, pieces=pieces)
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else _split(folder, rules))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if pieces:
        writer.add_token_scores(_scores(rules, tokens))
        writer.add_add_space_prefix(str((tokenizer.tokenize("a") or [""])[0]).startswith(_SPACE))
    special = gguf.SpecialVocab(folder, load_merges=not pieces, n_vocab=size)
    ids = tokenizer("a").input_ids
    special.add_special_token = {"bos": ids[0] == tokenizer.bos_token_id, "eos": ids[-1] == tokenizer.eos_token_id}
    special.add_to_gguf(writer, quiet=True)


def _unknown(folder: Path, reason: str) -> ModelError:
    return ModelError(
        f"{folder}: its tokenizer is not one that can be written here: {reason}",
        hint="install llama.cpp, whose converter knows more of them, or give its folder with --llama-cpp",
    )


def _is_pieces(folder: Path, rules: dict[str, Any]) -> bool:
    """True for a SentencePiece vocabulary, False for byte-level BPE."""
    model = rules.get("model") or {}
    if model.get("type") != "BPE" or not model.get("merges"):
        raise _unknown(folder, f"its kind is {str(model.get('type'))[:40]!r}")
    if not model.get("byte_fallback"):
        return False
    steps = _steps(rules.get("normalizer"), "normalizers") + _steps(rules.get("pre_tokenizer"), "pretokenizers")
    known = {"Prepend", "Replace", "Metaspace"}
    foreign = [str(step.get("type")) for step in steps if step.get("type") not in known]
    if foreign:
        raise _unknown(folder, f"it uses {foreign[0][:40]!r}")
    return True


def _steps(rule: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence, one, or none."""
    return [] if rule is None else rule[key] if rule.get("type") == "Sequence" else [rule]


def _split(folder: Path, rules: dict[str, Any]) -> str:
    """llama.cpp's name of the rule that cuts text."""
    found = []
    for step in _steps(rules.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "ByteLevel" and not step.get("add_prefix_space", True):
            found += ["bytes"] if step.get("use_regex", True) else []
        elif step["type"] == "Digits" and step.get("individual_digits"):
            found.append("digits")
        else:
            found.append(str(step.get("pattern", {}).get("Regex", step["type"])))
    name = _SPLITS.get(tuple(found))
    if name is None or bool(rules["model"].get("ignore_merges")) != (name in _IGNORES_MERGES):
        raise _unknown(folder, f"it cuts text by {json.dumps(found)[:200]}")
    return name


def _tokens(tokenizer: Any, size: int, *, pieces: bool) -> tuple[list[str], list[int]]:
    """Text and kind of every token, in the order of their ids."""
    from gguf import TokenType

    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for index in range(size):
        text = texts.get(index)
        if text is None:
            kind, text = TokenType.UNUSED, f"[PAD{index}]"
        elif pieces and index == tokenizer.unk_token_id:
            kind = TokenType.UNKNOWN
        elif index in added:
            control = added[index].special or (text.startswith("<|") and text.endswith("|>"))
            kind = TokenType.CONTROL if control else TokenType.USER_DEFINED
            text = text if control else text.replace(_SPACE, " ")
        else:
            kind = TokenType.BYTE if pieces and _BYTE.fullmatch(text) else TokenType.NORMAL
        tokens.append(text)
        kinds.append(int(kind))
    return tokens, kinds


def _scores(rules: dict[str, Any], tokens: list[str]) -> list[float]:
    """What llama.cpp merges first: the token that tokenizer.json's merges make first has the highest score."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(rules["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        first.setdefault(left + right, rank)
    return [-float(first.get(text, len(first))) for text in tokens]
