"""The model card: what it says of a run, and what it must not say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from sampo_cli.card import model_card
from sampo_cli.card_facts import hub_id
from sampo_cli.card_results import Plot
from sampo_cli.errors import ModelError
from sampo_cli.method_table import METHODS

BASE = "meta-llama/Meta-Llama-3-8B-Instruct"
COMMIT = "8afb486c1db24fe5011ec46dfbe5b5dccdb575c2"

SUMMARY: dict[str, Any] = {
    "format": 1,
    "state": "finished",
    "model": {
        **{"name": BASE, "revision": None, "commit": COMMIT, "fingerprint": "ab" * 16},
        **{"quantization": "nf4", "dtype": "bfloat16", "adapter": None},
    },
    "method": {"name": "sampo", "beta": 0.1, "reduction": "sample", "sampling": "paired", "label_smoothing": 0.0},
    "pairs": {
        **{"rows": 284, "train": 266, "eval": 14},
        **{"dropped": {"identical": 3, "empty": 1, "too long": 0}, "truncated": {"prompt": 7}},
    },
    "steps": {"done": 17, "planned": 17},
    "adapter_step": 15,
    "evaluation": {
        **{"step": 15, "loss": 0.61234, "accuracy": 0.7857, "margin": 0.21},
        **{"chosen_reward": 0.05, "rejected_reward": -0.16, "pairs": 14},
    },
    "generated": {"prompts": 8, "base_tokens": 212.4, "adapter_tokens": 143.9},
    "versions": {"sampo": "0.1.0", "torch": "2.13.0"},
    "device": "NVIDIA H200",
    "seconds": 1234.5,
}
RECIPE: dict[str, Any] = {
    "model": {"name": BASE, "quantization": "nf4"},
    "data": {"sources": ["Intel/orca_dpo_pairs:train", "Intel/orca_dpo_pairs"], "max_length": 2048},
    "lora": {"r": 16, "alpha": 32, "dropout": 0.0, "targets": "all-linear", "rslora": False, "dora": False},
    "method": {"name": "sampo", "beta": None},
    "train": {"epochs": 1.0, "max_steps": None, "batch_pairs": 16, "learning_rate": 2e-5, "seed": 42},
}


def make_run(folder: Path, summary: dict[str, Any] = SUMMARY, recipe: dict[str, Any] = RECIPE) -> Path:
    """A run's folder with everything that a card is made from, and an adapter's config."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    config = {"base_model_name_or_path": summary["model"]["name"], "peft_type": "LORA", "r": 16}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return folder


def front_matter(card: str) -> dict[str, Any]:
    """The metadata as the Hub's own client reads it."""
    data: dict[str, Any] = ModelCard(card).data.to_dict()  # type: ignore[no-untyped-call]
    return data


def cell(card: str, name: str) -> str:
    """The value beside `name` in one of the card's tables."""
    (row,) = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
    return row.split("|")[2].strip()


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No base model of this machine's own cache gets into a card."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return cache


def test_front_matter_of_an_adapter(tmp_path: Path) -> None:
    data = front_matter(model_card(make_run(tmp_path / "run"), repo="tester/tiny"))
    assert data == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "datasets": ["Intel/orca_dpo_pairs"],
        "library_name": "peft",
        "model-index": [{"name": "tiny", "results": data["model-index"][0]["results"]}],
        "pipeline_tag": "text-generation",
        "tags": ["sampo", "preference-optimization", "lora", "peft"],
    }


def test_the_index_holds_what_was_measured(tmp_path: Path) -> None:
    """The held-out pairs, and the benchmarks that sampo eval wrote; a row that is none of its own is left out."""
    run = make_run(tmp_path / "run")
    (run / "eval").mkdir()
    row = {"task": "gsm8k", "title": "GSM8K", "metric": "exact_match,strict-match", "value": 0.25, "stderr": 0.01}
    rows = [row | {"shots": 5}, row | {"title": "[x](http://evil)"}, row | {"value": "0.9"}, {"task": 3}]
    (run / "eval" / "suite.json").write_text(json.dumps({"suite": "x", "results": rows}))
    (run / "eval" / "answers.json").write_text("[]")
    (run / "eval" / "broken.json").write_text("{")
    card = model_card(run, repo="tester/tiny")
    (index,) = front_matter(card)["model-index"]
    found = {result["dataset"]["name"]: result["metrics"] for result in index["results"]}
    orca = "Intel/orca_dpo_pairs, held out"
    assert found[orca][0] == {"type": "accuracy", "value": 0.7857, "name": "Held-out preference accuracy"}
    assert found["GSM8K"] == [{"type": "exact_match", "value": 0.25, "name": "exact_match,strict-match"}]
    assert set(found) == {orca, "GSM8K"}
    assert cell(card, r"GSM8K \(exact\_match,strict-match, 5 shots\)") == "0.25 ± 0.01"


def test_accuracy_by_length_and_figures_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    buckets = [{"name": "much longer", "pairs": 4, "accuracy": 0.75}, {"name": "similar", "pairs": 0, "accuracy": None}]
    summary["evaluation"]["length_bias"] = {"spearman": 0.1, "buckets": buckets}
    (run / "summary.json").write_text(json.dumps(summary))
    card = model_card(run, plots=[Plot("plots/loss.png", "Loss [x](y)", b"")])
    assert cell(card, r"much longer \(4 pairs\)") == "0.75"
    assert "similar" not in card
    assert r"![Loss \[x\]\(y\)](plots/loss.png)" in card


def test_front_matter_of_a_merged_model(tmp_path: Path) -> None:
    card = model_card(make_run(tmp_path / "run"), repo="tester/tiny", merged=True)
    data = front_matter(card)
    assert (data["library_name"], data["base_model_relation"]) == ("transformers", "finetune")
    assert data["tags"] == ["sampo", "preference-optimization", "lora"]
    assert 'AutoModelForCausalLM.from_pretrained("tester/tiny", dtype="auto")' in card
    assert "peft" not in card


def test_numbers_of_the_run(tmp_path: Path) -> None:
    card = model_card(make_run(tmp_path / "run"), repo="tester/tiny")
    expected = {
        **{"rows read": "284", "pairs trained on": "266", "pairs held out": "14"},
        **{"dropped: identical": "3", "dropped: empty": "1", "truncated: prompt": "7"},
        **{"accuracy": "0.7857", "margin": "0.21", "loss": "0.6123", "rejected reward": "-0.16"},
        **{"prompts": "8", "tokens, base": "212.4", "tokens, tuned": "143.9"},
        **{"method.beta": "0.1", "lora.r": "16", "train.learning\\_rate": "2e-05", "lora.dora": "no", "steps": "17"},
        **{"step of these weights": "15", "base weights": "nf4", "torch": "2.13.0", "seconds": "1234"},
    }
    assert {name: cell(card, name) for name in expected} == expected
    assert "too long" not in card
    assert f"[{BASE}](https://huggingface.co/{BASE})" in card
    assert f'revision="{COMMIT}"' in card


def test_formula_and_citation_come_from_the_table_of_methods(tmp_path: Path) -> None:
    card = model_card(make_run(tmp_path / "run"))
    assert f"```text\n{METHODS['sampo'].formula}\n```" in card
    assert f"```bibtex\n{METHODS['sampo'].citation}\n```" in card
    assert METHODS["sampo"].paper in card


def test_nothing_of_this_machine_gets_into_the_card(tmp_path: Path) -> None:
    home = tmp_path / "home" / "ann"
    base = home / "models" / "llama"
    base.mkdir(parents=True)
    summary = SUMMARY | {
        "model": SUMMARY["model"] | {"name": str(base), "commit": None, "adapter": f"{home}/sft"},
        "pairs": SUMMARY["pairs"] | {"dropped": {f"broken row in {home}/pairs.jsonl": 2, r"C:\Users\ann\x.csv": 1}},
        "versions": {"sampo": f"0.1.0 at {home}/src"},
    }
    recipe = RECIPE | {
        "data": {"sources": [f"{home}/pairs.jsonl", "pairs.jsonl", "Intel/orca_dpo_pairs"], "max_length": 2048}
    }
    card = model_card(make_run(home / "outputs" / "secret", summary, recipe), repo="tester/tiny")
    assert "base_model" not in front_matter(card)
    assert "2 local sources" in card
    assert [word for word in ("ann", "home", "pairs.jsonl", "secret", str(tmp_path)) if word in card] == []
    assert cell(card, "dropped: broken row in …") == "2"


def test_a_relative_folder_that_looks_like_a_name_is_local(tmp_path: Path) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    elsewhere = tmp_path / "outputs" / "run"
    assert hub_id("models/llama", near=elsewhere) is None
    assert hub_id("models/llama", near=elsewhere, certain=True) == "models/llama"
    assert hub_id("meta-llama/x", near=elsewhere) == "meta-llama/x"
    names = ("", None, "/abs/x", "./x", "~/x", "a/b/c", "a b/c", "a\\b", "a--b/c", "x.jsonl", "a/b.git")
    assert [name for name in names if hub_id(name, near=elsewhere)] == []


def test_markdown_in_the_data_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    reason = "bad | cell [x](http://evil) <script>\n# head `code` $x$"
    summary = SUMMARY | {"pairs": SUMMARY["pairs"] | {"dropped": {reason: 5}}}
    card = model_card(make_run(tmp_path / "run", summary))
    row = next(line for line in card.splitlines() if "bad" in line)
    assert row == r"| dropped: bad \| cell \[x\]\(http://evil\) &lt;script&gt; \# head \`code\` \$x\$ | 5 |"


HOSTILE = [
    "a`b``c",
    "a | b",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](https://evil.example)",
    "![x](https://evil.example/x.png)",
    "# Heading",
    "a\n# Heading",
    "a\n---\nlicense: evil\n---",
    "x\n\n```\n<script>",
    "{{ 1 }} {% raw %} $x$ ~~x~~ *x* _x_ \\\\",
    "a\x1b[31mred",
    "\u202eabc",
    "x: y\nz: [",
    "&lt;script&gt;",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_whatever_the_files_say_is_text(tmp_path: Path, text: str) -> None:
    """The same lines, headings, code blocks and front matter as with the word "plain" in all these places."""

    def card(word: object, folder: str) -> str:
        summary = SUMMARY | {
            "model": SUMMARY["model"] | {"name": word, "commit": word, "adapter": word, "quantization": word},
            "method": {"name": word, "beta": word, "reduction": [word, word]},
            "pairs": SUMMARY["pairs"] | {"dropped": {str(word): 3}, "rows": word},
            "evaluation": {"step": word, "loss": word},
            "generated": {"prompts": word},
            "versions": {str(word): word},
            **{"device": word, "adapter_step": word, "rounds": [{"margin": word}], "state": "finished"},
        }
        recipe = RECIPE | {
            "data": {"sources": [word, "Intel/orca_dpo_pairs"]},
            "lora": {"r": word, "targets": [word]},
            "train": {"optimizer": word},
        }
        run = make_run(tmp_path / folder, summary, recipe)
        (run / "adapter" / "sampo.json").write_text(json.dumps({"base_model": word, "method": word}))
        return model_card(run, repo="tester/tiny")

    hostile, plain = card(text, "hostile"), card("plain text", "plain")
    shown, expected = (card.partition("\n---\n\n")[2] for card in (hostile, plain))
    assert shown.count("\n") == expected.count("\n") > 60
    marks = [[line for line in text.splitlines() if line.startswith(("#", "---", "```"))] for text in (shown, expected)]
    assert marks[0] == marks[1]
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert all(len(re.split(r"(?<!\\)\|", row)) == 4 for row in rows)
    outside_of_code = "".join(shown.split("```")[::2])
    assert not re.search(r"<\w|(?<!\\)\[click|(?<!\\)`a|[\x00-\x09\x0b-\x1f\x7f\u202e]", outside_of_code)
    data = front_matter(hostile)
    assert set(data) == {"datasets", "library_name", "pipeline_tag", "tags"}
    assert data["tags"] == ["lora", "peft"]
    assert "Intel/orca_dpo_pairs" in data["datasets"]


@pytest.mark.parametrize(
    "commit", ["../../x", 'main"\n```\n<script>', "main", COMMIT.upper(), COMMIT + "\n", 7, [COMMIT]]
)
def test_a_commit_is_forty_hex_digits(tmp_path: Path, commit: object) -> None:
    """It goes into the example's code and into a path of the cache, and says that the base is no local folder."""
    summary = SUMMARY | {"model": SUMMARY["model"] | {"commit": commit}}
    card = model_card(make_run(tmp_path / "run", summary), repo="tester/tiny")
    assert front_matter(card)["base_model"] == BASE
    assert "revision=" not in card
    assert "script" not in card
    (tmp_path / BASE).mkdir(parents=True)
    assert "base_model" not in front_matter(model_card(tmp_path / "run", repo="tester/tiny"))


@pytest.mark.parametrize("value", [None, True, 3, 1e400, "x", [], [[[]]], {}, {"a": {"b": []}}, "\x00"])
@pytest.mark.parametrize("key", ["model", "method", "pairs", "steps", "evaluation", "generated", "versions", "rounds"])
def test_values_of_other_types_do_no_harm(tmp_path: Path, key: str, value: object) -> None:
    card = model_card(make_run(tmp_path / "run", SUMMARY | {"state": value}), repo="tester/tiny")
    (tmp_path / "run" / "summary.json").write_text(json.dumps(SUMMARY | {key: value}))
    for section in ("data", "lora", "method", "train"):
        (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {section: value, key: value}))
        assert front_matter(model_card(tmp_path / "run", repo="tester/tiny"))["pipeline_tag"] == "text-generation"
    assert "# tiny" in card


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        (
            "license: other\nlicense_name: llama3\nlicense_link: LICENSE",
            {
                "license": "other",
                "license_name": "llama3",
                "license_link": f"https://huggingface.co/{BASE}/blob/main/LICENSE",
            },
        ),
        ("license: [a, b]", {}),
        ("license: 'ask Bob'", {}),
        ("language: en", {}),
    ],
)
def test_licence_of_a_base_in_the_cache(
    tmp_path: Path, empty_cache: Path, front: str, expected: dict[str, str]
) -> None:
    folder = empty_cache / f"models--{BASE.replace('/', '--')}" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(f"---\n{front}\n---\n# Base\n")
    data = front_matter(model_card(make_run(tmp_path / "run")))
    assert {key: value for key, value in data.items() if key.startswith("license")} == expected


def test_licence_of_a_local_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\nlicense_link: LICENSE\n---\n")
    summary = SUMMARY | {"model": SUMMARY["model"] | {"name": str(base), "commit": None}}
    card = model_card(make_run(tmp_path / "run", summary))
    data = front_matter(card)
    assert (data["license"], "license_link" in data) == ("mit", False)
    assert "The base model's licence (mit) applies here too" in card


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    summary = SUMMARY | {"state": "interrupted", "steps": {"done": 5, "planned": 17}, "evaluation": None}
    card = model_card(make_run(tmp_path / "run", summary | {"generated": None}))
    assert "**The run is not complete**: 5 of 17 steps were done." in card
    assert "## Evaluation" not in card


def test_a_lone_adapter_has_a_short_card(tmp_path: Path) -> None:
    folder = tmp_path / "lone"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M"}))
    (folder / "sampo.json").write_text(json.dumps({"format": 1, "method": "dpo"}))
    card = model_card(folder)
    data = front_matter(card)
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert data["tags"] == ["sampo", "preference-optimization", "dpo", "lora", "peft"]
    assert "arXiv 2305.18290" in card
    assert [part for part in ("## Data", "## Training", "## Evaluation") if part in card] == []


def test_a_lone_merged_model_and_a_part_of_a_run(tmp_path: Path) -> None:
    lone = tmp_path / "model"
    lone.mkdir()
    (lone / "config.json").write_text("{}")
    assert front_matter(model_card(lone))["library_name"] == "transformers"
    run = make_run(tmp_path / "run")
    assert model_card(run / "adapter", repo="a/b") == model_card(run, repo="a/b")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "recipe.yaml").write_text("model: [")
    with pytest.raises(ModelError, match=r"recipe\.yaml: cannot be read"):
        model_card(run)
