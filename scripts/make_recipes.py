"""Writes docs/recipes.md from the recipes that ship: for which card, how the base is stored, lengths, memory.

Run it after a change of a recipe; a test compares the page with what this would write, and the memory that a recipe
states with a dry run on its model's real sizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from sampo_cli.recipe_files import Shipped, describe, load_recipe, recipes_folder, shipped_recipes
from scripts.make_reference import code, table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"

FORECAST = re.compile(
    r"^# Forecast: ([\d.]+) of \d+ GB with the longest pair, ([\d.]+) of them weights\.$", re.MULTILINE
)

HEADER = """# Recipes

<!-- Written by scripts/make_recipes.py. Do not edit: change the recipe or the script, then run the script. -->

A recipe is a YAML file with the [keys of a run](reference.md#recipe-keys). These ship with sampo and are used by name.
`sampo recipes` lists them, `sampo recipes 16gb` those for a card, `sampo recipes NAME` shows one; with `--copy` it is
written to a new file of yours, or into a folder, and never over what is there.

```bash
sampo recipes
sampo recipes 24gb
sampo recipes 16gb/llama-3.1-8b
sampo recipes 16gb/llama-3.1-8b --copy my-recipe.yaml
sampo train --recipe 16gb/llama-3.1-8b --data pairs.jsonl
```

## How to choose

1. **By card.** A recipe's name begins with the memory of the card that it is for. It fits whatever your pairs are
   like: all are cut to the recipe's length, and the longest that there can be leaves a tenth of the card free. A run
   uses what is left to compute several pairs at a time, up to 8,192 positions.
2. **By model.** The larger one answers better and trains more slowly. A smaller card's recipe runs on a larger card;
   the larger card's own has longer pairs, or does without 4 bits.
3. **Bring your pairs** with `--data`. Without it a recipe trains on UltraFeedback, 61,135 pairs, the data of the paper.
4. **Look first.** `--dry-run` reads config, tokenizer and pairs and says how many are cut, how many steps there are and
   what memory they take, here or on another card:

```bash
sampo train --recipe 16gb/llama-3.1-8b --data pairs.jsonl --dry-run --gpu-memory 16GB
```

A model that is not here: take one of its size and card, give `--model`, and look first. A fine-tune of one of these
models has its sizes, so what fits the one fits the other.

Flags change a recipe's values: `--max-length` if pairs are longer or memory is short, `--method dpo` to compare,
`--learning-rate` if margins hardly move or answers degrade.
"""

HOW = """## How the settings were chosen

- **Length first, then speed.** 1,024 to 8,192 tokens a side as the card allows. Where 8,192 positions at a time then
  still leave a fifth of the card free, less is computed again in backward: `train.checkpointing` is `selective`, else
  `all`.
- **4 bits (NF4) where 16 would not fit**, or would leave no room for long pairs.
- **Rank 16, alpha 32, all linear layers, batches of 32 pairs, one epoch, beta 0.1** everywhere.
- **Learning rate by size**: 5e-5 below 3 billion parameters, 2e-5 to 20 billion, 1e-5 above. Published rates of DPO
  with all weights are 4e-7 to 8e-7 for 7 to 13 billion parameters (Llama-3-8B in SamPO's paper, OLMo 2), and a LoRA
  wants 10 to 50 times that. They are where to begin and not a result: none of these recipes has been trained to its end
  here.
- **Gemma 2** has attention that only the eager implementation computes; its memory grows with the square of the length.
- **Gemma 3 from 4B on** also sees. Its vision tower is loaded and stays as it is: adapters are on the language model.
- **Qwen3-8B, -14B and -32B** think unless told not to. Their template puts an empty thought before an answer without
  one, so what is trained is how they answer without thinking; chat with them in that mode (`enable_thinking=False`).
- Llama and Gemma are gated: accept the licence on the Hub, then `hf auth login`.

**The memory** is what `--dry-run` says for the longest pair that the recipe allows, alone in its micro-batch, on a
model built from a config with the published sizes: a forecast. None of these was compared with a card;
those of a small model came within 15 % of one with sdpa attention
([how it is made](performance.md#what-a-dry-run-predicts)). A test repeats each. It counts 10^9 bytes a GB, and a card
has more: one sold with 24 GB has 24 GiB, less what its driver keeps.
"""

PUBLISHED = """## With published settings

For no card in particular: data, method and hyper-parameters of a publication, with what was changed for LoRA. Each
opens with its sources and with the numbers that were published. `quickstart` is the first run on a small model.
"""


def forecast_of(recipe: Shipped) -> tuple[float, float]:
    """What a recipe for a card says that it needs: all in all, and for the base's weights; 10^9 bytes."""
    found = FORECAST.search(recipe.text)
    assert found, f"{recipe.name}: no forecast in its heading"
    return float(found[1]), float(found[2])


def link(recipe: Shipped) -> str:
    return f"[{code(recipe.name)}](../recipes/{recipe.path.relative_to(recipes_folder()).as_posix()})"


def for_card(card: str, recipes: Iterable[Shipped]) -> str:
    """The table of one card."""
    rows = []
    for recipe in recipes:
        tree = load_recipe(recipe.name)
        needed, _ = forecast_of(recipe)
        rows.append(
            (
                link(recipe),
                str(recipe.model),
                {"nf4": "4", "none": "16"}[tree["model"]["quantization"]],
                f"{tree['data']['max_length']:,}",
                tree["train"]["checkpointing"],
                f"{tree['train']['learning_rate']:.0e}".replace("e-0", "e-"),
                f"{needed:.1f} GB",
            )
        )
    titles = ("recipe", "model", "bits", "tokens a side", "recomputed", "learning rate", "memory, longest pair")
    return f"## For a card of {card.removesuffix('GB')} GB\n\n{table(titles, rows)}"


def published(recipes: Iterable[Shipped]) -> str:
    rows = [(link(r), code(r.method), r.model or "give `--model`", r.about) for r in recipes]
    return f"{PUBLISHED}\n{table(('recipe', 'method', 'model', 'what it is'), rows)}"


def page() -> str:
    """The whole page."""
    found = [describe(name) for name in shipped_recipes()]
    groups = {card: list(group) for card, group in groupby(found, key=lambda recipe: recipe.card)}
    cards = [for_card(card, recipes) for card, recipes in groups.items() if card]
    return "\n\n".join(part.strip() for part in [HEADER, *cards, HOW, published(groups[None])]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
