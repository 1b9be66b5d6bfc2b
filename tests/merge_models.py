"""Tiny bases and random adapters for the merge tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tests.tiny import make_model


def save_base(folder: Path, config: PreTrainedConfig, *, seed: int = 0, dtype: str = "float32", **options: Any) -> Path:
    """A random model of `config`, saved the usual way."""
    make_model(config, seed).to(getattr(torch, dtype)).save_pretrained(folder, **options)
    return folder


def save_adapter(folder: Path, base: Path, *, seed: int = 1, **settings: Any) -> Path:
    """A LoRA adapter on `base` with random A, B and (DoRA) magnitudes, saved by PEFT."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}
    base_model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    model = get_peft_model(base_model, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
        elif "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    return folder


def peft_merged(base: Path, *adapters: Path, dtype: str = "float32") -> dict[str, Tensor]:
    """What PEFT itself makes of it: merge_and_unload of each adapter in turn."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return dict(model.state_dict())


def loaded(folder: Path) -> dict[str, Tensor]:
    """The weights as plain transformers reads them, in the dtype of config.json."""
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Over all tensors; the two must have the same names."""
    assert left.keys() == right.keys()
    return max((left[name].float() - right[name].float()).abs().max().item() for name in left)
