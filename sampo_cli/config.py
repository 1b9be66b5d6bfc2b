"""The recipe: what a run does, typed and strict.

Defaults, then the method's defaults, then the recipe file, then flags. Every problem is reported at once. The file
that was resolved is written to the run's folder and repeats the run. This module knows no torch and no method: the
methods' defaults are handed to `resolve`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sampo_cli.errors import UsageError, nearest
from sampo_cli.plain_yaml import parse_yaml

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Frozen, strict (no "yes" for True, no 1.5 for an integer), unknown keys refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ModelConfig(Section):
    name: str = Field(min_length=1, description="Base model: a name on the Hub or a folder.")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    adapter: str | None = Field(None, description="Adapter to go on from; a frozen copy of it is the reference.")
    quantization: Literal["nf4", "int8", "none"] = Field("nf4", description="How the base's linear layers are stored.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Compute dtype; auto is bfloat16 where the device has it."
    )
    attention: Literal["auto", "sdpa", "flex", "eager"] = Field(
        "auto", description="Attention implementation; auto is flex on CUDA where the architecture has it, else sdpa."
    )
    kernels: Literal["auto", "liger", "none"] = Field(
        "auto", description="Fused kernels for norms, rotary embeddings and MLPs; auto uses Liger's where installed."
    )
    layout: Literal["auto", "shared", "separate"] = Field(
        "auto", description="One row per pair with a shared prompt, or two rows; auto tests what the model can do."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")


class DataConfig(Section):
    sources: list[str] = Field(min_length=1, description="Names on the Hub ('name' or 'name:split'), files, folders.")
    revision: str | None = Field(None, description="Branch, tag or commit of the Hub data sets.")
    columns: dict[Literal["prompt", "chosen", "rejected", "system"], str] = Field(
        default_factory=dict, description="Column names, where they are not recognised."
    )
    max_length: Positive = Field(2048, description="Tokens of prompt plus response; the model's context if smaller.")
    min_prompt_tokens: Positive = Field(128, description="The prompt is not cut below this; responses are cut then.")
    eval_fraction: Share = Field(0.05, description="Share of pairs held out at random; 0 for none.")
    on_bad_row: Literal["error", "drop"] = Field(
        "error", description="A row that cannot be parsed, or whose prompt is no prefix: stop, or drop and count."
    )
    chat_template: str | None = Field(None, description="A Jinja file used instead of the tokenizer's template.")
    template_date: str = Field("2024-07-26", description="The date that templates print, so runs repeat.")


class LoraSection(Section):
    r: Positive = Field(16, description="Rank.")
    alpha: Positive = Field(32, description="Scale: the update is multiplied by alpha / r.")
    dropout: Share = Field(0.0, description="Dropout on the adapter's input; 0 keeps policy and reference comparable.")
    targets: str | list[str] = Field("all-linear", description="Layers: all linear but the head, or names.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(r) (arXiv 2312.03732).")
    dora: bool = Field(False, description="Weight-decomposed LoRA (arXiv 2402.09353).")
    init: Literal["default", "gaussian", "pissa", "olora"] = Field(
        "default", description="Initialisation; pissa and olora change the base and are refused."
    )


class MethodConfig(Section):
    name: str = Field("sampo", description="Loss and defaults: a name of docs/methods.md.")
    beta: float | None = Field(None, gt=0, description="Factor of the margin; the method's default if empty.")
    reduction: Literal["sum", "sample", "expected", "average", "mean"] | None = Field(
        None, description="How token log-ratios become one number; the method's default if empty."
    )
    sampling: Literal["paired", "independent"] = Field(
        "paired", description="Same positions for policy and reference, or the released code's two draws."
    )
    draws: Positive = Field(1, description="Independent draws of positions to average in one step; 1 is the paper's.")
    sft_weight: float | None = Field(
        None, ge=0, description="Weight of the chosen response's negative log-likelihood per token, in any method."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of labels taken to be wrong (cDPO).")
    gamma: float | None = Field(None, ge=0, description="Margin that simpo and cpo-simpo ask for, not times beta.")
    dpop_weight: float | None = Field(
        None, ge=0, description="dpop's lambda: cost of a chosen response that is less likely than under the reference."
    )
    length_weight: float | None = Field(
        None, ge=0, description="r-dpo's alpha: logits per token that chosen is longer."
    )
    kl_weight: float | None = Field(None, ge=0, description="tdpo's alpha: weight of the difference of sequence KLs.")


class GenerateConfig(Section):
    """Answers while training."""

    prompts: Annotated[int, Field(ge=0)] | str = Field(
        0,
        description="How many held-out prompts the adapter and the base answer, or a file: a prompt a line, or .jsonl "
        "with `prompt`; 0 for none.",
    )
    every: Positive | None = Field(None, description="Steps between answers; with each evaluation if empty.")
    max_new_tokens: Positive = Field(256, description="An answer is cut off there.")
    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest token; above, tokens are drawn.")
    seed: int = Field(0, ge=0, description="Of the draws; training draws nothing from it.")


class StoppingConfig(Section):
    """When a run ends before its last step."""

    metric: str | None = Field(
        None, description="A number of the rows of kind eval or generate, such as `loss` or `length_bias.spearman`."
    )
    patience: Positive = Field(3, description="Rows in a row without a better one, after which the run ends.")
    max_length_drift: float | None = Field(
        None,
        gt=0,
        description="The run ends when answers are longer or shorter than the base's by more than this share.",
    )


class TrainConfig(Section):
    epochs: float | None = Field(None, gt=0, description="Passes over the data; the method's default if empty.")
    max_steps: Positive | None = Field(None, description="Optimizer steps; epochs do not count then.")
    batch_pairs: Positive = Field(16, description="Pairs per optimizer step.")
    tokens_per_microbatch: Positive | None = Field(
        None,
        description="Positions of one forward pass; if empty, what fits of 8,192 (GPU) or 4,096 (CPU) is found first.",
    )
    pairs_per_microbatch: Positive | None = Field(None, description="Most pairs of one forward pass, if it is limited.")
    cache_reference: Literal["auto", "on", "off"] = Field(
        "auto", description="Keep the reference's log-probs on disk; auto does if pairs are seen more than once."
    )
    learning_rate: float | None = Field(None, gt=0, description="Peak rate; the method's default if empty.")
    scheduler: Literal["linear", "cosine", "constant"] = Field("linear", description="After the warm-up.")
    warmup_ratio: Share = Field(0.1, description="Share of steps in which the rate rises.")
    optimizer: Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "auto", description="torch's AdamW or bitsandbytes'; auto is the paged 8-bit one on CUDA, torch's elsewhere."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay of the adapter.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    checkpointing: Literal["all", "selective", "none"] = Field(
        "all",
        description="Which activations backward computes again: all, all but those of attention and of the MLP's last "
        "projection, or none.",
    )
    offload_activations: bool = Field(False, description="Keep activations in the CPU's memory until backward.")
    eval_every: Positive | None = Field(
        None,
        description="Steps between evaluations; a fifth of the run if empty, 10 at least. A round's last step always.",
    )
    save_every: Positive = Field(50, description="Steps between checkpoints.")
    keep_checkpoints: Positive = Field(2, description="Older checkpoints are deleted.")
    generate: GenerateConfig = Field(default_factory=GenerateConfig, description="Answers while training.")
    early_stopping: StoppingConfig = Field(
        default_factory=StoppingConfig, description="When a run ends before its last step."
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="A step whose loss or gradient is not finite ends the run, or changes nothing and counts."
    )
    nonfinite_limit: Positive = Field(5, description="Skipped steps in a row after which a run stops all the same.")
    seed: int = Field(42, ge=0, description="Of the split, the order, the sampled positions and the adapter.")

    @field_validator("cache_reference", mode="before")
    @classmethod
    def _on_off(cls, value: Any) -> Any:
        """YAML reads a bare `on` as true."""
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class IterationsConfig(Section):
    count: Positive = Field(1, description="Rounds; after each, the policy becomes the next round's reference.")
    schedule: Literal["restart", "continue"] = Field(
        "restart", description="Optimizer and schedule: new for each round, or one for all."
    )
    data: Literal["all", "split"] = Field(
        "all", description="Each round sees all training pairs, or a part of its own."
    )


class OutputConfig(Section):
    dir: str | None = Field(None, description="The run's folder; made from model, method and data if empty.")
    keep: Literal["best", "final"] = Field("best", description="Which adapter ends up in adapter/.")
    best_metric: Literal["loss", "accuracy", "margin"] = Field("loss", description="Held-out metric that decides.")
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        default_factory=list, description="Trackers."
    )


class Recipe(Section):
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    lora: LoraSection = Field(default_factory=LoraSection)
    method: MethodConfig = Field(default_factory=MethodConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    iterations: IterationsConfig = Field(default_factory=IterationsConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)

    def dump(self) -> str:
        """The recipe as YAML that loads to an equal one."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


MOST_BYTES = 2**20
"""Of a recipe's file."""


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe file as nested dictionaries, not yet checked."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UsageError(f"recipe {path}: larger than {MOST_BYTES // 2**20} MiB, which no recipe is")
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path}: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"recipe {path}: expected sections such as 'model:' and 'data:'")
    return {key: {} if value is None else value for key, value in content.items()}


def validate(tree: Mapping[str, Any]) -> Recipe:
    """Check a whole tree and return the recipe, or raise one `UsageError` that lists every problem."""
    try:
        return Recipe.model_validate(dict(tree))
    except ValidationError as error:
        problems = [_problem(detail) for detail in error.errors()]
        raise UsageError("the recipe has problems:\n" + "\n".join(f"  {line}" for line in problems)) from error


_FLAG_OF = {"model.name": "--model", "data.sources": "--data"}


def _problem(detail: Any) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{path}: unknown key{nearest(str(detail['loc'][-1]), _keys_of(detail['loc'][:-1]))}"
    if detail["type"] == "missing":
        missing = {"model": "model.name", "data": "data.sources"}.get(path, path)
        return f"{missing}: missing; give {_FLAG_OF.get(missing, 'it')} or set it in a recipe"
    return f"{path}: {detail['msg'].lower()} (got {repr(detail['input'])[:200]})"


def _keys_of(path: Sequence[object]) -> list[str]:
    """The keys of a section, or of the whole recipe."""
    model: Any = Recipe
    for part in path:
        model = model.model_fields[str(part)].annotation
    return list(model.model_fields)


def merge(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A tree with the changes of another, section by section."""
    merged = dict(tree)
    for key, value in changes.items():
        before = merged.get(key)
        merged[key] = merge(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return merged


def leaves(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a tree by `section.key`, or deeper; a mapping without keys is one."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = leaves(value) if isinstance(value, Mapping) and value else None
        found |= {key: value} if inner is None else {f"{key}.{name}": leaf for name, leaf in inner.items()}
    return found


def resolve(recipe: Recipe, defaults: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """Fill what was left empty from `defaults`: a section's keys to the method's values."""
    updates = {}
    for section, values in defaults.items():
        current = getattr(recipe, section)
        empty = {key: value for key, value in values.items() if getattr(current, key) is None}
        updates[section] = current.model_copy(update=empty)
    return recipe.model_copy(update=updates)
