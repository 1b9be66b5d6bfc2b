"""The LoRA adapters of a run: a new one, one to go on from, and their files.

Adapter weights are float32. Nothing here reaches for the network once a run has started.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sampo_cli.adapter import (
    CONFIG_FILE,
    KEEPS_BASE,
    RECORD_FILE,
    WEIGHTS_FILE,
    plain_settings,
    read_adapter,
    read_tensors,
)
from sampo_cli.config import LoraSection
from sampo_cli.errors import ModelError
from sampo_cli.fingerprint import read_json
from sampo_cli.policy import FUSED_LAYERS, POLICY_ADAPTER, REFERENCE_ADAPTER, Policy, is_state_space
from sampo_cli.remote import fetch, first_line

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE)


def add_adapter(base: Any, lora: LoraSection, seed: int) -> Any:
    """A fresh LoRA adapter (B = 0, so the policy starts as the base) on `base`. Returns a `PeftModel`."""
    from peft import LoraConfig, get_peft_model

    if lora.init in ("pissa", "olora"):
        raise ModelError(
            f"lora.init={lora.init} changes the base's weights, so the base would no longer be the reference",
            hint="use lora.init=default",
        )
    torch.manual_seed(seed)
    peft_config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        exclude_modules=list(FUSED_LAYERS) if is_state_space(type(base)) else _beside_the_decoder(base),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights=True if lora.init == "default" else lora.init,
        bias="none",
    )
    try:
        return get_peft_model(base, peft_config)
    except ValueError as error:
        raise ModelError(f"LoRA cannot be added: {first_line(error)}", hint="see lora.targets") from error


def _beside_the_decoder(base: Any) -> str | None:
    """A pattern of what is no part of the language model, such as the vision tower of one that also sees; else None.

    Pairs are text, so an adapter there would never get a gradient.
    """
    decoder = base.get_decoder()
    name = next(name for name, module in base.named_modules() if module is decoder)
    return rf"(?!{re.escape(name)}\.).*" if "." in name else None


def resume_adapter(base: Any, name: str, base_fingerprint: str, dropout: float) -> Any:
    """Go on from a trained adapter: the policy starts as it, and a frozen copy of it is the reference.

    Args:
        base_fingerprint: of the base's weights; compared with those that the adapter was trained on, where recorded.
        dropout: of the policy from now on, whatever the adapter was trained with.

    Raises:
        ModelError: no adapter there, one of another base, or one with weights that a frozen copy would not undo.
    """
    from peft import PeftModel

    folder = _adapter_of(name, base_fingerprint)
    with _fitting(name):
        model = PeftModel.from_pretrained(base, folder, adapter_name=POLICY_ADAPTER, is_trainable=True)
        model.load_adapter(folder, adapter_name=REFERENCE_ADAPTER, is_trainable=False)
    model.set_adapter(POLICY_ADAPTER)
    model.peft_config[POLICY_ADAPTER].lora_dropout = dropout
    _set_dropout(model, {REFERENCE_ADAPTER: 0.0, POLICY_ADAPTER: dropout})
    return model


def trained_adapter(base: Any, name: str, base_fingerprint: str) -> Any:
    """A trained adapter on its base, to be used and not trained: it is the policy, and adapter-off the reference.

    Raises:
        ModelError: as `resume_adapter` does.
    """
    from peft import PeftModel

    folder = _adapter_of(name, base_fingerprint)
    with _fitting(name):
        return PeftModel.from_pretrained(base, folder, adapter_name=POLICY_ADAPTER)


def _adapter_of(name: str, base_fingerprint: str) -> Path:
    """The adapter's folder, if it was trained on these weights or does not say on which."""
    folder = adapter_to_go_on_from(name)
    record = read_adapter(folder).record
    if record.get("base_fingerprint", base_fingerprint) != base_fingerprint:
        raise ModelError(
            f"adapter '{name}' was trained on '{record.get('base_model')}', and the base given has other weights",
            hint="give the model that it was trained on",
        )
    return folder


@contextmanager
def _fitting(name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError, KeyError, TypeError, re.error) as error:
        raise ModelError(f"adapter '{name}' does not fit the base: {first_line(error)}") from error


def adapter_to_go_on_from(name: str, patterns: tuple[str, ...] = ADAPTER_FILES) -> Path:
    """The folder of an adapter, given by it, its run's folder or its name on the Hub.

    Args:
        patterns: the files to fetch from the Hub.

    Raises:
        ModelError: no adapter there, or settings that are more than plain LoRA.
    """
    folder = fetch(name, "model", revision=None, patterns=patterns)
    folder = folder / "adapter" if (folder / "adapter" / CONFIG_FILE).is_file() else folder
    if not (folder / CONFIG_FILE).is_file():
        raise ModelError(f"adapter '{name}': no {CONFIG_FILE} in {folder}", hint="give a run's folder or an adapter's")
    _refuse_moving_reference(name, read_json(folder / CONFIG_FILE))
    plain_settings(folder)
    return folder


def _refuse_moving_reference(name: str, settings: Mapping[str, Any]) -> None:
    """Stop at settings with which a frozen copy of the adapter would not undo what the adapter does to the base."""
    plain = {
        "bias": ("none", None),
        "modules_to_save": ([], None),
        "peft_type": ("LORA",),
        "task_type": ("CAUSAL_LM", None),
    }
    for key, allowed in plain.items():
        value = settings.get(key)
        if value not in allowed:
            raise ModelError(
                f"adapter '{name}': {key}={repr(value)[:100]} trains more than LoRA, which would move the reference",
                hint="go on from a LoRA adapter with bias='none' and no modules_to_save",
            )
    init = settings.get("init_lora_weights")
    if init not in KEEPS_BASE:
        raise ModelError(
            f"adapter '{name}': init_lora_weights={repr(init)[:100]} changes the base on loading",
            hint="convert it to a plain LoRA adapter with PEFT first",
        )


def _set_dropout(model: Any, rates: Mapping[str, float]) -> None:
    for module in model.modules():
        dropouts = getattr(module, "lora_dropout", None) or {}
        for name, rate in rates.items():
            if name in dropouts:
                dropouts[name] = nn.Dropout(rate) if rate else nn.Identity()


def adopt_reference(policy: Policy, folder: Path) -> None:
    """Make the adapter saved in `folder` the frozen reference, in place of whatever was; the policy stays active.

    Raises:
        ModelError: there is no plain LoRA adapter in safetensors.
    """
    from peft import set_peft_model_state_dict

    model = policy.model
    read_adapter(folder)
    if REFERENCE_ADAPTER in model.peft_config:
        set_peft_model_state_dict(model, read_tensors(folder), adapter_name=REFERENCE_ADAPTER)
        return
    model.load_adapter(folder, adapter_name=REFERENCE_ADAPTER, is_trainable=False)
    model.set_adapter(POLICY_ADAPTER)
    _set_dropout(model, {REFERENCE_ADAPTER: 0.0})


def lora_section(model: Any) -> LoraSection:
    """What the policy's adapter really is: a recipe's `lora` section cannot change one that was gone on from."""
    peft_config = model.peft_config[POLICY_ADAPTER]
    targets = peft_config.target_modules
    return LoraSection(
        r=peft_config.r,
        alpha=peft_config.lora_alpha,
        dropout=peft_config.lora_dropout,
        targets=targets if isinstance(targets, str) else sorted(targets),
        rslora=peft_config.use_rslora,
        dora=peft_config.use_dora,
    )


def save_adapter(policy: Policy, folder: Path) -> None:
    """Write the policy's adapter in PEFT's format."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    settings = copy.copy(policy.model.peft_config[POLICY_ADAPTER])
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
    weights = get_peft_model_state_dict(policy.model, adapter_name=POLICY_ADAPTER, save_embedding_layers=False)
    save_file({name: tensor.contiguous().cpu() for name, tensor in weights.items()}, folder / WEIGHTS_FILE)


def load_adapter_weights(policy: Policy, folder: Path) -> None:
    """Overwrite the policy's adapter with the one saved in `folder`."""
    from peft import set_peft_model_state_dict

    outcome = set_peft_model_state_dict(policy.model, read_tensors(folder), adapter_name=POLICY_ADAPTER)
    if outcome.unexpected_keys:
        raise ModelError(f"the adapter in {folder} does not fit: {outcome.unexpected_keys[0]} is not in the model")
