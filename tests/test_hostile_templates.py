"""Tokenizers without the usual tokens, and chat templates that are broken, odd or mean harm."""

from __future__ import annotations

import ast
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sampo_cli.config import DataConfig, ModelConfig
from sampo_cli.dataset import prepare
from sampo_cli.errors import ExitCode, ModelError
from sampo_cli.formats import Conversation, Unusable
from sampo_cli.template import Encoded, PairEncoder, load_tokenizer
from tests import tiny
from tests.reliability import record
from tests.test_cli import refuses, succeeds

__all__ = ["refuses"]  # a fixture

DATE = "2024-07-26"
HI = {"role": "user", "content": "Hi there"}
PAIR = Conversation([HI], "Four.", "No idea")


def encode(tokenizer: Any, *conversations: Conversation) -> list[Encoded | Unusable]:
    return PairEncoder(tokenizer, DATE).encode(conversations or [PAIR])


def model_folder(folder: Path, tokenizer: Any) -> Path:
    """What `sampo data` needs of a model: its configuration and its tokenizer."""
    tokenizer.save_pretrained(folder)
    tiny.CONFIGS["llama"]().save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    return load_tokenizer(ModelConfig(name=str(folder)), DataConfig(sources=["x"]))


# Tokenizers without --------------------------------------------------------------------------------------------------

NAMES = ("bos", "eos", "pad")
SUBSETS = [names for count in range(4) for names in itertools.combinations(NAMES, count)]


def without(*names: str, template: str | None) -> Any:
    tokenizer = tiny.make_tokenizer(template)
    for name in names:
        setattr(tokenizer, f"{name}_token", None)
    return tokenizer


@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
@pytest.mark.parametrize("template", [None, tiny.CHATML], ids=["plain", "chatml"])
def test_tokenizer_without(tmp_path: Path, names: tuple[str, ...], template: str | None) -> None:
    tokenizer = loaded(model_folder(tmp_path / "model", without(*names, template=template)))
    assert {name for name in NAMES if getattr(tokenizer, f"{name}_token") is None} == set(names)
    (pair,) = encode(tokenizer)
    assert isinstance(pair, Encoded)
    text = "Hi there<|im_end|>\n<|im_start|>assistant\n" if template else "### User:\nHi there\n\n### Assistant:\n"
    assert tokenizer.decode(pair.prompt).endswith(text)
    end = "<|im_end|>" if template or "eos" not in names else ""
    assert tokenizer.decode(pair.chosen) == f"Four.{end}"
    assert tokenizer.decode(pair.rejected) == f"No idea{end}"
    # a long prompt is cut behind its BOS where it has one, and without one from its first token
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "x" * 99, "chosen": "a", "rejected": "b"}))
    (cut,) = prepare(DataConfig(sources=[str(tmp_path / "a.jsonl")], max_length=40), tokenizer)
    assert len(cut.prompt) + max(len(cut.chosen), len(cut.rejected)) == 40
    assert (cut.prompt[0] == 1) == (template is not None and "bos" not in names)


@pytest.mark.slow
def test_training_without_any_of_them(tmp_path: Path) -> None:
    model = tiny.save_model(tiny.CONFIGS["llama"](), tmp_path / "model")
    without(*NAMES, template=None).save_pretrained(model)
    (model / "chat_template.jinja").unlink()
    data = tiny.write_pairs(tmp_path / "pairs.jsonl", 8)
    run = tmp_path / "run"
    outcome = succeeds(
        *("train", "--model", model, "--data", data, "--output", run, "--max-steps", 1, "--batch-pairs", 2)
    )
    assert "warning: the model has no chat template" in outcome.stderr
    assert "warning: neither the chat template nor the tokenizer has a token that ends a response" in outcome.stderr
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


def test_words_that_a_tokenizer_does_not_know(tmp_path: Path) -> None:
    """A word-level vocabulary without an unknown token raises an error; rows with its words are used all the same."""
    known = ["hi", "yes", "no", "user", "assistant", "QUESTION", "ANSWER", ":"]
    backend = Tokenizer(models.WordLevel({word: id for id, word in enumerate(known)}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    rows = [{"prompt": text, "chosen": "yes", "rejected": "no"} for text in ("hi", "hi there", "hi hi", "🙂", "yes")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = prepare(DataConfig(sources=[str(tmp_path / "a.jsonl")]), tokenizer)
    assert dataset.pair_ids.tolist() == [0, 2, 4]
    assert dataset.counts.dropped == {"tokenizer refuses the text": 2}


# Special tokens by another road --------------------------------------------------------------------------------------


def test_a_special_token_that_a_normaliser_makes() -> None:
    """Full-width letters that become `<|end|>` before special tokens are looked for."""
    backend = tiny.make_tokenizer().backend_tokenizer
    backend.normalizer = normalizers.NFKC()
    backend.add_special_tokens([AddedToken("<|end|>", special=True, normalized=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>")
    tokenizer.chat_template = tiny.CHATML
    wide = "\uff1c\uff5cend\uff5c\uff1e"
    assert tokenizer(wide).input_ids == [tokenizer.convert_tokens_to_ids("<|end|>")]
    found = encode(tokenizer, PAIR, Conversation([HI], f"Four {wide}", "No"), Conversation([HI], "wide \uff1c", "No"))
    assert [type(one) for one in found] == [Encoded, Unusable, Encoded]
    assert isinstance(found[1], Unusable)
    assert (found[1].reason, found[1].detail) == ("special token in text", "it is read as <|end|>")


def test_a_special_token_that_is_a_word_as_well() -> None:
    """A Unigram vocabulary has `</s>` as a word: reading it as text gives the token all the same."""
    letters = [(letter, -9.0) for letter in map(chr, range(32, 127))]
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *letters], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    assert tokenizer("</s>", split_special_tokens=True, add_special_tokens=False).input_ids == [1]
    found = encode(tokenizer, PAIR, Conversation([HI], "HTML has </s>", "No"), Conversation([HI], "Nein", "🙂 שלום"))
    assert [type(one) for one in found] == [Encoded, Unusable, Encoded]  # unknown words are no harm
    assert isinstance(found[1], Unusable)
    assert found[1].reason == "special token in text"


# Templates that do not do what they should ---------------------------------------------------------------------------

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
USELESS: dict[str, tuple[str, str]] = {
    "nothing": ("", "does not write what the user says"),
    "comment": ("{# nothing #}", "does not write what the user says"),
    "raises": ("{{ raise_exception('never') }}", "cannot render a question and its answer: never"),
    "syntax": ("{% for m in %}", "cannot render a question and its answer: "),
    "undefined": ("{{ messages.nothing.at_all }}", "cannot render a question and its answer: "),
    "no-answers": (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        "does not write what the assistant says",
    ),
    "no-questions": (
        "{% for m in messages if m.role != 'user' %}{{ m.content }}{% endfor %}",
        "does not write what the user says",
    ),
    "parts": (
        "{% for m in messages %}{% for part in m.content %}{{ part['text'] }}{% endfor %}{% endfor %}",
        "does not write what the user says",
    ),
    "too-many": ("{% for i in range(10**9) %}{% endfor %}" + tiny.CHATML, "Range too big"),
    "too-large": ("{{ 'x' * 10**14 }}" + tiny.CHATML, "it takes too much memory"),
    "endless": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + tiny.CHATML, "maximum recursion depth"),
    "date": ("{{ strftime_now('\ud800') }}" + tiny.CHATML, "asks for a date that cannot be written"),
}


@pytest.mark.parametrize("case", USELESS)
def test_useless_template(case: str) -> None:
    template, message = USELESS[case]
    with pytest.raises(ModelError, match=message) as error:
        PairEncoder(tiny.make_tokenizer(template or " "), DATE)
    assert "data.chat_template" in str(error.value.hint)


@pytest.mark.parametrize("where", ["tokenizer", "file"])
def test_useless_template_on_the_command_line(tmp_path: Path, refuses: Callable[..., str], where: str) -> None:
    template = USELESS["no-answers"][0]
    model = model_folder(tmp_path / "model", tiny.make_tokenizer(template if where == "tokenizer" else tiny.CHATML))
    (tmp_path / "t.jinja").write_text(template)
    setting = ["--set", f"data.chat_template={tmp_path / 't.jinja'}"] if where == "file" else []
    data = tiny.write_pairs(tmp_path / "pairs.jsonl", 8)
    stderr = refuses(ExitCode.MODEL, "data", data, "--model", model, *setting)
    assert "the chat template does not write what the assistant says" in stderr


@pytest.mark.parametrize("name", ["{}/none.jinja", "{}", "{}/latin.jinja"])
def test_a_template_file_that_cannot_be_read(tmp_path: Path, tiny_llama: Path, refuses: Any, name: str) -> None:
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    data = tiny.write_pairs(tmp_path / "pairs.jsonl", 8)
    setting = f"data.chat_template={name.format(tmp_path)}"
    assert "data.chat_template" in refuses(ExitCode.USAGE, "data", data, "--model", tiny_llama, "--set", setting)


def test_a_template_that_is_not_a_prefix_of_itself(tmp_path: Path, refuses: Callable[..., str]) -> None:
    model = model_folder(tmp_path / "model", tiny.make_tokenizer("{{ messages | length }}" + tiny.CHATML))
    data = tiny.write_pairs(tmp_path / "pairs.jsonl", 8)
    stderr = refuses(ExitCode.DATA, "data", data, "--model", model)
    assert f"{data}:1: prompt is not a prefix: the template writes the prompt differently" in stderr
    stderr = refuses(ExitCode.DATA, "data", data, "--model", model, "--set", "data.on_bad_row=drop")
    assert "no usable pair in 8 rows: 8 prompt is not a prefix" in stderr


def test_a_template_that_refuses_some_rows(tmp_path: Path) -> None:
    """What it says may come from the row: it is shown on one line, without anything that a terminal obeys."""
    template = "{% if 'bad' in messages[0].content %}{{ raise_exception('\x1b[31m' ~ messages[0].content) }}{% endif %}"
    rows = [{"prompt": text, "chosen": "yes", "rejected": "no"} for text in ("good", "bad\r\x07")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tiny.make_tokenizer(template + tiny.CHATML)
    dataset = prepare(DataConfig(sources=[str(tmp_path / "a.jsonl")]), tokenizer)
    assert dataset.counts.dropped == {"template refuses the turns": 1}
    (problem,) = encode(tokenizer, Conversation([HI | {"content": "bad\u202e\x1b[0m"}], "a", "b"))
    assert isinstance(problem, Unusable)
    assert problem.detail.isprintable()
    assert r"[31mbad\u202e" in problem.detail


# Templates that mean harm --------------------------------------------------------------------------------------------

ATTACKS = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ messages | map(attribute='__class__') | list | first }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "{{ joiner.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "{{ strftime_now.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ dict.fromkeys.__func__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% set ns = namespace(__class__=1) %}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{{ messages[0].update({'content': 'y'}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends '/etc/hostname' %}",
    "{{ request.application.__globals__ }}",
    "{{ config }}",
]


def renderings() -> dict[str, Callable[[str, Path], str]]:
    """Every way from a template to text: a tokenizer's own, a file, and what answers are generated from."""

    def own(template: str, folder: Path) -> str:
        tokenizer = loaded(model_folder(folder / "own", tiny.make_tokenizer(template)))
        return prompt_of(tokenizer)

    def file(template: str, folder: Path) -> str:
        (folder / "t.jinja").write_text(template)
        data = DataConfig(sources=["x"], chat_template=str(folder / "t.jinja"))
        return prompt_of(load_tokenizer(ModelConfig(name=str(model_folder(folder / "m", tiny.make_tokenizer()))), data))

    def prompt_of(tokenizer: Any) -> str:
        (pair,) = encode(tokenizer)
        assert isinstance(pair, Encoded)
        return str(tokenizer.decode(pair.prompt))

    def generated(template: str, folder: Path) -> str:
        tokenizer = tiny.make_tokenizer(template)
        return str(tokenizer.apply_chat_template([HI], add_generation_prompt=True, tokenize=False))

    return {"own": own, "file": file, "generated": generated}


@pytest.mark.parametrize("road", renderings())
def test_templates_cannot_reach_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, road: str) -> None:
    """An attack raises, or what it asks for is not there and prints nothing."""
    monkeypatch.chdir(tmp_path)
    render = renderings()[road]
    harmless = render(tiny.CHATML, tmp_path)
    raised = 0
    for attack in ATTACKS:
        try:
            assert render(attack + tiny.CHATML, tmp_path) == harmless, attack
        except Exception as error:
            if isinstance(error, AssertionError):
                raise
            raised += 1
    assert raised >= 13
    assert not (tmp_path / "CANARY").exists()
    result = f"{len(ATTACKS)} attacks: {raised} refused, the others print nothing"
    record(result)


def test_nothing_else_renders_templates() -> None:
    """All rendering is transformers' `apply_chat_template`, which is sandboxed; nothing here compiles one itself.

    But for our own page of a report.
    """
    package = Path(__file__).resolve().parents[1] / "sampo_cli"
    callers = set()
    for path in package.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                used = any(name.split(".")[0] in ("jinja2", "mako", "chevron") for name in names)
                assert used <= (path.name == "run_report.py"), path.name
            if isinstance(node, ast.Attribute) and node.attr == "apply_chat_template":
                callers.add(path.stem)
    assert callers == {"template", "generate"}


INTERRUPTED = """
import sys
import sampo_cli.plan
from sampo_cli.cli import main
print("ready", flush=True)
main(sys.argv[1:])
"""


def test_a_template_that_takes_for_ever_can_be_interrupted(tmp_path: Path) -> None:
    """The sandbox bounds a loop, not loops in loops. That costs time, and Ctrl-C ends it."""
    model = model_folder(tmp_path / "model", tiny.make_tokenizer(LOOP + tiny.CHATML))
    data = tiny.write_pairs(tmp_path / "pairs.jsonl", 8)
    command = [sys.executable, "-c", INTERRUPTED, "data", str(data), "--model", str(model)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    begun = seconds_used(process)
    while seconds_used(process) < begun + 3:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED
    assert "Traceback" not in stderr
    assert stdout == ""


def seconds_used(process: subprocess.Popen[str]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
