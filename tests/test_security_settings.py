"""What adapters, recipes, data cards and templates say is read and not obeyed; see test_security.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from sampo_cli.adapter import read_adapter
from sampo_cli.config import DataConfig, LoraSection, ModelConfig, validate
from sampo_cli.errors import DataError, ExitCode, HubError, ModelError
from sampo_cli.lora import adopt_reference
from sampo_cli.merging import merge
from sampo_cli.model import load_policy
from sampo_cli.plain_yaml import parse_yaml
from sampo_cli.plan import new_folder
from sampo_cli.remote import DATA_FILES, fetch, fetch_model
from sampo_cli.template import load_tokenizer
from tests import tiny
from tests.hostile_files import (
    Refuses,
    adapter,
    change,
    code,
    good_adapter,
    marker,
    model,
    pickled,
    refuses,
    snapshot,
    succeeds,
)
from tests.test_cli import train_flags

__all__ = ["adapter", "good_adapter", "marker", "model", "refuses"]  # fixtures

# Adapters ------------------------------------------------------------------------------------------------------------

HOSTILE_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"megatron_config": {"x": 1}, "megatron_core": "evil_module"}, "megatron_config="),
    ({"init_lora_weights": "corda", "corda_config": {"cache_file": "adapter_model.bin"}}, "init_lora_weights="),
    ({"init_lora_weights": "lora_ga", "lora_ga_config": {"cache_file": "adapter_model.bin"}}, "init_lora_weights="),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights="),
    ({"init_lora_weights": {"corda": 1}}, "init_lora_weights"),
    ({"corda_config": {"covariance_file": "adapter_model.bin"}}, "corda_config="),
    ({"loftq_config": {"loftq_bits": 4}}, "loftq_config="),
    ({"arrow_config": {"top_k": 2}}, "arrow_config="),
    ({"layer_replication": [[0, 1_000_000_000]]}, "layer_replication="),
    ({"trainable_token_indices": [0, 1]}, "trainable_token_indices="),
    ({"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "evil/x"}, "PROMPT_TUNING"),
    ({"peft_type": ["LORA"]}, "['LORA']"),
    ({"r": 10**9}, "r: input should be less than or equal to 65536"),
    ({"r": "8"}, "r: input should be a valid integer"),
    ({"r": True}, "r: input should be a valid integer"),
    ({"r": 0}, "r: input should be greater than 0"),
    ({"lora_alpha": float("inf")}, "lora_alpha: input should be a finite number"),
    ({"lora_alpha": [8]}, "lora_alpha: input should be a valid number"),
    ({"lora_dropout": 1e9}, "lora_dropout: input should be less than or equal to 1"),
    ({"target_modules": {"q_proj": 1}}, "target_modules"),
    ({"rank_pattern": {"(": 4}}, "no rank or scale for 'model.layers."),
    ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern"),
    ({"rank_pattern": [["q_proj", 4]]}, "rank_pattern"),
    ({"use_dora": "yes"}, "use_dora"),
    ({"base_model_name_or_path": ["evil"]}, "base_model_name_or_path: input should be a valid string"),
    ({"revision": 3}, "revision: input should be a valid string"),
    ({"a_setting_of_tomorrow": "evil_module"}, "a_setting_of_tomorrow="),
]


@pytest.mark.parametrize(("settings", "said"), HOSTILE_SETTINGS, ids=[",".join(s) for s, _ in HOSTILE_SETTINGS])
def test_an_adapter_config_runs_nothing_and_loads_nothing(
    settings: dict[str, Any],
    said: str,
    tiny_llama: Path,
    adapter: Path,
    marker: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refuses: Refuses,
) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "evil_module.py").write_text(code(marker))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    (adapter / "adapter_model.bin").write_bytes(pickled(marker))
    monkeypatch.chdir(adapter)
    change(adapter / "adapter_config.json", **settings)
    before = snapshot(tmp_path)
    assert said in refuses(ExitCode.MODEL, "merge", adapter, "--base", tiny_llama)
    flags = train_flags(tiny_llama, pairs_file, tmp_path / "run", "--adapter", adapter)
    text = refuses(ExitCode.MODEL, *flags)
    assert said in text or f"{next(iter(settings))}=" in text
    assert "evil_module" not in sys.modules
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("settings", "said"), HOSTILE_SETTINGS[::6], ids=[",".join(s) for s, _ in HOSTILE_SETTINGS[::6]]
)
def test_a_dry_run_refuses_the_same(
    settings: dict[str, Any],
    said: str,
    tiny_llama: Path,
    adapter: Path,
    marker: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refuses: Refuses,
) -> None:
    """It builds the modules that the adapter's settings ask for."""
    (tmp_path / "evil_module.py").write_text(code(marker))
    monkeypatch.syspath_prepend(tmp_path)
    change(adapter / "adapter_config.json", **settings)
    flags = train_flags(tiny_llama, pairs_file, tmp_path / "run", "--adapter", adapter, "--dry-run")
    assert said in refuses(ExitCode.MODEL, *flags)
    assert not marker.exists()


def test_the_reference_of_a_round_is_plain_lora_too(
    tiny_llama: Path, adapter: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run reads it from its folder."""
    policy, _ = load_policy(ModelConfig(name=str(tiny_llama), quantization="none"), LoraSection(), seed=0)
    (tmp_path / "evil_round.py").write_text(code(marker))
    monkeypatch.syspath_prepend(tmp_path)
    change(adapter / "adapter_config.json", megatron_config={"x": 1}, megatron_core="evil_round")
    with pytest.raises(ModelError, match="megatron_config="):
        adopt_reference(policy, adapter)
    change(adapter / "adapter_config.json", megatron_config=None, megatron_core=None)
    (adapter / "adapter_model.safetensors").rename(adapter / "kept")
    (adapter / "adapter_model.bin").write_bytes(pickled(marker))
    with pytest.raises(ModelError, match=r"adapter_model\.bin is pickled"):
        adopt_reference(policy, adapter)
    (adapter / "kept").rename(adapter / "adapter_model.safetensors")
    adopt_reference(policy, adapter)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["../../../etc", "/etc", "~nobody-of-this-name/x", "a\nb", "x" * 5000, "\x00", "-x", ""]
)
def test_an_adapters_base_is_a_name_and_no_way_out(name: str, adapter: Path, tmp_path: Path) -> None:
    change(adapter / "adapter_config.json", base_model_name_or_path=name)
    before = snapshot(tmp_path)
    with pytest.raises((ModelError, HubError)) as caught:
        merge(adapter, check_pairs=0)
    assert "\n" not in caught.value.message
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "record",
    [{"quantization": "evil"}, {"dtype": ["x"]}, {"base_fingerprint": 3}, {"base_model": {}}, {"base_revision": []}],
)
def test_an_adapters_record_says_what_a_run_says(record: dict[str, Any], adapter: Path) -> None:
    change(adapter / "sampo.json", **record)
    with pytest.raises(ModelError, match=f"sampo.json: {next(iter(record))}: input should be"):
        read_adapter(adapter)


# Recipes -------------------------------------------------------------------------------------------------------------

NINE = ",".join(["*{0}"] * 9)
LAUGHS = "a: &a [lol,lol,lol]\n" + "".join(
    f"{name}: &{name} [{NINE.format(before)}]\n" for before, name in zip("abcde", "bcdef", strict=True)
)
"""3 * 9^5 values in six lines, more than are read; four lines more would be a billion, and fill the memory."""

HOSTILE_YAML = {
    "os.system": ("model: !!python/object/apply:os.system ['touch pwned']\n", "could not determine a constructor"),
    "name": ("model: !!python/name:os.system\n", "could not determine a constructor"),
    "module": ("model: !!python/module:evil_module\n", "could not determine a constructor"),
    "new": ("!!python/object/new:evil_module.X {}\n", "could not determine a constructor"),
    "laughs": (LAUGHS, "more than 100,000 values"),
    "merged laughs": (LAUGHS.replace("[", "{<<: [").replace("]", "]}").replace("lol", "{k: 1}"), "more than 100,000"),
    "itself": ("model: &a [*a]\n", "more than 100,000 values"),
    "brackets": ("model: " + "[" * 1000, "maximum recursion depth"),
    "digits": ("model: {name: " + "1" * 5000 + "}\n", "Exceeds the limit"),
    "line end": ('model: {name: "a\\nb"}\n', "a line end or control character in 'a\\nb'"),
    "escape": ('model: {name: "\\e[31mred"}\n', "a line end or control character"),
    "NUL": ('model: {name: "a\\0"}\n', "a line end or control character"),
    "NUL key": ('"a\\0": 1\n', "a line end or control character"),
    "half": ('model: {name: "\\ud800"}\n', "a line end or control character"),
    "a list": ("- model\n", "expected sections"),
    "sections": ("model: 3\ndata: [x]\nlora: y\n1: {2: 3}\n", "the recipe has problems"),
    "nested": ("model: {name: {a: {b: c}}}\ndata: {sources: {x: y}}\n", "the recipe has problems"),
}


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_a_recipe_runs_nothing_and_fills_nothing(
    name: str, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: Refuses
) -> None:
    text, said = HOSTILE_YAML[name]
    (tmp_path / "evil_module.py").write_text(code(marker))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    before = snapshot(tmp_path)
    shown = refuses(ExitCode.USAGE, "train", "--recipe", "recipe.yaml")
    assert said in shown
    assert len(shown) < 2000
    assert snapshot(tmp_path) == before
    if "control" not in said and "\n" not in text.strip():
        assert "not YAML" in refuses(
            ExitCode.USAGE, "train", "--set", f"model.name={text.removeprefix('model: ')}"
        ) or (name in ("a list", "sections", "nested"))


def test_a_recipe_of_gigabytes_is_not_read(tmp_path: Path, refuses: Refuses) -> None:
    with (tmp_path / "recipe.yaml").open("wb") as file:
        file.truncate(1 << 33)  # a sparse file
    assert "larger than 1 MiB" in refuses(ExitCode.USAGE, "train", "--recipe", tmp_path / "recipe.yaml")


def test_aliases_of_a_usual_size_are_fine() -> None:
    text = "base: &base {r: 8}\nlora: {<<: *base, alpha: 16}\nother: *base\n"
    assert parse_yaml(text, "x") == {"base": {"r": 8}, "lora": {"r": 8, "alpha": 16}, "other": {"r": 8}}


NAMES = [
    "../../x",
    "/etc/x",
    "..",
    ".",
    "-rf",
    "a\nb",
    "[red]x[/red]",
    "<script>",
    "$(touch pwned)",
    "`x`",
    "%2e%2e/x",
    "x" * 300,
]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_a_hostile_name_lies_below_outputs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tree = {"model": {"name": f"owner/{name}"}, "data": {"sources": [f"{name}/data:{name}"]}}
    if len(name) > 255:
        tree["data"] = {"sources": ["x"]}
    folder = new_folder(validate(tree))
    assert folder.parent == Path("outputs")
    assert folder.absolute().resolve().parent == tmp_path / "outputs"
    assert not set(folder.name) & set("/\\\n<>[]$`%() ")
    assert folder.name[0] not in ".-"


def test_a_name_of_a_model_or_data_set_is_refused_where_it_is_none(tmp_path: Path) -> None:
    for name in ("a\nb/c", "\x1b[31m/x", "x\x00"):
        with pytest.raises(ModelError, match="is no name"):
            fetch_model(name)
        with pytest.raises(DataError, match="is no name"):
            fetch(name, "dataset", revision=None, patterns=DATA_FILES)
    for revision in ("../../../x", "/x", "a/../b", "a\nb", ""):
        with pytest.raises(ModelError, match="is no name"):
            fetch_model("owner/name", revision)


# Data sets -----------------------------------------------------------------------------------------------------------


def data_set(folder: Path, marker: Path) -> Path:
    """A folder of pairs with a loading script under every name that one ever had."""
    folder.mkdir()
    tiny.write_pairs(folder / "train.jsonl", 8)
    for name in ("dataset.py", f"{folder.name}.py", "__init__.py", "setup.py", "sitecustomize.py"):
        (folder / name).write_text(code(marker))
    return folder


def test_a_loading_script_is_not_run(tiny_llama: Path, marker: Path, tmp_path: Path, refuses: Refuses) -> None:
    folder = data_set(tmp_path / "pairs", marker)
    text = refuses(ExitCode.DATA, "data", folder, "--model", tiny_llama)
    assert "scripts are no longer supported, but found pairs.py" in text
    (folder / "pairs.py").unlink()
    succeeds("data", folder, "--model", tiny_llama, "--quiet")
    succeeds("data", folder / "train.jsonl", "--model", tiny_llama, "--quiet")
    assert "not a format that is read" in refuses(ExitCode.DATA, "data", folder / "setup.py", "--model", tiny_llama)
    assert not marker.exists()


def test_a_script_of_a_data_set_on_the_hub_is_not_fetched(marker: Path, tmp_path: Path) -> None:
    from fnmatch import fnmatch

    names = ["pairs.py", "data/loader.py", "x.sh", "a.pkl", "a.pt", "a.arrow", "a.zip", "a.tar"]
    assert [name for name in names if any(fnmatch(name, pattern) for pattern in DATA_FILES)] == []


HOSTILE_CARDS = {
    "laughs": (f"{LAUGHS}configs: *f\n", "more than 100,000 values"),
    "laughing files": (f"{LAUGHS}configs:\n- config_name: x\n  data_files: *f\n", "more than 100,000 values"),
    "tag": ("configs: !!python/object/apply:os.system ['touch pwned']\n", "could not determine a constructor"),
    "absolute": (
        "configs:\n- config_name: x\n  data_files: /etc/passwd\n",
        "names a file outside of it: '/etc/passwd'",
    ),
    "above": ("configs:\n- config_name: x\n  data_files: [{split: train, path: ../x.jsonl}]\n", "'../x.jsonl'"),
    "folder": ("configs:\n- config_name: x\n  data_dir: ../\n", "names a file outside of it: '../'"),
    "address": (
        "configs:\n- config_name: x\n  data_files: http://127.0.0.1:9/x.jsonl\n",
        "'http://127.0.0.1:9/x.jsonl'",
    ),
    "chained": ("configs:\n- config_name: x\n  data_files: zip://a.jsonl::a.zip\n", "'zip://a.jsonl::a.zip'"),
}


@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("name", HOSTILE_CARDS)
def test_a_data_sets_card_leads_nowhere(
    name: str, file: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: Refuses
) -> None:
    text, said = HOSTILE_CARDS[name]
    monkeypatch.chdir(tmp_path)
    tiny.write_pairs(tmp_path / "x.jsonl", 4)
    (tmp_path / "pairs").mkdir()
    tiny.write_pairs(tmp_path / "pairs" / "a.jsonl", 4)
    (tmp_path / "pairs" / file).write_text(f"---\n{text}---\n# Pairs\n" if file == "README.md" else text)
    assert said in refuses(ExitCode.DATA, "data", "./pairs", "--model", tiny_llama)
    assert not (tmp_path / "pwned").exists()


# Templates -----------------------------------------------------------------------------------------------------------

ESCAPES = [
    "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ raise_exception.__globals__['os'].system('touch pwned') }}",
    "{{ tojson.__globals__.__builtins__['open']('pwned', 'w').write('x') }}",
    "{{ lipsum.__globals__['os'].popen('touch pwned').read() }}",
    "{{ self._TemplateReference__context }}{{ self.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% set x = namespace() %}{% set x.__class__ = 1 %}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
]


QUIET = [
    "{{ strftime_now.__globals__ }}",
    "{{ ('%s' % messages).format.__self__.__class__ }}",
    "{{ messages.__class__ }}",
]
"""What the sandbox takes for undefined, and writes as nothing."""


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_chat_template_stays_in_its_sandbox(
    escape: str, model: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: Refuses
) -> None:
    monkeypatch.chdir(tmp_path)
    (model / "chat_template.jinja").write_text(tiny.CHATML + escape)
    before = snapshot(tmp_path)
    text = refuses(ExitCode.MODEL, *train_flags(model, pairs_file, tmp_path / "run"))
    assert "the chat template cannot render a question and its answer" in text
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("escape", QUIET)
def test_a_chat_template_sees_nothing_of_python(escape: str, model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}[" + escape + "]")
    tokenizer = load_tokenizer(ModelConfig(name=str(model)), DataConfig(sources=["x"]))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a[]"


@pytest.mark.parametrize("name", ["../../../pwned", "/tmp/pwned", "a/b", "..", "", "a\nb"])
def test_a_templates_name_is_no_path(
    name: str, model: Path, pairs_file: Path, tmp_path: Path, refuses: Refuses
) -> None:
    (model / "chat_template.jinja").unlink()
    templates = [{"name": "default", "template": tiny.CHATML}, {"name": name, "template": "pwned"}]
    change(model / "tokenizer_config.json", chat_template=templates)
    before = snapshot(tmp_path)
    text = refuses(ExitCode.MODEL, *train_flags(model, pairs_file, tmp_path / "run"))
    assert "a chat template called" in text
    assert snapshot(tmp_path) == before
