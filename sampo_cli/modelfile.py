"""An Ollama Modelfile for a GGUF file, with the chat template as a Go template.

Ollama does not run the Jinja template in a GGUF file. What it is to write is found by rendering conversations and
cutting them at what was said, which gives what stands before and after each turn; then other conversations are put
together from these pieces and compared with what the template writes. A template that is more than such pieces gets
none, so that a wrong one is never written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from sampo_cli.formats import Message, Unusable
from sampo_cli.template import PairEncoder, adds_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUOTES = '"""'
"""What stands around a text in a Modelfile, and so cannot be in it."""

_SYSTEM, _QUESTIONS, _ANSWERS = "Be<1>", ("Why<2>?", "How<4>?", "Who<6>?"), ("So<3>.", "Yes<5>.")

# Go's braces are doubled for str.format. An answer that the model is to go on with is the last turn, and stays open.
_GO = (
    "{lead}{head}{{{{ range $i, $_ := .Messages }}}}{{{{ $last := eq (len (slice $.Messages $i)) 1 }}}}{own}"
    '{{{{ if eq .Role "user" }}}}{before}{folded}{{{{ .Content }}}}{after}{{{{ end }}}}'
    '{{{{ if eq .Role "assistant" }}}}{opened}{{{{ .Content }}}}{{{{ if not $last }}}}{closed}{{{{ end }}}}'
    "{{{{ end }}}}"
    '{{{{ if and $last (ne .Role "assistant") }}}}{reply}{{{{ end }}}}{{{{ end }}}}'
)


@dataclass(frozen=True)
class Turns:
    """A chat template as pieces of text.

    Attributes:
        lead: before everything: the first token, where the tokenizer does not put it there itself.
        head: after it where there is no turn of the system: a template's own system text, for one.
        system: before and after the system's text.
        place: where the system's text goes: a turn of its own, or inside the first or the last question.
        user: before and after a question.
        answer: before and after an earlier answer.
        reply: what the model goes on from.
    """

    lead: str
    head: str
    system: tuple[str, str]
    place: Literal["own", "first", "last"]
    user: tuple[str, str]
    answer: tuple[str, str]
    reply: str

    @property
    def default_system(self) -> str | None:
        """The system text that the template writes where none is given, or None."""
        before, after = self.system
        inside = self.head.removeprefix(before).removesuffix(after)
        fits = self.place == "own" and self.head == f"{before}{inside}{after}"
        return inside if fits and inside.strip() else None

    def text(self, messages: Sequence[Message]) -> str:
        """A conversation up to where the model speaks, put together as the Go template does."""
        said = "".join(turn["content"] for turn in messages if turn["role"] == "system")
        turns = [turn for turn in messages if turn["role"] != "system"]
        system = f"{self.system[0]}{said}{self.system[1]}"
        parts = [system if said and self.place == "own" else self.head]
        for place, turn in enumerate(turns):
            if turn["role"] == "assistant":
                parts.append(f"{self.answer[0]}{turn['content']}{self.answer[1]}")
                continue
            folded = said and place == {"first": 0, "last": len(turns) - 1}.get(self.place)
            parts.append(f"{self.user[0]}{system if folded else ''}{turn['content']}{self.user[1]}")
        return self.lead + "".join(parts) + self.reply

    def go(self) -> str:
        """The same as a Go template over Ollama's `.Messages` and `.System`."""
        before, after = (_go(piece) for piece in self.system)
        place = {"first": "(eq $i 1)", "last": "$last"}.get(self.place)  # a system turn is the first of .Messages
        own = f'{{{{ if eq .Role "system" }}}}{before}{{{{ .Content }}}}{after}{{{{ end }}}}'
        folded = f"{{{{ if and $.System {place} }}}}{before}{{{{ $.System }}}}{after}{{{{ end }}}}"
        head = "" if self.default_system else _go(self.head)
        return _GO.format(
            lead=_go(self.lead),
            head=f"{{{{ if not .System }}}}{head}{{{{ end }}}}" if head and not place else head,
            own="" if place else own,
            folded=folded if place else "",
            before=_go(self.user[0]),
            after=_go(self.user[1]),
            opened=_go(self.answer[0]),
            closed=_go(self.answer[1]),
            reply=_go(self.reply),
        )


def _go(text: str) -> str:
    """Literal text in a Go template."""
    return text.replace("{{", '{{ "{{" }}')


def find_turns(tokenizer: PreTrainedTokenizerBase, template_date: str) -> Turns | None:
    """The pieces of a tokenizer's chat template, or None where it is more than pieces.

    Args:
        template_date: ISO date that the template prints as today's.
    """
    encoder, bos, adds = PairEncoder(tokenizer, template_date), str(tokenizer.bos_token or ""), adds_bos(tokenizer)
    try:
        whole = encoder.text(_conversation(None, _QUESTIONS[:2], _ANSWERS[:1]), add_generation_prompt=True)
        times = whole.count(bos) if bos and whole.startswith(bos) else 0
        if adds and times > 1:  # before every turn, as Llama 2 has it: the tokenizer would write the first one again
            return None
        first = bos if times == 1 else ""
        turns = _cut(encoder, first, lead="" if adds else first)
        same = all(
            (first if adds else "") + turns.text(said) == encoder.text(said, add_generation_prompt=True)
            for said in _checks()
        )
    except (Unusable, ValueError):
        return None
    return turns if same and _QUOTES not in f"{turns.go()}{turns.default_system}" else None


def _conversation(system: str | None, questions: Sequence[str], answers: Sequence[str]) -> list[Message]:
    turns: list[Message] = [{"role": "system", "content": system}] if system else []
    for place, question in enumerate(questions):
        turns.append({"role": "user", "content": question})
        turns += [{"role": "assistant", "content": answers[place]}] if place < len(answers) else []
    return turns


def _checks() -> list[list[Message]]:
    """Conversations other than those that the pieces were cut from."""
    texts = ("Was ist\nneu: 你好?", "{{ x }} $y", "It's 3."), ("First.\n\nThen.", "*No*")
    lengths = ((1, 0), (2, 1), (3, 2))
    return [_conversation(system, texts[0][:q], texts[1][:a]) for system in (None, "Short\nwords.") for q, a in lengths]


def _cut(encoder: PairEncoder, bos: str, lead: str) -> Turns:
    """The pieces, from what the template writes around texts that are in no template.

    Raises:
        Unusable, ValueError: it refuses a conversation, or one of them is not made of such pieces.
    """
    (first, second, _), (answer, _) = _QUESTIONS, _ANSWERS
    said = [first, answer, second]
    whole = encoder.text(_conversation(None, said[::2], [answer]), add_generation_prompt=True)
    start, between, again, end = _around(whole, said)
    user_end = _around(encoder.text(_conversation(None, [first], [])), [first])[-1]
    answer_end = _around(encoder.text(_conversation(None, [first], [answer])), [first, answer])[-1]
    if user_end == end:  # it does the same whether asked to let the model speak or not, as Llama 3's first template did
        answer_end = again.removesuffix(start.removeprefix(bos))
        user_end = answer_end if between == end and end.startswith(answer_end) else "" if between == end else end
    user_start = _after(again, answer_end)
    head = _before(_after(start, bos), user_start)
    pieces: dict[str, Any] = {
        "lead": lead,
        "head": head,
        "user": (user_start, user_end),
        "answer": (_after(between, user_end), answer_end),
        "reply": _after(end, user_end),
    }
    with_system = encoder.text(_conversation(_SYSTEM, said[::2], [answer]), add_generation_prompt=True)
    if with_system.index(_SYSTEM) > with_system.index(answer):
        *_, before, after, _ = _around(with_system, [first, answer, _SYSTEM, second])
        return Turns(system=(_after(before, answer_end + user_start), after), place="last", **pieces)
    before, after, *_ = _around(with_system.removeprefix(bos), [_SYSTEM, *said])
    if after.endswith(user_start):
        return Turns(system=(before, _before(after, user_start)), place="own", **pieces)
    return Turns(system=(_after(before, head + user_start), after), place="first", **pieces)


def _around(text: str, said: Sequence[str]) -> list[str]:
    """The text before, between and after what was said."""
    places = [0]
    for words in said:
        start = text.index(words, places[-1])
        places += [start, start + len(words)]
    cuts = [*places, len(text)]
    return [text[a:b] for a, b in list(pairwise(cuts))[::2]]


def _after(text: str, beginning: str) -> str:
    if not text.startswith(beginning):
        raise ValueError(text)
    return text[len(beginning) :]


def _before(text: str, ending: str) -> str:
    if not text.endswith(ending):
        raise ValueError(text)
    return text[: len(text) - len(ending)]


def modelfile(file: str, turns: Turns | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a Modelfile for a GGUF file beside it.

    Args:
        file: the GGUF file's name.
        turns: of its chat template; None writes no TEMPLATE, and Ollama takes what it recognises in the GGUF file.
    """
    lines = [f"FROM ./{file}"]
    if turns is None:
        lines.append("# No TEMPLATE: the chat template is more than turns with text around them.")
        lines.append("# Ollama recognises those of well-known models; see what it took: ollama show --template NAME")
    else:
        lines.append(f'TEMPLATE """{turns.go()}"""')
        if turns.default_system:
            lines.append(f'SYSTEM """{turns.default_system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in _stops(turns, tokenizer)]
    return "\n".join(lines) + "\n"


def _stops(turns: Turns | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special token that ends an answer, the one that begins a question, and the end of the text."""
    special = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = [str(tokenizer.eos_token)] if tokenizer.eos_token else []
    for piece in (turns.user[0], turns.answer[1]) if turns else ():
        first = min((token for token in special if token in piece), key=piece.index, default=None)
        found = [first, *found] if first else found
    return [stop for stop in dict.fromkeys(found) if '"' not in stop and stop.isprintable()]
