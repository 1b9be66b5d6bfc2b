"""`sampo train --dry-run`: what a run would do and need, from config, tokenizer and data; no weight is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sampo_cli.batch import Layout
from sampo_cli.config import Recipe
from sampo_cli.errors import ModelError, UsageError
from sampo_cli.footprint import Rehearsal
from sampo_cli.forecast import Change, Forecast, changes, forecast
from sampo_cli.model import load_config
from sampo_cli.plan import Notes, Plan, make_plan
from sampo_cli.remote import fetch_model
from sampo_cli.rounds import Schedule
from sampo_cli.target import Device, named_card, this_device
from sampo_cli.workload import Lengths, Work, evenness, lengths_of, work

FRAMEWORK = {"cpu": "Python and libraries", "cuda": "CUDA context"}

_UNITS = {"": 1000, "b": 1000, "ib": 1024}
_POWERS = {"m": 2, "g": 3, "t": 4}


def parse_memory(text: str) -> int:
    """Bytes of "24GB", "24g" (10^9 each) or "24GiB" (2^30 each); also M and T.

    Raises:
        UsageError: it is none of these.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([mgt])(ib|b|)\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise UsageError(f"--gpu-memory {text}: not an amount of memory", hint="for example 24GB or 24GiB")
    return int(float(found[1]) * _UNITS[found[3].lower()] ** _POWERS[found[2].lower()])


def dry_run(
    recipe: Recipe, view: Notes, folder: Path, gpu_memory: int | None = None, processes: int = 1
) -> dict[str, Any]:
    """What a run would do: nested dictionaries of text, whole numbers (memory in bytes), shares and lists.

    Args:
        recipe: resolved.
        view: told what is found meanwhile.
        folder: the run's.
        gpu_memory: bytes of a CUDA card that need not be here; None for the device that is.
        processes: that share the pairs of a step out; each needs the memory of one.

    Raises:
        DataError, ModelError, UsageError: whatever a run would stop at before it loads weights.
    """
    plan = make_plan(recipe, view)
    device = named_card(gpu_memory) if gpu_memory else this_device()
    architecture_folder = fetch_model(recipe.model.name, recipe.model.revision, weights=False)

    def rehearse(changed: Recipe) -> Rehearsal:
        architecture = load_config(changed.model, architecture_folder)
        return Rehearsal(changed, architecture, device)

    lengths = lengths_of(plan.dataset, plan.train)
    rehearsal = rehearse(recipe)
    found, advice = None, []
    try:
        found = forecast(rehearsal, lengths, device)
        if not found.fits:
            view.note("it does not fit; trying what would")
            advice = changes(recipe, lengths, device, rehearse)
    except ModelError as error:
        view.note(f"warning: {error.message}")
    schedule = Schedule(list(range(len(lengths))), recipe)
    budget = found.tokens if found else recipe.train.tokens_per_microbatch
    load = work(lengths, schedule, recipe, rehearsal.layout, budget) if budget else None
    return {
        **_run(plan, schedule, lengths, folder),
        "processes": _processes(lengths, schedule, rehearsal.layout, processes) if processes > 1 else None,
        "tokens": _tokens(load) if load else None,
        "parameters": {"all": rehearsal.total_parameters, "trainable": rehearsal.trainable_parameters},
        "memory": _memory(found, device) if found else None,
        "changes": [_change(change) for change in advice],
    }


def _run(plan: Plan, schedule: Schedule, lengths: Lengths, folder: Path) -> dict[str, Any]:
    recipe, counts = plan.recipe, plan.dataset.counts
    per_pair = lengths.prompt_tokens + lengths.chosen_tokens + lengths.rejected_tokens
    return {
        "model": recipe.model.name,
        "method": f"{recipe.method.name} (beta {recipe.method.beta}, reduction {recipe.method.reduction})",
        "train pairs": len(plan.train),
        "held-out pairs": len(plan.evaluation),
        "steps": schedule.steps,
        "pairs per step": recipe.train.batch_pairs,
        "tokens per pair": {"mean": round(float(per_pair.mean()), 1), "most": int(per_pair.max())},
        "truncated": {part: round(cut / counts.kept, 4) for part, cut in counts.truncated.items()},
        "learning rate": recipe.train.learning_rate,
        "output": str(folder),
    }


def _processes(lengths: Lengths, schedule: Schedule, layout: Layout, count: int) -> dict[str, Any]:
    return {"count": count, "busy share": round(evenness(lengths, schedule, layout, count), 3)}


def _tokens(load: Work) -> dict[str, Any]:
    return {
        "that matter": load.needed,
        "computed": load.computed,
        "computed / that matter": round(load.computed / load.needed, 3),
        "scored": load.scored,
        "scored share of responses": round(load.scored / load.responses, 3),
        "forward passes": load.passes,
    }


def _memory(found: Forecast, device: Device) -> dict[str, Any]:
    return {
        "device": device.name,
        "there is": device.memory,
        "usable": device.usable,
        "needed": found.needed,
        "fits": found.fits,
        "tokens per micro-batch": found.tokens,
        "largest micro-batch": dict(zip(("rows", "positions"), found.longest, strict=True)),
        "parts": {**{k: v for k, v in found.footprint.parts.items() if v}, FRAMEWORK[device.kind]: device.framework},
    }


def _change(change: Change) -> dict[str, Any]:
    return {"change": change.flags, "needed": change.needed, "fits": change.fits}
