"""A Hugging Face model card from what a run left behind.

Writes Markdown with the Hub's front matter from what `card_facts.py` found. Nothing of this machine (paths, names of
files) gets into the text. What the files say is shown and does nothing: it is no link, no markup, no front matter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sampo_cli.card_facts import Facts, Tree, list_of, read_facts, run_of, tree_of
from sampo_cli.card_results import Plot, benchmarks_of, bucket_rows, index_of

Rows = list[tuple[str, object]]

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#|~$!])")
_LOCAL_PATH = re.compile(r"(?<![\w./:*])(?:~[\w.-]*)?/[^\s,;]+|(?<!\w)[A-Za-z]:[\\/][^\s,;]*|\\\\\w[^\s,;]*|file:\S+")

LONGEST_TEXT = 500
"""Characters of a value that are shown."""


def model_card(folder: Path, *, repo: str | None = None, merged: bool = False, plots: Sequence[Plot] = ()) -> str:
    """The card of a run, an adapter or a merged model, as the text of a README.md.

    Args:
        folder: a run folder, an adapter folder or a merged model's folder.
        repo: where it will be published, for the title and the example.
        merged: of a run, describe the merged model and not the adapter.
        plots: figures that are published beside the card.
    """
    facts, benchmarks = read_facts(folder, merged=merged), benchmarks_of(run_of(folder))
    sections = [_introduction(facts, repo), _usage(facts, repo), _method(facts), _data(facts), _training(facts)]
    versions = _table("package", "version", sorted(tree_of(facts.summary.get("versions")).items()))
    licence = facts.licence.get("license_name") or facts.licence.get("license")
    known = f" ({_text(licence)})" if licence else ""
    note = f"The base model's licence{known} applies here too; the data's licences may ask for more."
    figures = [f"![{_text(plot.alt)}]({plot.path})" for plot in plots]
    sections += [_evaluation(facts), _benchmarks(benchmarks), _section("Figures", *figures)]
    sections += [_section("Versions", versions), _section("Licence", note)]
    front = _front_matter(facts, index_of(facts, benchmarks), repo)
    return f"---\n{front}\n---\n\n" + "\n\n".join(part for part in sections if part) + "\n"


def _front_matter(facts: Facts, results: list[Any], repo: str | None) -> str:
    from huggingface_hub import ModelCardData

    tags = ["sampo", "preference-optimization", facts.method] if facts.method else []
    tags += ["lora"] if facts.merged else ["lora", "peft"]
    related: Tree = {"base_model_relation": "finetune" if facts.merged else "adapter"} if facts.base else {}
    return ModelCardData(
        base_model=facts.base,
        datasets=list(facts.datasets) or None,
        library_name="transformers" if facts.merged else "peft",
        pipeline_tag="text-generation",
        tags=tags,
        model_name=(repo or "model").split("/")[-1] if results else None,
        eval_results=results or None,
        **related,
        **facts.licence,
    ).to_yaml()


def _text(value: object) -> str:
    """A value as one line of Markdown that shows it and does nothing else; a local path becomes `…`."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"
    if isinstance(value, list):
        return ", ".join(_text(str(item)) for item in value)
    visible = "".join(character for character in " ".join(str(value).split()) if character.isprintable())
    flat = _LOCAL_PATH.sub("…", visible[:LONGEST_TEXT])
    return _MARKDOWN.sub(r"\\\1", flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def _table(name: str, value: str, rows: Rows) -> str:
    """A Markdown table of the rows that have a value; empty without any."""
    lines = [f"| {_text(left)} | {_text(right)} |" for left, right in rows if right is not None and right != ""]
    return "\n".join([f"| {name} | {value} |", "|---|---|", *lines]) if lines else ""


def _section(title: str, *parts: str) -> str:
    """A heading and its paragraphs; empty without any."""
    return "\n\n".join([f"## {title}", *filter(None, parts)]) if any(parts) else ""


def _link(name: str, kind: str = "") -> str:
    return f"[{_text(name)}](https://huggingface.co/{kind}{name})"


def _introduction(facts: Facts, repo: str | None) -> str:
    what = "fine-tune of" if facts.merged else "LoRA adapter for"
    base = _link(facts.base) if facts.base else "a model without a public name"
    how = f", tuned on preference pairs (method: {_text(facts.method)})" if facts.method else ""
    lines = [f"# {_text((repo or 'A tuned model').split('/')[-1])}", f"A {what} {base}{how}."]
    if not facts.merged and facts.base is None:
        lines.append("Its adapter_config.json names no base model. Load the model that it was trained on first.")
    steps = tree_of(facts.summary.get("steps"))
    if facts.summary.get("state", "finished") != "finished":
        done, planned = _text(steps.get("done", "?")), _text(steps.get("planned", "?"))
        lines.append(f"**The run is not complete**: {done} of {planned} steps were done.")
    return "\n\n".join(lines)


_EXAMPLE = """messages = [{"role": "user", "content": "What is a hash table?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs.to(model.device), max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""


def _usage(facts: Facts, repo: str | None) -> str:
    here = json.dumps(repo or "path/to/this/folder")
    lines = [] if facts.merged else ["from peft import PeftModel"]
    lines += ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({here})")
    if facts.merged:
        lines.append(f'model = AutoModelForCausalLM.from_pretrained({here}, dtype="auto")')
    else:
        base = json.dumps(facts.base or "path/to/the/base/model")
        revision = f"revision={json.dumps(facts.base_revision)}, " if facts.base_revision else ""
        lines.append(f'model = AutoModelForCausalLM.from_pretrained({base}, {revision}dtype="auto")')
        lines.append(f"model = PeftModel.from_pretrained(model, {here})")
    return _section("Use", "\n".join(["```python", *lines, "", _EXAMPLE, "```"]))


def _method(facts: Facts) -> str:
    from sampo_cli.method_table import METHODS

    if facts.method not in METHODS:
        return ""
    method = METHODS[facts.method]
    blocks = f"```text\n{method.formula}\n```", f"```bibtex\n{method.citation}\n```"
    return _section("Method", f"{_text(method.name)}, {method.paper}:", *blocks)


def _data(facts: Facts) -> str:
    pairs = tree_of(facts.summary.get("pairs"))
    names = [_link(name, "datasets/") for name in facts.datasets]
    names += [f"{facts.local_data} local source{'s' * (facts.local_data > 1)}"] if facts.local_data else []
    counts = (("rows read", "rows"), ("pairs trained on", "train"), ("pairs held out", "eval"))
    rows: Rows = [(name, pairs.get(key)) for name, key in counts]
    for what in ("dropped", "truncated"):
        rows += [(f"{what}: {reason}", count) for reason, count in tree_of(pairs.get(what)).items() if count]
    return _section("Data", f"Preference pairs from {', '.join(names)}." * bool(names), _table("pairs", "count", rows))


def _benchmarks(rows: Sequence[Tree]) -> str:
    shown: Rows = []
    for row in rows:
        error = "" if row.get("stderr") is None else f" ± {_text(row['stderr'])}"
        name = f"{row['title']} ({row['metric']}, {row.get('shots')} shots)"
        shown.append((name, f"{_text(row['value'])}{error}"))
    return _section("Benchmarks", _table("task", "value", shown))


_RECIPE_ROWS = (
    ("method", ("beta", "reduction", "sampling", "draws", "label_smoothing", "sft_weight")),
    ("method", ("gamma", "dpop_weight", "length_weight", "kl_weight")),
    ("lora", ("r", "alpha", "dropout", "targets", "rslora", "dora")),
    ("train", ("learning_rate", "scheduler", "warmup_ratio", "epochs", "max_steps", "batch_pairs", "optimizer")),
    ("train", ("weight_decay", "max_grad_norm", "seed")),
    ("data", ("max_length",)),
)


def _training(facts: Facts) -> str:
    model, steps = tree_of(facts.summary.get("model")), tree_of(facts.summary.get("steps"))
    resolved = {**facts.recipe, "method": tree_of(facts.recipe.get("method")) | tree_of(facts.summary.get("method"))}
    rows: Rows = [("base weights", model.get("quantization")), ("dtype", model.get("dtype"))]
    for section, keys in _RECIPE_ROWS:
        rows += [(f"{section}.{key}", tree_of(resolved.get(section)).get(key)) for key in keys]
    rows += [("steps", steps.get("done")), ("step of these weights", facts.summary.get("adapter_step"))]
    rows += [(name, facts.summary.get(name)) for name in ("device", "seconds")]
    further = "It goes on from an earlier adapter, which is also its reference." if model.get("adapter") else ""
    ends = [_text(tree_of(row).get("margin")) for row in list_of(facts.summary.get("rounds"))]
    rounds = (
        f"Trained in {len(ends) + 1} rounds, each with the policy before it as reference; held-out margins: {ends}."
    )
    return _section("Training", further, rounds if ends else "", _table("setting", "value", rows))


def _evaluation(facts: Facts) -> str:
    held_out, generated = tree_of(facts.summary.get("evaluation")), tree_of(facts.summary.get("generated"))
    keys = ("pairs", "step", "accuracy", "margin", "loss", "chosen_reward", "rejected_reward")
    rewards = _table("held-out pairs", "value", [(key.replace("_", " "), held_out.get(key)) for key in keys])
    names = (("prompts", "prompts"), ("base_tokens", "tokens, base"), ("adapter_tokens", "tokens, tuned"))
    lengths = _table("generated", "value", [(name, generated.get(key)) for key, name in names])
    parts = ["Pairs held out at random from the same data, not seen in training:", rewards] if rewards else []
    buckets = _table("chosen response is", "accuracy", bucket_rows(held_out))
    parts += ["Accuracy by how long the chosen response is, compared with the other:", buckets] if buckets else []
    parts += ["Mean length of the answers, before and after:", lengths] if lengths else []
    return _section("Evaluation", *parts)
