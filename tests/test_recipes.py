"""The recipes that ship: what they say of themselves, and whether each fits the card that it is for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config

from sampo_cli.config import LoraSection, ModelConfig
from sampo_cli.errors import ExitCode
from sampo_cli.model import load_policy
from sampo_cli.plan import resolve_recipe
from sampo_cli.recipe_files import describe, load_recipe, recipes_folder, shipped_recipes
from scripts import make_recipes
from tests import tiny
from tests.architectures import ARCHITECTURES
from tests.conftest import Sampo

FOR_CARDS = [name for name in shipped_recipes() if "gb/" in name]
SPARE = 0.1
"""Share of a card that a recipe leaves free."""

# For cards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_has_the_parameters_that_the_hub_counts(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ARCHITECTURES[name].config())
    assert sum(parameter.numel() for parameter in model.parameters()) == ARCHITECTURES[name].parameters


def test_every_family_has_recipes_and_every_card_some_of_most() -> None:
    families = ("llama-3", "qwen2.5", "qwen3", "mistral", "gemma-2", "gemma-3", "phi-", "smollm2", "olmo-2")
    cards = {family: {name.split("/")[0] for name in FOR_CARDS if f"/{family}" in name} for family in families}
    assert cards.pop("smollm2") == {"8gb"}  # the largest has 1.7 billion parameters
    assert all(found == {"8gb", "16gb", "24gb", "80gb"} for found in cards.values()), cards


@pytest.fixture(scope="module")
def longest_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short prompts, and responses longer than any recipe's length: the worst that a recipe can meet."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = ({"prompt": f"{i}?", "chosen": "yes " * 8192, "rejected": "no " * 8192} for i in range(4))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def bare_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders with a model's config, its real sizes in it, a small tokenizer, and no weights."""
    tokenizer = tiny.make_tokenizer()

    def folder_of(name: str) -> Path:
        folder = tmp_path_factory.mktemp("models") / name.split("/")[1]
        ARCHITECTURES[name].config().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return folder_of


@pytest.mark.parametrize("name", FOR_CARDS)
def test_a_dry_run_says_that_it_fits_its_card(
    sampo: Sampo, bare_models: Callable[[str], Path], longest_pairs: Path, name: str
) -> None:
    """The longest pair that the recipe allows, 2 * max_length - prompt positions, leaves a tenth of the card free.

    A budget of 2 * max_length is one such pair a micro-batch; without it a run takes what the card has to be faster.
    """
    recipe = describe(name)
    assert recipe.model is not None
    most = 2 * load_recipe(name)["data"]["max_length"]
    flags = ["--model", bare_models(recipe.model), "--data", longest_pairs, "--quiet", "--json"]
    flags += ["--dry-run", "--gpu-memory", recipe.card, "--set", f"train.tokens_per_microbatch={most}"]
    code, stdout, stderr = sampo("train", "--recipe", name, *flags)
    assert code == ExitCode.OK, stderr
    memory = json.loads(stdout)["memory"]
    assert memory["fits"]
    assert memory["largest micro-batch"]["rows"] == 1
    assert most - 20 < memory["largest micro-batch"]["positions"] < most
    assert memory["needed"] <= (1 - SPARE) * memory["there is"]
    needed, weights = make_recipes.forecast_of(recipe)
    assert needed == pytest.approx(memory["needed"] / 1e9, rel=0.03)
    assert weights == pytest.approx(memory["parts"]["weights"] / 1e9, abs=0.06)


@pytest.mark.parametrize("name", FOR_CARDS)
def test_a_heading_says_what_is_set(name: str) -> None:
    recipe, tree = describe(name), load_recipe(name)
    bits = {"nf4": "4 bits", "none": "16 bits"}[tree["model"]["quantization"]]
    size = name.split("gb/")[0]
    length = f"{tree['data']['max_length']:,}"
    assert recipe.about == f"{recipe.model} in {bits}, up to {length} tokens a side, on a card of {size} GB"
    assert recipe.card == f"{size}GB"
    assert recipe.method == "sampo"
    assert f"#   sampo train --recipe {name} --data pairs.jsonl\n" in recipe.text


def test_recipes_for_cards_differ_in_what_model_and_card_ask_for_only() -> None:
    """Everything else is the same for all, so that a change of mind is one everywhere."""
    may_differ = {
        "model": {"name", "quantization"},
        "data": {"max_length"},
        "train": {"learning_rate", "checkpointing"},
    }
    kept = set()
    for name in FOR_CARDS:
        tree = load_recipe(name)
        resolve_recipe(tree)
        same = {key: {k: v for k, v in tree[key].items() if k not in may_differ.get(key, ())} for key in tree}
        kept.add(json.dumps(same, sort_keys=True))
        billions = ARCHITECTURES[tree["model"]["name"]].parameters / 1e9
        assert tree["train"]["learning_rate"] == (5e-5 if billions < 3 else 2e-5 if billions < 20 else 1e-5)
    assert len(kept) == 1


# A model that also sees ----------------------------------------------------------------------------------------------


def test_a_model_that_also_sees_gets_adapters_where_it_reads(tmp_path: Path) -> None:
    """Gemma 3 from 4B on: 7 linear layers in each of 2 layers of the language model, none in the vision tower."""
    text = tiny.SIZES | {"sliding_window": 8, "layer_types": tiny.MIXED, "query_pre_attn_scalar": 16}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "vision_use_head": False}
    tokens = {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, **tokens)
    folder = tiny.save_model(config, tmp_path / "model")
    policy, facts = load_policy(ModelConfig(name=str(folder)), LoraSection(), seed=0)
    adapted = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
    assert facts.adapter_layers == 14
    assert len(adapted) == 2 * 14
    assert all("language_model.layers" in name for name in adapted)
    assert facts.layout == "shared"


# sampo recipes -------------------------------------------------------------------------------------------------------


def test_the_listing_has_every_recipe_by_card(sampo: Sampo) -> None:
    code, stdout, _ = sampo("recipes", "--json")
    found = json.loads(stdout)
    assert code == ExitCode.OK
    assert [recipe["name"] for recipe in found] == list(shipped_recipes())
    sizes = [int((recipe["card"] or "0GB").removesuffix("GB")) for recipe in found]
    assert sizes == sorted(sizes)
    assert {recipe["name"]: (recipe["method"], recipe["model"], recipe["card"]) for recipe in found}.items() >= {
        "quickstart": ("sampo", None, None),
        "llama-3-8b-instruct-simpo": ("simpo", "meta-llama/Meta-Llama-3-8B-Instruct", None),
        "24gb/llama-3.1-8b": ("sampo", "meta-llama/Llama-3.1-8B-Instruct", "24GB"),
    }.items()
    lines = sampo("recipes")[1].splitlines()
    for recipe in found:
        (line,) = [line for line in lines if line.split()[:1] == [recipe["name"]]]
        assert line.endswith(recipe["about"])


def test_a_card_lists_its_own(sampo: Sampo) -> None:
    names = [recipe["name"] for recipe in json.loads(sampo("recipes", "16gb", "--json")[1])]
    assert names == [name for name in shipped_recipes() if name.startswith("16gb/")]


def test_a_recipe_is_shown_as_it_stands(sampo: Sampo) -> None:
    path = recipes_folder() / "16gb" / "llama-3.1-8b.yaml"
    assert sampo("recipes", "16gb/llama-3.1-8b") == (ExitCode.OK, path.read_text(), "")
    (shown,) = json.loads(sampo("recipes", "16gb/llama-3.1-8b", "--json")[1])
    assert (shown["text"], shown["path"]) == (path.read_text(), str(path))


def test_only_recipes_are_listed() -> None:
    """A folder of other YAML files beside the recipes, such as accelerate's, is none for a card."""
    files = {path for path in recipes_folder().glob("*/*.yaml") if path not in shipped_recipes().values()}
    assert all(path.parent.name == "accelerate" for path in files)


@pytest.mark.parametrize("target", ["mine.yaml", "with space.yml", "folder"])
def test_a_copy_is_a_recipe_with_its_own_command(sampo: Sampo, tmp_path: Path, target: str) -> None:
    code, stdout, stderr = sampo("recipes", "16gb/llama-3.1-8b", "--copy", tmp_path / target, "--json")
    assert code == ExitCode.OK, stderr
    path = tmp_path / target if "." in target else tmp_path / target / "16gb-llama-3.1-8b.yaml"
    assert json.loads(stdout)[0]["copied"] == [str(path)]
    assert load_recipe(str(path)) == load_recipe("16gb/llama-3.1-8b")
    quoted = f"'{path}'" if " " in target else path
    assert f"\n#   sampo train --recipe {quoted} --data pairs.jsonl\n" in path.read_text()


def test_a_copy_takes_along_what_lies_beside_it(
    sampo: Sampo, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sampo("recipes", "quickstart", "--copy", tmp_path / "here.yaml")[0] == ExitCode.OK
    assert {path.name for path in tmp_path.iterdir()} == {"here.yaml", "pairs.jsonl"}
    assert load_recipe(str(tmp_path / "here.yaml"))["data"]["sources"] == [str(tmp_path / "pairs.jsonl")]
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = sampo("train", "--recipe", "here.yaml", "--model", tiny_llama, "--dry-run", "--json")
    assert code == ExitCode.OK, stderr
    assert json.loads(stdout)["train pairs"] == 135  # a tenth of 150 is held out


def test_a_recipe_brings_its_own_data_whatever_lies_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pairs.jsonl").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart")["data"]["sources"] == [str(recipes_folder() / "quickstart" / "pairs.jsonl")]


def test_a_copy_overwrites_nothing(sampo: Sampo, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    (tmp_path / "pairs.jsonl").write_text("mine")
    for target in ("mine.yaml", "other.yaml"):
        code, stdout, stderr = sampo("recipes", "quickstart", "--copy", tmp_path / target)
        assert (code, stdout) == (ExitCode.USAGE, "")
        assert "is already there" in stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"mine.yaml": "mine", "pairs.jsonl": "mine"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["16gb/llama-3.1-8"], "did you mean '16gb/llama-3.1-8b'?"),
        (["nothing-like-it"], "`sampo recipes` lists those that ship"),
        (["16gb", "--copy", "x.yaml"], "--copy needs the name of one recipe"),
        (["--copy", "x.yaml"], "--copy needs the name of one recipe"),
        (["quickstart", "--copy", "/proc/nowhere/x.yaml"], "name a folder that can be written"),
        (["quickstart", "--copy", "~nobody-of-this-name/x.yaml"], "there is no home of that name"),
    ],
)
def test_what_cannot_be_done(sampo: Sampo, arguments: list[str], said: str) -> None:
    code, stdout, stderr = sampo("recipes", *arguments)
    assert (code, stdout) == (ExitCode.USAGE, "")
    assert said in stderr
    assert "Traceback" not in stderr


def test_the_page_is_what_the_recipes_say() -> None:
    written = make_recipes.PAGE.read_text(encoding="utf-8")
    assert written == make_recipes.page(), "run: .venv/bin/python -m scripts.make_recipes"
