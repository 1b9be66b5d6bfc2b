"""The command to talk with what was trained: `sampo chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from sampo_cli import api_models, console
from sampo_cli.api_models import SIDES
from sampo_cli.errors import SampoError, UsageError, nearest
from sampo_cli.options import RUN, Debug, Json, Quiet, Set, SubjectAdapter, SubjectName, SubjectQuantization, option
from sampo_cli.trust import CONTROL

if TYPE_CHECKING:
    from sampo_cli.dialogue import Chat, Side, Write

HELP = {
    "/adapter": "answer with the adapter",
    "/base": "answer with the base alone",
    "/both": "answer with both, and show lengths; the adapter's answer goes on",
    "/system TEXT": "another system turn, and start again; without text, none",
    "/reset": "forget what was said",
    "/save FILE": "write the conversation as JSON",
    "/quit": "leave; so does Ctrl-D",
}


def chat(
    subject: SubjectName,
    adapter: SubjectAdapter = None,
    quantization: SubjectQuantization = None,
    prompt: Annotated[Optional[str], option("--prompt", "Answer this and leave; - for stdin.", RUN, "TEXT")] = None,
    side: Annotated[
        Literal["adapter", "base", "both"] | None, option("--side", "Who answers; the adapter if there is one.", RUN)
    ] = None,
    system: Annotated[Optional[str], option("--system", "A system turn.", RUN, "TEXT")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of an answer.")] = 1024,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of sampled answers.")] = 0,
    settings: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Talk with a run or a model, or answer one prompt."""
    asked = sys.stdin.read() if prompt == "-" or (prompt is None and not sys.stdin.isatty()) else prompt
    if asked is not None and not asked.strip():
        raise UsageError("nothing to answer: the prompt is empty", hint='--prompt "...", or text on stdin')
    if as_json and asked is None:
        raise UsageError("--json answers one prompt", hint="give --prompt, or text on stdin")
    talk = api_models.chat(
        subject,
        adapter=adapter,
        quantization=quantization,
        side=side,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        settings=settings,
    )
    if asked is None:
        _converse(talk)
    elif as_json:
        from sampo_cli.dialogue import to_dict

        console.print_json(to_dict(asked, talk.ask(asked)))
    else:
        _answer(talk, asked, lengths=not quiet)


def _answer(talk: Chat, text: str, *, lengths: bool) -> None:
    """Ask, and print answers as they come; with `lengths`, who says what and how long it was."""
    sides = talk.sides

    def write(one: Side) -> Write:
        if one != sides[0]:
            console.stdout.print("\n")
        if len(sides) > 1:
            console.stdout.print(f"{one}:", style="bold")
        return lambda piece: console.stdout.out(_fit_to_show(piece), end="", highlight=False)

    replies = talk.ask(text, write=write)
    console.stdout.print()
    if lengths:
        said = ", ".join(f"{reply.side} {reply.tokens} tokens{'' if reply.ended else ', cut off'}" for reply in replies)
        console.stderr.print(said, style="dim")


def _fit_to_show(piece: str) -> str:
    """A model may say anything, also what a terminal obeys."""
    return "".join(character if character in "\n\t" else CONTROL.sub("�", character) for character in piece)


def _converse(talk: Chat) -> None:
    """Turn after turn, until the end of the input."""
    console.stderr.print(f"{talk.name}: {_side(talk)} answers. {', '.join(HELP)}", markup=False, style="dim")
    while True:
        try:
            line = console.stderr.input(f"[bold]{_side(talk)}>[/] ").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                _command(talk, line)
            elif line:
                _answer(talk, line, lengths=True)
        except KeyboardInterrupt:
            console.stdout.print("\n(stopped; not part of the conversation)", style="dim")
        except SampoError as error:
            console.show_error(error)


def _side(talk: Chat) -> str:
    """Who answers, as `--side` calls it."""
    return "both" if len(talk.sides) > 1 else talk.sides[0]


def _command(talk: Chat, line: str) -> None:
    """Do what a line that begins with / says."""
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word[1:] in SIDES:
        if word != "/base" and not talk.has_adapter:
            raise UsageError("there is no adapter: this is a base alone")
        talk.sides = SIDES[word[1:]]
    elif word == "/system":
        talk.system = rest or None
        talk.reset()
    elif word == "/reset":
        talk.reset()
    elif word == "/save" and rest:
        talk.save(Path(rest).expanduser())
    elif word == "/help":
        console.print_facts("commands", HELP, console.stderr)
    else:
        raise UsageError(f"{word} is no command{nearest(word, [key.split()[0] for key in HELP])}", hint=" ".join(HELP))
