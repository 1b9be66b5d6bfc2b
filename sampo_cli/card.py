"""A Hugging Face model card from what a run left behind.

Reads recipe.yaml and summary.json of a run folder, or the configs of a lone adapter or merged model, and writes
Markdown with the Hub's front matter. No network, no weights, and nothing of this machine (paths, names of files) gets
into the text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sampo_cli.errors import ModelError
from sampo_cli.fingerprint import read_json
from sampo_cli.remote import is_path_like

Tree = dict[str, Any]
Rows = list[tuple[str, object]]

_LICENCE = ("license", "license_name", "license_link")
_FRONT_MATTER = re.compile(r"\A\s*---\s*\n(.*?)\n---", re.DOTALL)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#|~$!])")
_LOCAL_PATH = re.compile(r"(?<![\w./:*])(?:~[\w.-]*)?/[^\s,;]+|(?<!\w)[A-Za-z]:[\\/][^\s,;]*|\\\\\w[^\s,;]*|file:\S+")


@dataclass(frozen=True)
class Facts:
    """What is known of an adapter or a merged model, whatever it was read from.

    Attributes:
        base: the base model's name on the Hub, or None where it is a local folder or unknown.
        merged: a whole model, not an adapter.
        datasets: names on the Hub; `local_data` counts the sources that are files or folders.
        licence: `license`, `license_name` and `license_link` of the base, where known.
        recipe, summary: what the run folder says; empty without a run.
    """

    base: str | None
    base_revision: str | None
    merged: bool
    method: str | None
    datasets: tuple[str, ...]
    local_data: int
    licence: Tree
    recipe: Tree = field(repr=False)
    summary: Tree = field(repr=False)


def model_card(folder: Path, *, repo: str | None = None, merged: bool = False) -> str:
    """The card of a run, an adapter or a merged model, as the text of a README.md.

    Args:
        folder: a run folder, an adapter folder or a merged model's folder.
        repo: where it will be published, for the title and the example.
        merged: of a run, describe the merged model and not the adapter.
    """
    facts = read_facts(folder, merged=merged)
    sections = [_introduction(facts, repo), _usage(facts, repo), _method(facts), _data(facts), _training(facts)]
    versions = _table("package", "version", sorted(_tree(facts.summary.get("versions")).items()))
    licence = facts.licence.get("license_name") or facts.licence.get("license")
    known = f" ({_text(licence)})" if licence else ""
    note = f"The base model's licence{known} applies here too; the data's licences may ask for more."
    sections += [_evaluation(facts), _section("Versions", versions), _section("Licence", note)]
    return f"---\n{_front_matter(facts)}\n---\n\n" + "\n\n".join(part for part in sections if part) + "\n"


def read_facts(folder: Path, *, merged: bool = False) -> Facts:
    """What the files in `folder` (a run, an adapter or a merged model) say."""
    run = run_of(folder)
    part = folder / ("merged" if merged else "adapter") if (folder / "summary.json").is_file() else folder
    config, own = read_tree(part / "adapter_config.json"), read_tree(part / "sampo.json")
    summary = read_tree(run / "summary.json") if run else {}
    recipe = read_tree(run / "recipe.yaml") if run else {}
    model, near = _tree(summary.get("model")), run or folder
    named = model.get("name") or own.get("base_model") or config.get("base_model_name_or_path")
    commit = model.get("commit")
    base = hub_id(named, near=near, commit=commit)
    listed = [str(name) for name in _tree(recipe.get("data")).get("sources") or []]
    sources = [None if is_path_like(name) else hub_id(name.partition(":")[0], near=near) for name in listed]
    return Facts(
        base=base,
        base_revision=commit if base and isinstance(commit, str) else None,
        merged=merged or (part / "config.json").is_file(),
        method=_tree(summary.get("method")).get("name") or own.get("method"),
        datasets=tuple(dict.fromkeys(name for name in sources if name)),
        local_data=sources.count(None),
        licence=_licence(base, commit, named),
        recipe=recipe,
        summary=summary,
    )


def run_of(folder: Path) -> Path | None:
    """The run folder that `folder` is, or that it is the adapter or merged model of; None without a run."""
    whole = folder.resolve()
    places = [folder, whole.parent] if whole.name in ("adapter", "merged") else [folder]
    return next((place for place in places if (place / "summary.json").is_file()), None)


def hub_id(name: object, *, near: Path, commit: object = None) -> str | None:
    """`name` if it can only be a name on the Hub, else None.

    Args:
        near: a folder of the run; a relative path that exists from here, there or above is a local folder.
        commit: the Hub's commit where one is known, which settles it.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(name, str) or not name or is_path_like(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    places = [Path.cwd(), near.resolve(), *near.resolve().parents]
    return name if commit or not any((place / name).exists() for place in places) else None


def _tree(value: object) -> Tree:
    return value if isinstance(value, dict) else {}


def read_tree(path: Path) -> Tree:
    """What a JSON or YAML file of ours holds; empty where there is none, a ModelError where it is broken."""
    if not path.is_file():
        return {}
    if path.suffix == ".json":
        return read_json(path)
    try:
        return _tree(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error


def _licence(base: str | None, commit: object, named: object) -> Tree:
    """Licence fields of the base's own card: from its folder or the Hub's cache, never from the network."""
    from huggingface_hub import try_to_load_from_cache

    card: object = None
    if base is not None:
        card = try_to_load_from_cache(base, "README.md", revision=commit if isinstance(commit, str) else None)
    elif isinstance(named, str):
        card = str(Path(named).expanduser() / "README.md")
    if not isinstance(card, str) or not Path(card).is_file():
        return {}
    front = _FRONT_MATTER.match(Path(card).read_text(encoding="utf-8", errors="replace"))
    try:
        metadata = _tree(yaml.safe_load(front[1])) if front else {}
    except yaml.YAMLError:
        return {}
    licence = {key: metadata[key] for key in _LICENCE if isinstance(metadata.get(key), str)}
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence.get("license", "")):
        return {}
    link = licence.pop("license_link", "")
    if base and re.fullmatch(r"\w[\w.-]*", link):
        link = f"https://huggingface.co/{base}/blob/main/{link}"
    return licence | ({"license_link": link} if link.startswith("https://") else {})


def _front_matter(facts: Facts) -> str:
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
        **related,
        **facts.licence,
    ).to_yaml()


def _text(value: object) -> str:
    """A value as one line of Markdown that shows it and does nothing else; a local path becomes `…`."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    flat = _LOCAL_PATH.sub("…", " ".join(str(value).split()))
    return _MARKDOWN.sub(r"\\\1", flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def _table(name: str, value: str, rows: Rows) -> str:
    """A Markdown table of the rows that have a value; empty without any."""
    lines = [f"| {_text(left)} | {_text(right)} |" for left, right in rows if right is not None and right != ""]
    return "\n".join([f"| {name} | {value} |", "|---|---|", *lines]) if lines else ""


def _section(title: str, *parts: str) -> str:
    """A heading and its paragraphs; empty without any."""
    return "\n\n".join([f"## {title}", *filter(None, parts)]) if any(parts) else ""


def _link(name: str, kind: str = "") -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})"


def _introduction(facts: Facts, repo: str | None) -> str:
    what = "fine-tune of" if facts.merged else "LoRA adapter for"
    base = _link(facts.base) if facts.base else "a model without a public name"
    how = f", tuned on preference pairs (method: {_text(facts.method)})" if facts.method else ""
    lines = [f"# {(repo or 'A tuned model').split('/')[-1]}", f"A {what} {base}{how}."]
    if not facts.merged and facts.base is None:
        lines.append("Its adapter_config.json names no base model. Load the model that it was trained on first.")
    steps = _tree(facts.summary.get("steps"))
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
    from sampo_cli.methods import METHODS

    if facts.method not in METHODS:
        return ""
    method = METHODS[facts.method]
    blocks = f"```text\n{method.formula}\n```", f"```bibtex\n{method.citation}\n```"
    return _section("Method", f"{_text(method.name)}, {method.paper}:", *blocks)


def _data(facts: Facts) -> str:
    pairs = _tree(facts.summary.get("pairs"))
    names = [_link(name, "datasets/") for name in facts.datasets]
    names += [f"{facts.local_data} local source{'s' * (facts.local_data > 1)}"] if facts.local_data else []
    counts = (("rows read", "rows"), ("pairs trained on", "train"), ("pairs held out", "eval"))
    rows: Rows = [(name, pairs.get(key)) for name, key in counts]
    for what in ("dropped", "truncated"):
        rows += [(f"{what}: {reason}", count) for reason, count in _tree(pairs.get(what)).items() if count]
    return _section("Data", f"Preference pairs from {', '.join(names)}." * bool(names), _table("pairs", "count", rows))


_RECIPE_ROWS = (
    ("method", ("beta", "reduction", "sampling", "draws", "label_smoothing", "sft_weight")),
    ("method", ("gamma", "dpop_weight", "length_weight", "kl_weight")),
    ("lora", ("r", "alpha", "dropout", "targets", "rslora", "dora")),
    ("train", ("learning_rate", "scheduler", "warmup_ratio", "epochs", "max_steps", "batch_pairs", "optimizer")),
    ("train", ("weight_decay", "max_grad_norm", "seed")),
    ("data", ("max_length",)),
)


def _training(facts: Facts) -> str:
    model, steps = _tree(facts.summary.get("model")), _tree(facts.summary.get("steps"))
    resolved = {**facts.recipe, "method": _tree(facts.recipe.get("method")) | _tree(facts.summary.get("method"))}
    rows: Rows = [("base weights", model.get("quantization")), ("dtype", model.get("dtype"))]
    for section, keys in _RECIPE_ROWS:
        rows += [(f"{section}.{key}", _tree(resolved.get(section)).get(key)) for key in keys]
    rows += [("steps", steps.get("done")), ("step of these weights", facts.summary.get("adapter_step"))]
    rows += [(name, facts.summary.get(name)) for name in ("device", "seconds")]
    further = "It goes on from an earlier adapter, which is also its reference." if model.get("adapter") else ""
    ends = [_text(_tree(row).get("margin")) for row in facts.summary.get("rounds") or []]
    rounds = (
        f"Trained in {len(ends) + 1} rounds, each with the policy before it as reference; held-out margins: {ends}."
    )
    return _section("Training", further, rounds if ends else "", _table("setting", "value", rows))


def _evaluation(facts: Facts) -> str:
    held_out, generated = _tree(facts.summary.get("evaluation")), _tree(facts.summary.get("generated"))
    keys = ("pairs", "step", "accuracy", "margin", "loss", "chosen_reward", "rejected_reward")
    rewards = _table("held-out pairs", "value", [(key.replace("_", " "), held_out.get(key)) for key in keys])
    names = (("prompts", "prompts"), ("base_tokens", "tokens, base"), ("adapter_tokens", "tokens, tuned"))
    lengths = _table("generated", "value", [(name, generated.get(key)) for key, name in names])
    parts = ["Pairs held out at random from the same data, not seen in training:", rewards] if rewards else []
    parts += ["Mean length of the answers, before and after:", lengths] if lengths else []
    return _section("Evaluation", *parts)
