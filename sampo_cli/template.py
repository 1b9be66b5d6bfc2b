"""Conversations to token ids, through the tokenizer's chat template.

Nothing here reads data or cuts it to a length. What is guaranteed for each encoded pair: special tokens come from
the template only; the prompt's tokens begin the tokens of prompt + response; a response ends with one end-of-turn
token and nothing after it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sampo_cli.config import DataConfig, ModelConfig
from sampo_cli.errors import ModelError, UsageError
from sampo_cli.formats import Conversation, Message, Unusable
from sampo_cli.remote import fetch_model, first_line
from sampo_cli.special_tokens import SpecialTokens, tokenize
from sampo_cli.trust import check_templates, does_not_load

PLAIN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{%- if message['role'] == 'assistant' -%}{{ eos_token }}{%- endif -%}"
    "{{ '\\n\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Assistant:\\n' }}{%- endif -%}"
)
"""For a tokenizer without a template: a heading per turn, the end-of-text token after each answer."""

_BOS = "{{ bos_token }}"

NOT_A_PREFIX = "prompt is not a prefix"
_QUESTION: Message = {"role": "user", "content": "QUESTION"}
_ANSWER: Message = {"role": "assistant", "content": "ANSWER"}
_OTHER = "give another one with data.chat_template"
_STRFTIME = re.compile(r"""strftime_now\(\s*(["'])((?:(?!\1).)*)\1\s*\)""")


@dataclass(frozen=True)
class Encoded:
    """Token ids of one pair; both responses follow the one prompt."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def load_tokenizer(model: ModelConfig, data: DataConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a chat template: its own, `data.chat_template`, or `PLAIN_TEMPLATE`.

    Raises:
        ModelError, HubError: no such model, transformers cannot load its tokenizer, or it would write elsewhere.
        UsageError: the template file cannot be read.
    """
    folder = fetch_model(model.name, model.revision, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # whatever the tokenizer's own files make transformers raise
        what, reason = f"model '{model.name}'", f"its tokenizer does not load: {first_line(error)}"
        hint = "the folder needs tokenizer.json and tokenizer_config.json"
        raise does_not_load(what, folder, reason, hint, trusted=model.trust_remote_code) from error
    check_templates(f"model '{model.name}'", tokenizer.chat_template)
    if data.chat_template is not None:
        tokenizer.chat_template = _read_template(data.chat_template)
    elif not tokenizer.chat_template:
        tokenizer.chat_template = (_BOS if adds_bos(tokenizer) else "") + PLAIN_TEMPLATE
    return tokenizer


def uses_plain_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True where the model came without a template and got `PLAIN_TEMPLATE`: worth a warning."""
    return tokenizer.chat_template in (PLAIN_TEMPLATE, _BOS + PLAIN_TEMPLATE)


def never_ends(tokenizer: PreTrainedTokenizerBase, template_date: str) -> bool:
    """True where responses end in no special token, so that a model cannot learn from them where to stop."""
    encoder = PairEncoder(tokenizer, template_date)
    pair = encoder.encode([Conversation([_QUESTION], _ANSWER["content"], "OTHER")])[0]
    return isinstance(pair, Encoded) and not encoder.ends_in_special(pair.chosen)


def _read_template(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"data.chat_template {name}: {error}", hint="give a UTF-8 file with a Jinja template"
        ) from error


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True where the tokenizer itself puts its first token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]


class PairEncoder:
    """Renders and tokenises conversations in batches.

    Args:
        tokenizer: with a chat template.
        template_date: ISO date that the template prints as today's.

    Attributes:
        template: the chat template, with the date written into it.

    Raises:
        ModelError: the template cannot render a question and its answer.
        UsageError: no such date.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_date: str) -> None:
        self.tokenizer = tokenizer
        today = _parse_date(template_date)
        self.template = _dated(_template_of(tokenizer), today)
        self._date_string = today.strftime("%d %b %Y")  # the name and form of Llama 3's templates
        self._special = SpecialTokens(tokenizer)
        self._header = self._probe_header()
        self._folds_system = self._probe_system()

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded | Unusable]:
        """Token ids of each conversation, or why it cannot be used. One call to the tokenizer for all of them.

        A template that has no place for a system turn gets its text before the first question.
        """
        rendered = [self._render_pair(conversation) for conversation in conversations]
        plain = [pair.texts for pair in rendered if isinstance(pair, _Rendered) and not pair.literals]
        ids = iter(self._tokenized(plain))
        return [
            self._finish(pair, None if pair.literals else next(ids)) if isinstance(pair, _Rendered) else pair
            for pair in rendered
        ]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks.

        Raises:
            Unusable: the template refuses it, or special tokens in it cannot be read as text.
        """
        conversation, literals = self._special.hide(Conversation(list(messages), "", ""))
        text = self.text(conversation.prompt, add_generation_prompt=True)
        return self._special.tokenize_hidden([text], literals)[0] if literals else tokenize(self.tokenizer, [text])[0]

    def text(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """A conversation as the template writes it. Raises Unusable where it refuses the turns."""
        turns = _folded(list(messages)) if self._folds_system else list(messages)
        return self._render(turns, add_generation_prompt=add_generation_prompt)

    def ends_in_special(self, response: Sequence[int]) -> bool:
        return response[-1] in self._special.ids

    def _tokenized(self, pairs: Sequence[Sequence[str]]) -> list[list[list[int]] | Unusable]:
        """The ids of each pair's texts. One that the tokenizer refuses is looked for in the halves."""
        try:
            ids = iter(tokenize(self.tokenizer, [text for texts in pairs for text in texts]))
            return [[next(ids) for _ in texts] for texts in pairs]
        except Unusable as problem:
            if len(pairs) == 1:
                return [problem]
            half = len(pairs) // 2
            return [*self._tokenized(pairs[:half]), *self._tokenized(pairs[half:])]

    def _finish(self, pair: _Rendered, ids: list[list[int]] | Unusable | None) -> Encoded | Unusable:
        """The pair's ids: those of its texts, found out here if it needs special care."""
        try:
            whole = self._special.tokenize_hidden(pair.texts, pair.literals) if ids is None else ids
            if isinstance(whole, Unusable):
                return whole
            self._special.refuse_leaks(pair.texts, whole)
            prompt, chosen, rejected = whole[0], self._response(*whole[:2]), self._response(whole[0], whole[2])
            if chosen == rejected:
                raise Unusable("identical responses", "their tokens are the same")
            return Encoded(prompt, chosen, rejected)
        except Unusable as problem:
            return problem

    def _response(self, prompt: list[int], whole: list[int]) -> list[int]:
        """The tokens after the prompt's, which must begin `whole`."""
        if not prompt:
            raise Unusable("empty prompt", "it has no tokens")
        if whole[: len(prompt)] != prompt:
            raise Unusable(NOT_A_PREFIX, self._boundary(prompt, whole))
        response = whole[len(prompt) :]
        if self._special.ids.issuperset(response):
            raise Unusable("empty response", "it has no tokens")
        return response

    def _boundary(self, prompt: list[int], whole: list[int]) -> str:
        same = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
        near = slice(max(0, same - 2), same + 2)
        tokens = [self.tokenizer.convert_ids_to_tokens(ids[near]) for ids in (prompt, whole)]
        return f"where they part, it is {tokens[0]} alone and {tokens[1]} with the response"

    def _render_pair(self, conversation: Conversation) -> _Rendered | Unusable:
        try:
            conversation, literals = self._special.hide(conversation)
            prompt = self.text(conversation.prompt, add_generation_prompt=True)
            texts = [prompt]
            for answer in (conversation.chosen, conversation.rejected):
                whole = self.text([*conversation.prompt, {"role": "assistant", "content": answer}])
                texts.append(prompt + self._until_end(prompt, whole, answer))
            return _Rendered(texts, literals)
        except Unusable as problem:
            return problem

    def _until_end(self, prompt: str, whole: str, answer: str) -> str:
        """What the model is to say: from the prompt's end to the end-of-turn token after the answer."""
        if not whole.startswith(prompt):
            raise Unusable(NOT_A_PREFIX, f"the template writes the prompt differently: it ends in {prompt[-40:]!r}")
        said = whole[len(prompt) :]
        start = said.find(answer, len(self._header) if said.startswith(self._header) else 0)
        if start < 0:
            raise Unusable("template changes the answer")
        end = start + len(answer)
        end_of_turn = self._special.end_of_next(said, end)
        return said[:end_of_turn] if end_of_turn else said[:end] + (self.tokenizer.eos_token or "")

    def _render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                date_string=self._date_string,
            )
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            raise Unusable("template refuses the turns", first_line(error)) from error
        return str(text)

    def _probe_header(self) -> str:
        """What the template writes between the prompt and an answer. Raises ModelError where it cannot be used."""
        try:
            prompt = self._render([_QUESTION], add_generation_prompt=True)
            whole = self._render([_QUESTION, _ANSWER])
        except (Unusable, MemoryError) as error:
            reason = error.detail if isinstance(error, Unusable) else "it takes too much memory"
            raise ModelError(
                f"the chat template cannot render a question and its answer: {reason}", hint=_OTHER
            ) from error
        for text, message in ((prompt, _QUESTION), (whole, _QUESTION), (whole, _ANSWER)):
            if message["content"] not in text:
                raise ModelError(f"the chat template does not write what the {message['role']} says", hint=_OTHER)
        return whole[len(prompt) :].partition(_ANSWER["content"])[0] if whole.startswith(prompt) else ""

    def _probe_system(self) -> bool:
        """True where the template has no place for a system turn: it refuses it, or leaves it out."""
        try:
            return "SYSTEM" not in self._render([{"role": "system", "content": "SYSTEM"}, _QUESTION])
        except Unusable:
            return True


@dataclass(frozen=True)
class _Rendered:
    """Prompt, prompt + chosen, prompt + rejected as text; sentinel to the special token that it stands for."""

    texts: list[str]
    literals: dict[str, str]


def _folded(prompt: list[Message]) -> list[Message]:
    """The prompt with its system turns put before the first user turn's text."""
    system = [turn["content"] for turn in prompt if turn["role"] == "system"]
    rest = [turn for turn in prompt if turn["role"] != "system"]
    if not system:
        return prompt
    first = next((i for i, turn in enumerate(rest) if turn["role"] == "user"), 0)
    content = "\n\n".join([*system, rest[first]["content"]])
    return [*rest[:first], rest[first] | {"content": content}, *rest[first + 1 :]]


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ModelError(first_line(error), hint=_OTHER) from error


def _parse_date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise UsageError(f"data.template_date '{text}' is not a date", hint="write it as 2024-07-26") from error


def _dated(template: str, today: date) -> str:
    """The template with today's date written where it asks for it: `strftime_now` cannot be passed in."""
    try:
        return _STRFTIME.sub(lambda match: json.dumps(today.strftime(match.group(2))), template)
    except ValueError as error:
        raise ModelError(f"the chat template asks for a date that cannot be written: {error}", hint=_OTHER) from error
