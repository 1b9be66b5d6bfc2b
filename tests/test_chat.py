"""Talking with a run: both sides, what is kept of a conversation, commands, scripts."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sampo_cli.commands_chat import _fit_to_show
from sampo_cli.dialogue import Chat
from sampo_cli.errors import ExitCode, UsageError
from sampo_cli.generate import Decoding, answer
from sampo_cli.model import context_length
from sampo_cli.policy import reference
from sampo_cli.subject import find_subject, load_subject
from sampo_cli.template import PairEncoder, load_tokenizer
from tests.hostile_files import main
from tests.merge_models import save_adapter


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("talk") / "adapter", tiny_llama)


def start(name: Path, *, tokens: int = 8, temperature: float = 0.0, system: str | None = None) -> Chat:
    found = find_subject(str(name))
    tokenizer = load_tokenizer(found.recipe.model, found.recipe.data)
    policy = load_subject(found)
    encoder = PairEncoder(tokenizer, found.recipe.data.template_date)
    context = context_length(policy.causal_lm.config)
    return Chat(policy, encoder, Decoding(tokens, temperature, 0), context, found.adapter is not None, system)


def said(talk: Chat, text: str, *sides: Any) -> list[str]:
    return [reply.text for reply in talk.ask(text, sides, lambda side: lambda piece: None)]


def test_each_side_answers_as_it_does_elsewhere(adapter: Path) -> None:
    """Alone and greedy: what `generate.answer` gives with the adapter, and with it switched off."""
    talk = start(adapter)
    tokenizer = talk.encoder.tokenizer
    expected = [answer(talk.policy, tokenizer, ["Why?"], max_new_tokens=8)[0].text]
    with reference(talk.policy):
        expected.append(answer(talk.policy, tokenizer, ["Why?"], max_new_tokens=8)[0].text)
    assert said(talk, "Why?", "adapter", "base") == expected
    assert expected[0] != expected[1]


def test_pieces_are_the_answer(adapter: Path) -> None:
    pieces: dict[str, list[str]] = {"adapter": [], "base": []}
    replies = start(adapter).ask("Why?", ("adapter", "base"), lambda side: pieces[side].append)
    assert ["".join(pieces[reply.side]).strip() for reply in replies] == [reply.text for reply in replies]


def test_the_conversation_goes_on_until_it_is_reset(adapter: Path, tmp_path: Path) -> None:
    talk = start(adapter, system="Be brief")
    first = said(talk, "one", "adapter", "base")
    assert talk.turns == [{"role": "user", "content": "one"}, {"role": "assistant", "content": first[0]}]
    second = said(talk, "one", "adapter")
    talk.save(tmp_path / "talk.json")
    turns = json.loads((tmp_path / "talk.json").read_text())
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert turns[-1]["content"] == second[0]
    with pytest.raises(UsageError, match="already there"):
        talk.save(tmp_path / "talk.json")
    talk.reset()
    assert said(talk, "one", "adapter") == first[:1]


def test_the_system_turn_and_the_turns_before_are_in_the_prompt(adapter: Path) -> None:
    talk = start(adapter, system="Be brief")
    talk.turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    ids: list[list[int]] = []
    whole = talk._reply
    talk._reply = lambda given, side, write: (ids.append(given), whole(given, side, write))[1]  # type: ignore[method-assign]
    said(talk, "<|im_end|>", "base")
    turns = [{"role": "system", "content": "Be brief"}, *talk.turns[:2]]
    text = talk.encoder.tokenizer.decode(ids[0])
    assert text.startswith(talk.encoder.tokenizer.apply_chat_template(turns, tokenize=False))
    assert text.endswith("user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n")
    end = talk.encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids[0].count(end) == 4, "what a person types is text, and ends no turn"


def test_drawn_answers_follow_the_seed_and_differ_from_turn_to_turn(adapter: Path) -> None:
    one, two = (start(adapter, tokens=16, temperature=1.5) for _ in range(2))
    first = said(one, "x", "base")
    assert said(two, "x", "base") == first
    one.reset()
    assert said(one, "x", "base") == first


def test_a_base_alone_has_no_adapter(tiny_llama: Path) -> None:
    talk = start(tiny_llama)
    assert said(talk, "x", "base")
    with pytest.raises(UsageError, match="there is no adapter"):
        said(talk, "x", "adapter")


def test_a_conversation_that_is_too_long(tiny_llama: Path) -> None:
    talk = start(tiny_llama, tokens=10_000)
    talk.turns = [{"role": "user", "content": "x" * 470}, {"role": "assistant", "content": "y"}]
    (reply,) = talk.ask("x", ("base",), lambda side: lambda piece: None)
    assert reply.tokens <= 512 - 470
    talk.turns[0] = {"role": "user", "content": "x" * 600}
    with pytest.raises(UsageError, match="the model takes 512"):
        said(talk, "x", "base")


def test_nothing_that_a_terminal_obeys() -> None:
    assert _fit_to_show("a\x1b[31m\tb\n\x07") == "a�[31m\tb\n�"


# The command ----------------------------------------------------------------------------------------------------------


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[Any, str, str]:
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["chat", *map(str, arguments)])
    return end.value.code, *capfd.readouterr()


def test_a_prompt_for_scripts(
    adapter: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (adapter, "--max-new-tokens", 8)
    code, out, _ = run(capfd, *flags, "--prompt", "Why?", "--json", "--side", "both")
    assert code == ExitCode.OK
    found = json.loads(out)
    assert found["prompt"] == "Why?"
    assert [one["side"] for one in found["answers"]] == ["adapter", "base"]
    code, out, err = run(capfd, *flags, "--prompt", "Why?", "--quiet")
    assert (code, out.strip()) == (ExitCode.OK, _fit_to_show(found["answers"][0]["text"]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?"))
    assert run(capfd, *flags, "--side", "base", "--quiet")[1].strip() == _fit_to_show(found["answers"][1]["text"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    code, _, err = run(capfd, *flags)
    assert code == ExitCode.USAGE
    assert "the prompt is empty" in err


def test_wrong_input(tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(capfd, tmp_path / "nothing", "--prompt", "x")[0] == ExitCode.MODEL
    code, out, err = run(capfd, tiny_llama, "--prompt", "x", "--side", "both")
    assert (code, out) == (ExitCode.USAGE, "")
    assert "there is no adapter" in err


@pytest.mark.slow
def test_a_terminal(adapter: Path, tmp_path: Path) -> None:
    """Commands, a wrong one, Ctrl-C while it answers, and the end of the input."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "sampo_cli", "chat", str(adapter), "--max-new-tokens", "6"]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, start_new_session=True)
    os.close(follower)

    def until(text: str) -> str:
        shown, began = "", time.monotonic()
        while text not in shown and time.monotonic() - began < 60:
            if select.select([leader], [], [], 0.1)[0]:
                shown += os.read(leader, 4096).decode(errors="replace")
        assert text in shown, shown
        return shown

    def type_in(line: str) -> None:
        os.write(leader, f"{line}\n".encode())

    try:
        until("adapter>")
        type_in("hello")
        assert "tokens" in until("adapter>")
        type_in("/both")
        until("both>")
        type_in("again")
        until("base 6 tokens")
        type_in("/sav")
        until("did you mean '/save'?")
        type_in(f"/save {tmp_path / 'talk.json'}")
        until("both>")
        os.write(leader, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.send_signal(signal.SIGKILL)
        os.close(leader)
    assert len(json.loads((tmp_path / "talk.json").read_text())) == 4
