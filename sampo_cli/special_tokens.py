"""Special tokens that a person wrote: `</s>` in a question about HTML stays the text `</s>`.

Before rendering, each one in a conversation is replaced by a private-use character. After it, the text is cut at the
special tokens that are left, which are the template's own, and the parts are tokenised as plain text with the
original strings back in place. Only conversations that contain one pay for this.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from sampo_cli.formats import Conversation, Unusable
from sampo_cli.remote import first_line

SPECIAL_IN_TEXT = "special token in text"

_SENTINELS = range(0xF0000, 0xFFFFE)  # supplementary private-use area A


class SpecialTokens:
    """The special tokens of a tokenizer: finding them in text, and keeping those of a person out of the ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        texts |= set(tokenizer.all_special_tokens)
        longest_first = sorted((text for text in texts if text.strip()), key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
        self.ids = frozenset(tokenizer.convert_tokens_to_ids(longest_first))
        self._control_ids = self.ids - {tokenizer.unk_token_id}
        self._any = re.compile(pattern)
        self._split = re.compile(f"({pattern})")
        self._next = re.compile(rf"\s*(?:{pattern})")

    def end_of_next(self, text: str, start: int) -> int | None:
        """Where the special token ends that follows `start`, white space between them allowed; None for no token."""
        match = self._next.match(text, start)
        return match.end() if match else None

    def hide(self, conversation: Conversation) -> tuple[Conversation, dict[str, str]]:
        """The conversation with a sentinel for each special token in its text, and what each sentinel stands for."""
        texts = [conversation.chosen, conversation.rejected, *(turn["content"] for turn in conversation.prompt)]
        found = sorted({literal for text in texts for literal in self._any.findall(text)})
        if not found:
            return conversation, {}
        used = set().union(*texts)
        free = (chr(code) for code in _SENTINELS if chr(code) not in used)
        sentinel_of = dict(zip(found, free, strict=False))
        if len(sentinel_of) < len(found):
            raise Unusable(SPECIAL_IN_TEXT, "no private-use character is left to stand for it")

        def hidden(text: str) -> str:
            return self._any.sub(lambda match: sentinel_of[match.group()], text)

        prompt = [turn | {"content": hidden(turn["content"])} for turn in conversation.prompt]
        replaced = Conversation(prompt, hidden(conversation.chosen), hidden(conversation.rejected))
        return replaced, {sentinel: literal for literal, sentinel in sentinel_of.items()}

    def tokenize_hidden(self, texts: Sequence[str], literals: Mapping[str, str]) -> list[list[int]]:
        """Ids of rendered texts in which sentinels stand for `literals`.

        That tokenising in parts gives what the tokenizer gives for the whole is checked on the same texts with the
        sentinels left in.

        Raises:
            Unusable: it does not, for this tokenizer.
        """
        whole = tokenize(self._tokenizer, texts)
        for guard in ("", "\n"):
            if self._in_parts(texts, guard, {}) == whole:
                return self._in_parts(texts, guard, literals)
        raise Unusable(SPECIAL_IN_TEXT, ", ".join(list(literals.values())[:5]))

    def _in_parts(self, texts: Sequence[str], guard: str, literals: Mapping[str, str]) -> list[list[int]]:
        """Ids of the parts between special tokens, one after the other, for each text.

        `guard` is put before each part and its tokens are taken away again: some tokenizers put a space before the
        first word of a text, but not before the first one after a special token.
        """
        split = [self._split.split(text) for text in texts]
        plain = list(dict.fromkeys(part for parts in split for part in parts[::2] if part))
        guarded = tokenize(self._tokenizer, [guard, *(guard + _restored(part, literals) for part in plain)], plain=True)
        ids_of = {part: ids[len(guarded[0]) :] for part, ids in zip(plain, guarded[1:], strict=True)} | {"": []}
        special = {text: [self._tokenizer.convert_tokens_to_ids(text)] for parts in split for text in parts[1::2]}
        return [
            [id for index, part in enumerate(parts) for id in (special if index % 2 else ids_of)[part]]
            for parts in split
        ]

    def refuse_leaks(self, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> None:
        """Check that rendered texts have no more special tokens as ids than they have as text.

        A tokenizer may make one of what a person wrote although its text is nowhere to be seen (a full-width `＜/s＞`
        that is normalised to `</s>`), or although it was asked to read it as text (where it is a plain word, too).
        """
        for text, row in zip(texts, ids, strict=True):
            found = [id for id in row if id in self._control_ids]
            written = self._any.findall(text)
            if len(found) > len(written):
                leaked = Counter(self._tokenizer.convert_ids_to_tokens(found)) - Counter(written)
                raise Unusable(SPECIAL_IN_TEXT, f"it is read as {', '.join(sorted(leaked))}")


def _restored(text: str, literals: Mapping[str, str]) -> str:
    return re.sub("|".join(literals), lambda match: literals[match.group()], text) if literals else text


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, plain: bool = False) -> list[list[int]]:
    """Ids of each text, nothing added; with `plain`, special tokens in it are plain text.

    Raises:
        Unusable: the tokenizer raised an error, for example because it has no token for unknown words.
    """
    if not texts:
        return []
    try:
        encoding = tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=plain,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
    except MemoryError:
        raise
    except Exception as error:  # a tokenizer may raise anything
        raise Unusable("tokenizer refuses the text", first_line(error)) from error
    ids: list[list[int]] = encoding["input_ids"]
    return ids
