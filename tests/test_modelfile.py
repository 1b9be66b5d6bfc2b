"""Chat templates as pieces, and the Go templates that are made of them: run by Go where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sampo_cli.modelfile import Turns, find_turns, modelfile
from sampo_cli.template import PLAIN_TEMPLATE, PairEncoder
from tests.tiny import CHATML, make_tokenizer

DATE = "2024-07-26"
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n'"
    " + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
ALWAYS_SPEAKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{{ '<|im_start|>assistant:' }}"
)
LAST_QUESTION = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '\n\n' %}{% set ms = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set ms = messages %}{% endif %}"
    "{% for m in ms %}{% if m['role'] == 'user' %}{{ '[Q]' + (s if loop.last else '') + m['content'] + '[/Q]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
WITH_DATE = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' if messages[0]['role'] != 'system' else '' }}" + CHATML
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}" + CHATML
)
BRACES = CHATML.replace("'<|im_end|>\n'", "' {{ }} <|im_end|>\n'")
NUMBERED = (
    "{% for m in messages %}{{ loop.index ~ m['role'] ~ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'x' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "gemma": GEMMA,
    "always-speaks": ALWAYS_SPEAKS,
    "last-question": LAST_QUESTION,
    "date": WITH_DATE,
    "default-system": DEFAULT_SYSTEM,
    "braces": BRACES,
    "plain": PLAIN_TEMPLATE,
}


def test_the_pieces_of_chatml() -> None:
    assert find_turns(make_tokenizer(CHATML), DATE) == Turns(
        lead="",
        head="",
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        place="own",
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        answer=("<|im_start|>assistant\n", "<|im_end|>\n"),
        reply="<|im_start|>assistant\n",
    )


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gemma", {"place": "first", "system": ("", "\n\n"), "reply": "<|im_start|>model\n"}),
        (
            "always-speaks",
            {"user": ("<|im_start|>user:", "<|im_end|>"), "reply": "<|im_start|>assistant:"},
        ),
        (
            "last-question",
            {"place": "last", "user": ("[Q]", "[/Q]"), "answer": (" ", "<|im_end|>"), "reply": ""},
        ),
        ("date", {"head": "Today: 26 Jul 2024\n", "default_system": None}),
        ("default-system", {"default_system": "Be brief.", "place": "own"}),
        ("plain", {"user": ("### User:\n", "\n\n"), "answer": ("### Assistant:\n", "<|im_end|>\n\n")}),
    ],
)
def test_the_pieces_of_other_templates(name: str, found: dict[str, Any]) -> None:
    turns = find_turns(make_tokenizer(TEMPLATES[name]), DATE)
    assert {key: getattr(turns, key) for key in found} == found


@pytest.mark.parametrize("template", [NUMBERED, CHATML.replace("message['content']", "message['content'] | upper")])
def test_a_template_that_is_more_than_pieces_gets_none(template: str) -> None:
    tokenizer = make_tokenizer(template)
    assert find_turns(tokenizer, DATE) is None
    text = modelfile("x.gguf", None, tokenizer)
    assert "\nTEMPLATE" not in text
    assert "# No TEMPLATE" in text


def test_a_first_token_that_the_tokenizer_adds_is_not_written_twice() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer("{{ bos_token }}" + CHATML.replace("<|im_start|>", "<|im_end|>"))
    first = tokenizer.bos_token
    turns = find_turns(tokenizer, DATE)
    assert turns is not None
    assert turns.lead == first
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, tokenizer.bos_token_id)]
    )
    turns = find_turns(tokenizer, DATE)
    assert turns is not None
    assert turns.lead == ""
    tokenizer.chat_template = CHATML.replace("'<|im_start|>'", "bos_token + ''")  # before every turn
    assert find_turns(tokenizer, DATE) is None


def test_the_whole_modelfile() -> None:
    tokenizer = make_tokenizer(DEFAULT_SYSTEM)
    assert modelfile("x-Q8_0.gguf", find_turns(tokenizer, DATE), tokenizer) == (
        "FROM ./x-Q8_0.gguf\n"
        'TEMPLATE """{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}'
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n{{ end }}'
        '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n{{ end }}'
        '{{ if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}{{ if not $last }}<|im_end|>\n'
        '{{ end }}{{ end }}{{ if and $last (ne .Role "assistant") }}<|im_start|>assistant\n{{ end }}{{ end }}"""\n'
        'SYSTEM """Be brief."""\n'
        'PARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop "<|im_start|>"\n'
    )


GO = """package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Message struct { Role, Content string }

func main() {
	var asked []struct { Template string; Messages []Message }
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil { panic(err) }
	written := []string{}
	for _, one := range asked {
		system := ""
		for _, message := range one.Messages { if message.Role == "system" { system = message.Content } }
		var out strings.Builder
		values := map[string]any{"Messages": one.Messages, "System": system}
		if err := template.Must(template.New("").Parse(one.Template)).Execute(&out, values); err != nil { panic(err) }
		written = append(written, out.String())
	}
	json.NewEncoder(os.Stdout).Encode(written)
}
"""


def test_go_writes_what_the_chat_template_writes(tmp_path: Path) -> None:
    """Ollama's own engine, text/template, with the values that it gives; SYSTEM is there as its first message."""
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin:/usr/lib/go/bin")
    if go is None:
        pytest.skip("Go is not installed")
    conversations = [
        [("user", "Hi\nthere {{ x }}")],
        [("user", "a"), ("assistant", "b\n\nc"), ("user", "d")],
        [("system", "Be kind."), ("user", "a")],
        [("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "d")],
    ]
    asked, expected = [], []
    for template in TEMPLATES.values():
        tokenizer = make_tokenizer(template)
        turns = find_turns(tokenizer, DATE)
        assert turns is not None
        for conversation in conversations:
            messages = [{"role": role, "content": content} for role, content in conversation]
            expected.append(PairEncoder(tokenizer, DATE).text(messages, add_generation_prompt=True))
            if turns.default_system and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": turns.default_system})
            asked.append({"template": turns.go(), "messages": messages})
    (tmp_path / "main.go").write_text(GO)
    outcome = subprocess.run(
        [go, "run", "main.go"],
        cwd=tmp_path,
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=os.environ | {"GOCACHE": str(tmp_path / "cache"), "GOFLAGS": "-mod=mod", "GO111MODULE": "off"},
    )
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads(outcome.stdout) == expected


@pytest.mark.parametrize("name", ["llama3", "qwen2_5"])
def test_templates_of_real_models(shared: Path, name: str) -> None:
    turns = find_turns(AutoTokenizer.from_pretrained(shared / "tokenizers" / name), DATE)
    assert turns is not None
    assert turns.answer[1] == {"llama3": "<|eot_id|>", "qwen2_5": "<|im_end|>\n"}[name]
    assert turns.place == "own"
