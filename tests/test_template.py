"""Golden token sequences of four real tokenizers, and what templates can do wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sampo_cli.config import DataConfig, ModelConfig
from sampo_cli.errors import ModelError, UsageError
from sampo_cli.formats import Conversation, Message, Unusable, read_row
from sampo_cli.template import PLAIN_TEMPLATE, Encoded, PairEncoder, load_tokenizer, uses_plain_template
from tests import tiny

DATE = "2024-07-26"
SYSTEM: Message = {"role": "system", "content": "Be brief."}
HI: Message = {"role": "user", "content": "Hi there"}
HELLO: Message = {"role": "assistant", "content": "Hello!"}
SUM: Message = {"role": "user", "content": "2+2?"}
PROMPTS = {"single": [HI], "system": [SYSTEM, HI], "multi-turn": [HI, HELLO, SUM]}
TOKENIZERS = ("llama3", "qwen2_5", "gemma3", "mistral_v0.1")


def tokenizer_of(shared: Path, folder: Path, name: str) -> Any:
    """A tokenizer as `load_tokenizer` gives it, from a folder that has the config.json of a model."""
    folder.mkdir(exist_ok=True)
    for file in (shared / "tokenizers" / name).iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return load_tokenizer(ModelConfig(name=str(folder)), DataConfig(sources=["x"]))


def encoded(tokenizer: Any, prompt: list[Message], chosen: str = "Four.", rejected: str = "No idea") -> Encoded:
    (pair,) = PairEncoder(tokenizer, DATE).encode([Conversation(prompt, chosen, rejected)])
    assert isinstance(pair, Encoded), pair
    return pair


def refused(tokenizer: Any, prompt: list[Message], chosen: str = "Four.", rejected: str = "No idea") -> Unusable:
    (problem,) = PairEncoder(tokenizer, DATE).encode([Conversation(prompt, chosen, rejected)])
    assert isinstance(problem, Unusable), problem
    return problem


# Llama 3: <|begin_of_text|> 128000, header 128006 .. 128007, <|eot_id|> 128009, "\n\n" 271, user 882, assistant 78191.
# Qwen 2.5: <|im_start|> 151644, <|im_end|> 151645, "\n" 198, user 872, assistant 77091; it adds its own system turn.
# Gemma 3: <bos> 2, <start_of_turn> 105, <end_of_turn> 106, "\n" 107, "\n\n" 108, user 2364, model 4368.
# Mistral v0.1 in the plain template: <s> 1, </s> 2, "\n" 13, ":" 28747, "###" 774 (after <s>) or 27332.
QWEN_DEFAULT = "151644 8948 198 2610 525 1207 16948 11 3465 553 54364 14817 13 1446 525 264 10950 17847 13 151645 198"
GOLDEN = {
    ("llama3", "single"): "128000 128006 882 128007 271 13347 1070 128009 128006 78191 128007 271",
    ("llama3", "system"): "128000 128006 9125 128007 271 3513 10015 13 128009 "
    "128006 882 128007 271 13347 1070 128009 128006 78191 128007 271",
    ("llama3", "multi-turn"): "128000 128006 882 128007 271 13347 1070 128009 128006 78191 128007 271 9906 0 128009 "
    "128006 882 128007 271 17 10 17 30 128009 128006 78191 128007 271",
    ("qwen2_5", "single"): f"{QWEN_DEFAULT} 151644 872 198 13048 1052 151645 198 151644 77091 198",
    ("qwen2_5", "system"): "151644 8948 198 3430 9814 13 151645 198 "
    "151644 872 198 13048 1052 151645 198 151644 77091 198",
    (
        "qwen2_5",
        "multi-turn",
    ): f"{QWEN_DEFAULT} 151644 872 198 13048 1052 151645 198 151644 77091 198 9707 0 151645 198 "
    "151644 872 198 17 10 17 30 151645 198 151644 77091 198",
    ("gemma3", "single"): "2 105 2364 107 10979 993 106 107 105 4368 107",
    ("gemma3", "system"): "2 105 2364 107 3912 8652 236761 108 10979 993 106 107 105 4368 107",
    ("gemma3", "multi-turn"): "2 105 2364 107 10979 993 106 107 105 4368 107 9259 236888 106 107 "
    "105 2364 107 236778 236862 236778 236881 106 107 105 4368 107",
    ("mistral_v0.1", "single"): "1 774 1247 28747 13 23809 736 13 13 27332 21631 28747 13",
    ("mistral_v0.1", "system"): "1 774 2135 28747 13 3574 6817 28723 13 13 "
    "27332 1247 28747 13 23809 736 13 13 27332 21631 28747 13",
    (
        "mistral_v0.1",
        "multi-turn",
    ): "1 774 1247 28747 13 23809 736 13 13 27332 21631 28747 13 16230 28808 2 28705 13 13 "
    "27332 1247 28747 13 28750 28806 28750 28804 13 13 27332 21631 28747 13",
}
ANSWERS = {  # "Four." and "No idea", each with one end-of-turn token
    "llama3": ([28070, 13, 128009], [2822, 4623, 128009]),
    "qwen2_5": ([26972, 13, 151645], [2753, 4522, 151645]),
    "gemma3": ([26391, 236761, 106], [3771, 4317, 106]),
    "mistral_v0.1": ([28765, 423, 28723, 2], [2501, 3028, 2]),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_golden_sequences(shared: Path, tmp_path: Path, name: str) -> None:
    tokenizer = tokenizer_of(shared, tmp_path / name, name)
    for case, prompt in PROMPTS.items():
        pair = encoded(tokenizer, prompt)
        assert pair.prompt == [int(id) for id in GOLDEN[name, case].split()], case
        assert (pair.chosen, pair.rejected) == ANSWERS[name], case
    assert uses_plain_template(tokenizer) == (name == "mistral_v0.1")


LITERALS = "a </s><|im_end|> <bos><|eot_id|>b<end_of_turn>\n<|begin_of_text|><s>"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_literal_special_token_stays_text(shared: Path, tmp_path: Path, name: str) -> None:
    tokenizer = tokenizer_of(shared, tmp_path / name, name)
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    plain, literal = encoded(tokenizer, [HI]), encoded(tokenizer, [HI | {"content": LITERALS}], LITERALS, "No idea")
    for part in ("prompt", "chosen"):
        ids = getattr(literal, part)
        assert [id for id in ids if id in special] == [id for id in getattr(plain, part) if id in special]
        assert LITERALS in tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert literal.rejected == plain.rejected
    # what is not special is tokenised as if the whole text were plain: the answer's tokens are those of the text alone
    alone = tokenizer("\n" + LITERALS, add_special_tokens=False, split_special_tokens=True).input_ids
    assert alone[-10:] == literal.chosen[-11:-1]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_real_rows_with_a_literal(shared: Path, tmp_path: Path, name: str) -> None:
    tokenizer = tokenizer_of(shared, tmp_path / name, name)
    lines = (shared / "data" / "ultrafeedback_train_1000.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [read_row(json.loads(line)) for line in lines if "</s>" in line]
    assert len(rows) == 4
    end = tokenizer.convert_tokens_to_ids("</s>") if name == "mistral_v0.1" else None
    for row, pair in zip(rows, PairEncoder(tokenizer, DATE).encode(rows), strict=True):
        assert isinstance(pair, Encoded)
        for answer, ids in ((row.chosen, pair.chosen), (row.rejected, pair.rejected)):
            said = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            assert normalize("NFC", answer) in normalize("NFC", said)  # Qwen's tokenizer normalises
            assert end is None or ids.index(end) == len(ids) - 1


@pytest.mark.parametrize("scheme", ["first", "never", "always", "prepend"])
def test_literals_where_only_the_first_word_gets_a_space(shared: Path, scheme: str) -> None:
    """Mistral v0.3 puts a space before the first word of a text, not before one after a special token; others do."""
    backend = json.loads((shared / "tokenizers" / "mistral_v0.1" / "tokenizer.json").read_text(encoding="utf-8"))
    if scheme == "prepend":
        assert backend["normalizer"]["normalizers"][0] == {"type": "Prepend", "prepend": "▁"}
    else:
        backend["normalizer"] = None
        backend["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<s>[' + m['role'] + ']' + m['content'] + '</s>' }}{% endfor %}"
    )
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<s>[assistant]' }}{% endif %}"
    pair = encoded(tokenizer, [HI | {"content": "what is </s>?"}], "It is </s>.")
    start = ["▁["] if scheme in ("always", "prepend") else ["["]
    prompt = ["<s>", *start, "user", "]", "what", "▁is", "▁</", "s", ">?", "</s>", "<s>", *start, "ass", "istant", "]"]
    assert tokenizer.convert_ids_to_tokens(pair.prompt) == prompt
    assert tokenizer.convert_ids_to_tokens(pair.chosen) == ["It", "▁is", "▁</", "s", ">.", "</s>"]


def test_a_literal_that_cannot_be_kept_apart_is_refused() -> None:
    """Phi-3's end token swallows the white space after it, which tokenising in parts would not see."""
    tokenizer = tiny.make_tokenizer("{% for m in messages %}{{ m['content'] + '<|end|>\n' }}{% endfor %}")
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", rstrip=True, special=True)]})
    assert encoded(tokenizer, [HI]).chosen[-1] == tokenizer.convert_tokens_to_ids("<|end|>")
    problem = refused(tokenizer, [HI | {"content": "what is <|end|>?"}])
    assert (problem.reason, problem.detail) == ("special token in text", "<|end|>")


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def test_template_that_always_appends_a_generation_prompt() -> None:
    template = tiny.CHATML.replace("{% if add_generation_prompt %}", "").replace("{% endif %}", "")
    pair = encoded(tiny.make_tokenizer(template), [HI])
    tokenizer = tiny.make_tokenizer()
    assert pair.prompt == ids_of(tokenizer, "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n")
    assert pair.chosen == ids_of(tokenizer, "Four.<|im_end|>")


def test_template_without_an_end_gets_the_end_of_text_token() -> None:
    tokenizer = tiny.make_tokenizer("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")
    pair = encoded(tokenizer, [HI], "assistant: Four.", "user")
    assert pair.prompt == ids_of(tokenizer, "user: Hi there\n")
    assert pair.chosen == ids_of(tokenizer, "assistant: assistant: Four.<|im_end|>")
    tokenizer.eos_token = None
    assert encoded(tokenizer, [HI]).chosen == ids_of(tokenizer, "assistant: Four.")


def test_template_with_a_header_before_the_answer() -> None:
    """gpt-oss writes special tokens between prompt and answer; an answer that is in the header is still found."""
    template = tiny.CHATML.replace("+ message['content']", "+ '<think><|im_start|>x' + message['content']")
    tokenizer = tiny.make_tokenizer(template)
    pair = encoded(tokenizer, [HI], "x", "think")
    assert pair.chosen == ids_of(tokenizer, "<think><|im_start|>xx<|im_end|>")
    assert pair.rejected == ids_of(tokenizer, "<think><|im_start|>xthink<|im_end|>")


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tiny.CHATML,
        tiny.CHATML.replace(
            "{{ '<|im_start|>' + m", "{% if message['role'] != 'system' %}{{ '<|im_start|>' + m"
        ).replace("{% endfor %}", "{% endif %}{% endfor %}"),
    ],
    ids=["refuses", "leaves-out"],
)
def test_system_turn_goes_before_the_first_question(template: str) -> None:
    pair = encoded(tiny.make_tokenizer(template), [SYSTEM, HI, HELLO, SUM])
    merged = [HI | {"content": "Be brief.\n\nHi there"}, HELLO, SUM]
    assert pair == encoded(tiny.make_tokenizer(), merged)


def test_dates_are_fixed() -> None:
    dated = "{{ strftime_now('%Y-%m-%d') }} {{ date_string }} {{ strftime_now(\"%B\") }}\n" + tiny.CHATML
    tokenizer = tiny.make_tokenizer(dated)
    start = "2024-07-26 26 Jul 2024 July\n<|im_start|>user\n"
    assert tokenizer.decode(encoded(tokenizer, [HI]).prompt).startswith(start)
    with pytest.raises(UsageError, match=r"data\.template_date '26\.7\.2024' is not a date"):
        PairEncoder(tokenizer, "26.7.2024")


def test_prompt_that_is_not_a_prefix() -> None:
    tokenizer = tiny.make_tokenizer(tiny.CHATML.replace("+ '<|im_end|>\n'", "+ message['content'] + '<|im_end|>\n'"))
    assert encoded(tokenizer, [HI])  # odd, but a prefix
    counted = tiny.make_tokenizer("{{ messages | length }}" + tiny.CHATML)
    assert refused(counted, [HI]).reason == "prompt is not a prefix"
    merging = tiny.make_tokenizer("{{ messages[0]['content'] }}{{ messages[1]['content'] if messages | length > 1 }}")
    assert encoded(merging, [HI | {"content": "the user"}], " and", " the").chosen  # separate words
    problem = refused(merging, [HI | {"content": "the us"}], "er", "es")
    assert problem.reason == "prompt is not a prefix"
    assert (
        problem.detail
        == "where they part, it is ['the', 'Ġ', 'u'] alone and ['the', 'Ġuser', '<|im_end|>'] with the response"
    )


def test_rows_that_a_template_cannot_take() -> None:
    alternating = "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    alternating += "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + tiny.CHATML
    problem = refused(tiny.make_tokenizer(alternating), [HI, HI])
    assert (problem.reason, problem.detail) == ("template refuses the turns", "roles must alternate")
    upper = tiny.make_tokenizer(tiny.CHATML.replace("message['content']", "message['content'] | upper"))
    assert refused(upper, [HI]).reason == "template changes the answer"
    assert encoded(upper, [HI], "FOUR", "FIVE")


def test_responses_that_are_the_same_to_the_tokenizer() -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert refused(tokenizer, [HI], "Four", "four").reason == "identical responses"
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    assert refused(tokenizer, [HI], "Four", "xx").reason == "empty response"


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('never') }}", "{% for m in %}", "{{ messages.nothing.at_all }}"]
)
def test_template_that_cannot_be_used(template: str) -> None:
    with pytest.raises(ModelError, match="the chat template cannot render a question and its answer"):
        PairEncoder(tiny.make_tokenizer(template), DATE)


def test_no_template() -> None:
    with pytest.raises(ModelError):
        PairEncoder(tiny.make_tokenizer(None), DATE)


def test_load_tokenizer(tmp_path: Path) -> None:
    model = ModelConfig(name=str(tmp_path / "model"))
    data = DataConfig(sources=["x"])
    tiny.save_model(tiny.CONFIGS["llama"](), tmp_path / "model", template=None)
    plain = load_tokenizer(model, data)
    assert plain.chat_template == PLAIN_TEMPLATE  # this tokenizer adds no BOS to plain text
    assert uses_plain_template(plain)
    pair = encoded(plain, [SYSTEM, HI, HELLO, SUM])
    text = "### System:\nBe brief.\n\n### User:\nHi there\n\n### Assistant:\nHello!<|im_end|>\n\n### User:\n2+2?\n\n"
    assert pair.prompt == ids_of(plain, text + "### Assistant:\n")
    assert pair.chosen == ids_of(plain, "Four.<|im_end|>")

    (tmp_path / "mine.jinja").write_text(tiny.CHATML)
    mine = load_tokenizer(model, data.model_copy(update={"chat_template": str(tmp_path / "mine.jinja")}))
    assert mine.chat_template == tiny.CHATML
    assert not uses_plain_template(mine)


def test_load_tokenizer_errors(tmp_path: Path) -> None:
    data = DataConfig(sources=["x"])
    with pytest.raises(ModelError, match="model not found"):
        load_tokenizer(ModelConfig(name="./nowhere"), data)
    tiny.save_model(tiny.CONFIGS["llama"](), tmp_path)
    model = ModelConfig(name=str(tmp_path))
    with pytest.raises(UsageError, match=r"data\.chat_template"):
        load_tokenizer(model, data.model_copy(update={"chat_template": str(tmp_path / "none.jinja")}))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="its tokenizer does not load"):
        load_tokenizer(model, data)


def test_batches_equal_single_pairs() -> None:
    encoder = PairEncoder(tiny.make_tokenizer(), DATE)
    rows = [Conversation([HI], f"answer {i} " + "<|im_end|>" * (i % 2), "no") for i in range(6)]
    rows.insert(3, Conversation([{"role": "user", "content": "a"}], "x", "x"))
    batch = encoder.encode(rows)
    assert [type(pair) for pair in batch] == [Encoded] * 3 + [Unusable] + [Encoded] * 3
    assert [encoder.encode([row])[0] for row in rows if row.chosen != "x"] == [
        p for p in batch if isinstance(p, Encoded)
    ]
    assert encoder.encode([]) == []


def test_the_tokenizer_is_left_as_it_was(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    before = tokenizer("a<|im_end|>").input_ids
    encoded(tokenizer, [HI | {"content": "a <|im_end|> b"}])
    assert tokenizer("a<|im_end|>").input_ids == before
