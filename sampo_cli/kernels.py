"""Fused kernels for what a layer does between its matrix products, from Liger where it is installed.

One loaded model is changed and nothing else. Its output layer and its loss stay as they are: `logprobs.py` has those.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sampo_cli.errors import ModelError
from sampo_cli.remote import first_line

MODEL_TYPES = frozenset(
    {"gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}
)
"""Architectures whose kernels are used: dense ones, as Liger's for experts read weights past adapters."""

ROTARY = "apply_rotary_pos_emb"
"""What transformers calls rotary embeddings in every architecture's module."""

TOLERANCE = 0.1
"""Share of its hidden states by which kernels may change a model: rounding in 16 bits, never another formula."""

INSTALL = "pip install liger-kernel"


def use_kernels(model: Any, choice: str) -> str:
    """Give a loaded transformers model Liger's kernels for norms, gated MLPs and rotary embeddings.

    Args:
        model: without adapters yet; they go around the linear layers, which stay.
        choice: `auto` where Liger is installed and has them, `liger` or else an error, `none`.

    Returns:
        What was replaced, to record: "none", with the reason where `auto` might have.

    Raises:
        ModelError: `liger` was asked for and cannot be had.
    """
    on_cuda = model.device.type == "cuda"
    if choice == "none" or (choice == "auto" and not on_cuda):
        return "none"
    kind = model.config.get_text_config().model_type
    hint = "--set model.kernels=auto"
    if find_spec("liger_kernel") is None:
        reason, hint = "Liger is not installed", INSTALL
    elif not on_cuda:
        reason = "Liger's kernels need a CUDA device"
    elif kind not in MODEL_TYPES:
        reason = f"there are none for models of type '{kind}'"
    else:
        reason = replace_parts(model)
    if not reason:
        return f"liger ({', '.join(replaced_parts(model))})"
    if choice == "liger":
        raise ModelError(f"model.kernels is liger, but {reason}", hint=hint)
    return f"none ({reason})"


def replace_parts(model: Any) -> str:
    """Replace what Liger has kernels for, if they run and compute the same; returns why it was left, or nothing."""
    before = _hidden(model)
    try:
        _apply(model)
        after = _hidden(model)
    except Exception as error:  # compilers fail in any way
        _put_back(model)
        return f"Liger's kernels do not run here ({type(error).__name__}: {first_line(error)})"[:200]
    difference = ((after - before).norm() / before.norm()).item()
    if not difference < TOLERANCE:
        _put_back(model)
        return f"with Liger's kernels its hidden states differ by {difference:.1%}"
    return ""


def replaced_parts(model: nn.Module) -> list[str]:
    """Names of the kinds of modules whose forward is Liger's, and of the function of their attention."""
    names = {module._get_name() for module in model.modules() if "forward" in vars(module)}
    return sorted(name.removeprefix("Liger") if name.startswith("Liger") else "rotary" for name in names)


def _hidden(model: Any) -> Tensor:
    """float32 hidden states of a few made-up tokens."""
    embedding = model.get_input_embeddings().weight
    tokens = torch.arange(64, device=embedding.device)[None] * 97 % embedding.shape[0]
    with torch.no_grad(), torch.autocast(embedding.device.type, dtype=embedding.dtype, enabled=embedding.itemsize == 2):
        return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state.float()


def _apply(model: Any) -> None:
    """Liger changes the model's modules, which is kept, and its architecture's Python module, which is put back.

    Attention layers look their rotary function up in that Python module, so each gets a forward that finds Liger's.
    """
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # it warns of kernels for other devices
    architecture = sys.modules[type(model).__module__]
    with _as_it_was(architecture):
        _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
        rotary = getattr(architecture, ROTARY)
    for module in model.modules():
        forward = type(module).forward
        if isinstance(forward, FunctionType) and ROTARY in forward.__code__.co_names:
            module.forward = MethodType(_calling(forward, ROTARY, rotary), module)


@contextmanager
def _as_it_was(module: ModuleType) -> Iterator[None]:
    """Afterwards, a Python module has the names and values that it had before."""
    before = dict(vars(module))
    try:
        yield
    finally:
        for name in vars(module).keys() - before.keys():
            delattr(module, name)
        vars(module).update(before)


def _calling(function: FunctionType, name: str, value: Any) -> FunctionType:
    """A copy of `function` that finds `value` under the global `name`."""
    scope = {**function.__globals__, name: value}
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _put_back(model: nn.Module) -> None:
    for module in model.modules():
        for name in ("forward", "extra_repr", "_get_name"):
            vars(module).pop(name, None)
