"""What one run of the benchmark compares: its settings, and the variants of ours by name.

A variant is a method and changes to its recipe, joined by plus signs: `sampo`, `dpo+no-prefix-sharing`,
`dpo+train.checkpointing=none`. Everything else is the same for all contenders. No torch here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sampo_cli.config import Recipe
from sampo_cli.errors import UsageError
from sampo_cli.method_table import METHODS
from sampo_cli.plan import resolve_recipe
from sampo_cli.settings import apply_settings

UNSORTED = "no-length-sorting"
PEFT_LAYERS = "peft-layers"
CHANGES: dict[str, tuple[str, ...]] = {
    "no-prefix-sharing": ("model.layout=separate",),
    "no-cache": ("train.cache_reference=off",),
    "cache": ("train.cache_reference=on",),
    "no-kernels": ("model.kernels=none",),
    UNSORTED: (),
    PEFT_LAYERS: (),
}
"""Changes with a name, as settings of the recipe; the last two are no settings, so the benchmark replaces functions."""


@dataclass(frozen=True)
class Settings:
    """The same for every contender. `steps` are timed, of each epoch; `warmup_steps` go before all of them."""

    model: str
    data: str
    pairs_per_step: int
    pairs_per_microbatch: int
    steps: int
    warmup_steps: int
    epochs: int
    max_length: int
    quantization: str
    dtype: str
    checkpointing: str
    learning_rate: float
    beta: float | None
    opponent_beta: float | None
    lora_r: int
    lora_alpha: int
    seed: int
    trl_precompute: bool

    @property
    def pairs(self) -> int:
        """Distinct pairs that the timed steps of one epoch train on."""
        return self.steps * self.pairs_per_step


@dataclass(frozen=True)
class Variant:
    """One way to run sampo. `changes` are `section.key=value`.

    Attributes:
        sorting: without it, pairs are cut in random order.
        joined: without it, LoRA layers are computed as PEFT does.
    """

    name: str
    method: str
    changes: tuple[str, ...] = ()
    sorting: bool = True
    joined: bool = True


def parse_variant(text: str, method: str) -> Variant:
    """Read a variant's name; where it names no method, `method` it is.

    Raises:
        UsageError: a part is neither a method, nor a change with a name, nor section.key=value.
    """
    changes: list[str] = []
    parts = text.split("+")
    for part in parts:
        if part in METHODS:
            method = part
        elif part in CHANGES:
            changes += CHANGES[part]
        elif "=" in part:
            changes.append(part)
        else:
            known = ", ".join(CHANGES)
            raise UsageError(f"variant '{text}': '{part}' is unknown", hint=f"a method, {known} or section.key=value")
    return Variant(text, method, tuple(changes), UNSORTED not in parts, PEFT_LAYERS not in parts)


def variants_of(arguments: argparse.Namespace) -> list[Variant]:
    """The variants asked for, with the changes that were given as flags added to each."""
    flags = [name for name in CHANGES if getattr(arguments, name.replace("-", "_"), False)]
    texts: Sequence[str] = arguments.variants.split(",") if arguments.variants else [arguments.method]
    variants = [parse_variant("+".join([text, *flags]), arguments.method) for text in texts]
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):
        raise UsageError(f"--variants {arguments.variants}: one of them is there twice")
    return variants


def recipe_of(settings: Settings, variant: Variant) -> Recipe:
    """The resolved recipe of a variant. The opponent is set up from the plain `dpo` one."""
    tree: dict[str, Any] = {
        "model": {"name": settings.model, "quantization": settings.quantization, "dtype": settings.dtype},
        "data": {"sources": [settings.data], "max_length": settings.max_length, "eval_fraction": 0.0},
        "lora": {"r": settings.lora_r, "alpha": settings.lora_alpha},
        "method": {"name": variant.method},
        "train": {
            "epochs": float(settings.epochs),
            "batch_pairs": settings.pairs_per_step,
            "pairs_per_microbatch": settings.pairs_per_microbatch,
            "scheduler": "constant",
            "warmup_ratio": 0.0,
            "optimizer": "adamw",
            "learning_rate": settings.learning_rate,
            "checkpointing": settings.checkpointing,
            "seed": settings.seed,
        },
    }
    if settings.beta is not None:
        tree["method"]["beta"] = settings.beta
    apply_settings(tree, variant.changes)
    return resolve_recipe(tree)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m benchmarks.step`."""
    add = parser.add_argument
    add("--opponent", choices=["trl", "none"], default="trl", help="whom to compare with")
    add("--model", required=True, help="a name on the Hub, a folder, or one of benchmarks/models.py (llama3-8b-random)")
    add("--data", required=True, help="a source of sampo, or synthetic:PAIRS:LENGTH (tokens of prompt and response)")
    add("--method", choices=["dpo", "sampo", "simpo"], default="dpo", help="of ours; trl's is DPO")
    add("--variants", help="several of ours in one run, as in dpo,sampo,dpo+no-prefix-sharing+model.attention=sdpa")
    add("--pairs-per-step", type=int, default=16)
    add("--pairs-per-microbatch", type=int, default=4, help="most pairs of one forward pass, of both")
    add("--steps", type=int, default=4, help="timed steps of an epoch")
    add("--warmup-steps", type=int, default=1, help="steps before them; more where kernels are compiled on the way")
    add("--epochs", type=int, default=1, help="passes over the same pairs; from 2 on ours caches the reference")
    add("--no-cache", action="store_true", help="ours computes the reference in every epoch")
    add("--no-prefix-sharing", action="store_true", help="ours computes the prompt for each response")
    add("--no-length-sorting", action="store_true", help="ours cuts pairs in random order, as trl does")
    add("--peft-layers", action="store_true", help="ours computes LoRA layers as PEFT does")
    add("--trl-precompute", action="store_true", help="trl computes its reference once, before the first step")
    add("--device", choices=["cuda", "cpu"], help="the GPU where there is one, if not given")
    add("--quantization", choices=["nf4", "int8", "none"], default="none")
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto")
    add("--checkpointing", choices=["all", "none"], default="all")
    add("--max-length", type=int, default=2048, help="tokens of prompt and response")
    # Enough to move the loss further than rounding does, so that losses can be compared; speed does not depend on it.
    add("--learning-rate", type=float, default=3e-4)
    add("--beta", type=float, help="the method's default if not given")
    add("--opponent-beta", type=float, help="another beta for trl, to see the comparison of losses fail")
    add("--lora-r", type=int, default=16)
    add("--lora-alpha", type=int, default=32)
    add("--seed", type=int, default=42)
    add("--json", action="store_true", help="print one JSON object instead of a table")


def settings_of(arguments: argparse.Namespace, folder: Path) -> Settings:
    """Check the flags; `folder`: the model's.

    Raises:
        UsageError: numbers that do not fit together.
    """
    for name in ("pairs_per_step", "pairs_per_microbatch", "steps", "warmup_steps", "epochs"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.pairs_per_step % arguments.pairs_per_microbatch:
        raise UsageError(
            "--pairs-per-step must be a multiple of --pairs-per-microbatch: trl's batches are all of one size"
        )
    values = {name: getattr(arguments, name) for name in Settings.__dataclass_fields__}
    return Settings(**values | {"model": str(folder)})
