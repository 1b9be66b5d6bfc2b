"""Writes docs/reference.md from the program: commands, recipe keys, methods, metrics, exit codes.

Run it after a change of any of these; a test compares the page with what this would write. What the program cannot
say of itself (metrics keys, environment variables) is in the two tables below.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer.main

from sampo_cli.cli import app
from sampo_cli.config import Recipe
from sampo_cli.early_stopping import AIMS
from sampo_cli.errors import ExitCode, SampoError
from sampo_cli.method_table import METHODS
from sampo_cli.options import FLAGS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"

HEADER = """# Reference

<!-- Written by scripts/make_reference.py. Do not edit: change the program, then run the script. -->

[Commands](#commands) · [Recipe keys](#recipe-keys) · [Methods](#methods) · [metrics.jsonl](#metricsjsonl) ·
[Exit codes](#exit-codes) · [Environment](#environment)
"""

BOTH, TRAIN, EVAL, GENERATE = "train, eval", "train", "eval", "generate"
ALL = f"{BOTH}, {GENERATE}"
METRICS = [
    (
        "kind",
        ALL,
        "`train`: an optimizer step; `eval`: the held-out pairs; `generate`: answers to `train.generate.prompts`",
    ),
    ("step", ALL, "optimizer steps taken, from 1; 0 for the answers before the first"),
    ("epoch", TRAIN, "passes over the training pairs after this step"),
    ("loss", BOTH, "mean over pairs, nats"),
    ("chosen_reward", BOTH, "beta times the reduced log-ratio of the chosen response, mean over pairs"),
    ("rejected_reward", BOTH, "the same of the rejected response"),
    ("margin", BOTH, "chosen reward minus rejected reward, mean over pairs"),
    ("accuracy", BOTH, "share of pairs with a margin above 0"),
    ("chosen_logps", BOTH, "reduced log-prob of the chosen response under the policy, nats, mean over pairs"),
    ("rejected_logps", BOTH, "the same of the rejected response"),
    ("kept_tokens", BOTH, "response tokens that the reduction counts, sum over pairs"),
    ("response_tokens", BOTH, "all response tokens, sum over pairs"),
    ("pairs", BOTH, "pairs of this step, or held-out pairs"),
    ("nonfinite", BOTH, "pairs left out as something was not finite, with `train.on_nonfinite: skip`; 0 otherwise"),
    ("computed_tokens", BOTH, "positions of one forward pass over these pairs, padding included"),
    (
        "kl_per_token",
        EVAL,
        "KL of policy to reference by the estimator k3, nats per response token; null without a reference",
    ),
    ("kl_per_response", EVAL, "the same per response: summed over its tokens, mean over chosen and rejected responses"),
    ("kl_per_token_k1", EVAL, "by k1, the mean log-ratio per response token; may be negative"),
    ("kl_per_response_k1", EVAL, "by k1, per response"),
    ("length_bias", EVAL, "how far the margin follows length, see below"),
    (
        "sum_margin",
        EVAL,
        "mean margin of DPO's reward on the same forward: beta times the sum over all tokens of both responses",
    ),
    ("sum_accuracy", EVAL, "share of pairs in which that is above 0"),
    ("sum_length_bias", EVAL, "`length_bias` of that margin"),
    ("prompts", GENERATE, "prompts answered"),
    ("tokens", GENERATE, "mean length of the adapter's answers, tokens, the one that ends the turn included"),
    ("median_tokens", GENERATE, "median length"),
    ("ended", GENERATE, "share of answers that end by themselves before `train.generate.max_new_tokens`"),
    ("repetition", GENERATE, "share of 4-grams of an answer that were in it before, mean over answers"),
    ("base_tokens", GENERATE, "`tokens` of the base's answers to the same prompts"),
    ("base_median_tokens", GENERATE, "`median_tokens` of the base"),
    ("base_ended", GENERATE, "`ended` of the base"),
    ("base_repetition", GENERATE, "`repetition` of the base"),
    ("length_ratio", GENERATE, "`tokens` by `base_tokens`"),
    ("learning_rate", TRAIN, "the rate of this step"),
    ("grad_norm", TRAIN, "norm of the adapter's gradient before clipping; null for a step that was skipped"),
    ("tokens_per_second", TRAIN, "`computed_tokens` by the wall-clock time of the step"),
    ("memory_bytes", TRAIN, "peak allocated bytes on a GPU; resident bytes of the process on a CPU"),
    ("seconds", TRAIN, "wall-clock time of the step"),
]

METRICS_NOTES = """
**Length bias** is an object: `spearman`, the rank correlation of margin and length gap (chosen minus rejected response,
tokens), null where either is constant; and `buckets`, a list from chosen much shorter to much longer with `name`,
`pairs` and `accuracy`. The buckets' edges are gaps of -50 %, -10 %, 10 % and 50 % of the longer response. A method
without a reference has no log-ratios, and its `sum_` numbers are of the policy's log-probs.

**KL.** With r = log pi(token) - log ref(token), k1 is r and k3 is exp(-r) - 1 + r, in the terms of Schulman's
"Approximating KL divergence" (joschu.net/blog/kl-approx.html). Both estimate the KL where tokens are drawn from the
policy. These are the tokens of the held-out responses, which the policy did not write: the numbers say how far the two
models are apart on this data, not on what the policy would say. k3 is never negative, and 0 only where they agree.

**Beside it** lie `held_out.jsonl`, a row for each held-out pair of the last evaluation (`pair_id`, `gap`, both lengths,
`margin`, `sum_margin`), and `generations.jsonl`, a row for each prompt each time that prompts are answered (`prompt`,
`answer`, `base`, their tokens, whether they ended, their repetition).
"""

ENVIRONMENT = [
    ("SAMPO_CACHE", "where tokenized pairs and references' log-probs are kept; `~/.cache/sampo` if unset"),
    ("HF_HUB_OFFLINE", "`1`: nothing is fetched; models and data sets come from the Hub's cache"),
    ("HF_ENDPOINT", "another address than huggingface.co"),
    ("HF_TOKEN", "token for gated models and for pushing; `hf auth login` stores one instead"),
    ("HF_HOME", "where the Hub's cache is; `~/.cache/huggingface` if unset"),
]

_PROCESS_CODES = {
    ExitCode.OK: "The command did what was asked.",
    ExitCode.FAILURE: "Anything that has no code of its own, such as a full disk or a bug.",
    ExitCode.HANGUP: "SIGHUP: the terminal was closed. A run that was training has saved itself; `--resume` goes on.",
    ExitCode.INTERRUPTED: "Ctrl-C. A run that was training has saved itself; `--resume` goes on.",
    ExitCode.TERMINATED: "SIGTERM. A run that was training has saved itself; `--resume` goes on.",
}


def table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table; `|` inside a cell is escaped."""
    lines = [titles, ("---",) * len(titles), *[tuple(cell.replace("|", "\\|") for cell in row) for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(value: object) -> str:
    return f"`{value}`"


def sentence(text: str) -> str:
    return text if text.endswith((".", "?")) else f"{text}."


def exit_codes() -> list[tuple[str, str, str]]:
    """(number, name, meaning) of each exit code; the meaning is the docstring of the errors that end with it."""
    meaning = {kind.exit_code: (kind.__doc__ or "").splitlines()[0] for kind in SampoError.__subclasses__()}
    meaning |= _PROCESS_CODES
    return [(str(member.value), member.name.lower(), meaning[member]) for member in ExitCode]


def commands() -> dict[str, Any]:
    """Every command by its words, those of a group such as `cache list` too."""
    group: Any = typer.main.get_command(app)
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        parts = getattr(command, "commands", None)
        found |= {f"{name} {part}": inner for part, inner in parts.items()} if parts else {name: command}
    return found


def value_of(annotation: Any) -> str:
    """What a user types for a parameter of this type."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) in (Union, list):
        return value_of(parts[0])
    return {bool: "", int: "integer", float: "number", Path: "path"}.get(annotation, "text")


def command_section(name: str, command: Any) -> str:
    hints = get_type_hints(command.callback)
    arguments = [(p.metavar or p.name.upper(), p) for p in command.params if p.param_type_name == "argument"]
    words = [usage_word(word, argument) for word, argument in arguments]
    about = (command.help or "").split("\n\n")[0]
    parts = [f"### sampo {name}", sentence(about), f"```text\n{' '.join(['sampo', name, *words])} [OPTIONS]\n```"]
    if arguments:
        meanings = [(code(word), sentence(argument.help or "")) for word, argument in arguments]
        parts.append(table(("argument", "meaning"), meanings))
    options = [p for p in command.params if p.param_type_name == "option"]
    rows = [option_row(name, option, hints[option.name]) for option in options]
    titles = ("option", "value", "meaning") if name != "train" else ("option", "value", "recipe key", "meaning")
    parts.append(table(titles, rows))
    return "\n\n".join(parts)


def usage_word(word: str, argument: Any) -> str:
    """An argument in a usage line: in brackets where it may be left out, with dots where there may be several."""
    return (word if argument.required else f"[{word}]") + "..." * (argument.nargs == -1)


def option_row(command: str, option: Any, annotation: Any) -> tuple[str, ...]:
    value = option.metavar or value_of(annotation)
    meaning = sentence(option.help or "")
    if option.required:
        meaning += " Required."
    if option.default not in (None, False):
        meaning += f" Default: {code(option.default)}."
    cells = (", ".join(map(code, option.opts)), code(value) if value else "")
    key = FLAGS.get(option.name, "")
    return (*cells, code(key) if key else "", meaning) if command == "train" else (*cells, meaning)


def type_of(schema: dict[str, Any]) -> str:
    """A recipe key's type in words, from its JSON schema."""
    options = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    return " or ".join(_one_type(option) for option in options)


def _one_type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(map(code, schema["enum"]))
    if schema["type"] == "array":
        return f"list of {_one_type(schema['items'])}"
    if schema["type"] == "object":
        names = schema.get("propertyNames", {}).get("enum", [])
        return f"column names for {', '.join(map(code, names))}" if names else "mapping"
    limits = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in limits.items() if key in schema]
    words = {"string": "text", "integer": "integer", "number": "number", "boolean": "`true`, `false`"}
    return ", ".join([words[schema["type"]], *bounds])


def shown_default(value: object) -> str:
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return code(str(value).lower())
    return code(value) if value not in ([], {}) else "none"


def recipe_section(name: str) -> str:
    flags = {key: f"--{flag.replace('_', '-')}" for flag, key in FLAGS.items()}
    rows = recipe_rows(Recipe.model_fields[name].annotation, flags, f"{name}.")
    return f"### {name}\n\n" + table(("key", "type", "default", "flag", "meaning"), rows)


def recipe_rows(model: Any, flags: dict[str, str], path: str) -> list[tuple[str, ...]]:
    """A row for each key of a section, those of a section inside it as `inner.key`."""
    rows: list[tuple[str, ...]] = []
    for key, field in model.model_json_schema()["properties"].items():
        inner, whole = model.model_fields[key], f"{path}{key}"
        if hasattr(inner.annotation, "model_fields"):
            rows += recipe_rows(inner.annotation, flags, f"{whole}.")
            continue
        default = "required" if inner.is_required() else shown_default(field.get("default"))
        flag, name = flags.get(whole), whole.partition(".")[2]
        rows.append((code(name), type_of(field), default, code(flag) if flag else "", field["description"]))
    return rows


def stopping_section() -> str:
    """The metrics of early stopping and what is better."""
    words = {"low": "lower", "high": "higher"}
    rows = []
    for kind, aims in AIMS.items():
        for name, aim in aims.items():
            better = words[aim] if isinstance(aim, str) else f"nearer to {aim:g}"
            rows.append((code(name), kind, better))
    about = (
        "A run ends when `metric` was no better for `patience` rows of its kind in a row, or when answers drift in "
        "length.\nA row that does not know the metric, as of an empty bucket, does not count. With `--iterations` "
        "each round counts anew,\nand a stop ends the run. `summary.json` says why under `stopped_early`. A resumed "
        "run goes on counting, and may be given\nmore patience."
    )
    return f"### Metrics of train.early_stopping\n\n{about}\n\n{table(('metric', 'rows', 'better'), rows)}"


def methods_section() -> str:
    rows = []
    for method in METHODS.values():
        reference = "yes" if method.needs_reference else "no"
        rows.append((code(method.name), code(method.reduction), reference, method.paper))
    titles = ("method", "reduction", "reference", "paper")
    about = "Formulas, defaults, usual ranges and citations are in [methods.md](methods.md)."
    return f"## Methods\n\n{table(titles, rows)}\n\n{about}"


def reference() -> str:
    """The whole page."""
    parts = [HEADER, "## Commands"]
    parts += [command_section(name, command) for name, command in commands().items()]
    parts.append(
        "## Recipe keys\n\nA recipe is a YAML file with the sections below; every key can be set on the command line "
        "with `--set section.key=value`.\nLater wins: defaults, the method's defaults, the recipe, flags, `--set`. "
        "A key that is empty takes the method's default\nwhere it has one."
    )
    parts += [recipe_section(name) for name in Recipe.model_fields]
    parts += [stopping_section(), methods_section()]
    metrics = [(code(key), kinds, meaning) for key, kinds, meaning in METRICS]
    parts.append(
        "## metrics.jsonl\n\nOne JSON object a line, appended after each optimizer step, each evaluation and each time "
        "that prompts are\nanswered.\n\n" + f"{table(('key', 'rows', 'meaning'), metrics)}\n\n{METRICS_NOTES}"
    )
    parts.append("## Exit codes\n\n" + table(("code", "name", "meaning"), exit_codes()))
    environment = [(code(name), meaning) for name, meaning in ENVIRONMENT]
    parts.append("## Environment\n\n" + table(("variable", "meaning"), environment))
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"wrote {PAGE}")
