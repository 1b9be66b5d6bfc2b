"""Loading: a quantized base, adapters on it, and what they are.

Nothing is cast behind the user's back: linear layers are stored as asked and the rest stays in the compute dtype.
Only safetensors are read. The adapters themselves are `lora.py`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sampo_cli.activations import Checkpointing, set_checkpointing
from sampo_cli.config import LoraSection, ModelConfig
from sampo_cli.errors import ModelError, OutOfMemory
from sampo_cli.fingerprint import weights_fingerprint
from sampo_cli.flex import use_attention
from sampo_cli.kernels import use_kernels
from sampo_cli.lora import add_adapter, resume_adapter
from sampo_cli.lora_linear import join_adapters
from sampo_cli.policy import FUSED_LAYERS, POLICY_ADAPTER, Policy, check_head, find_layout, is_state_space, use_pieces
from sampo_cli.remote import fetch_model, first_line, local_folder
from sampo_cli.sharding import is_sharded, shard
from sampo_cli.sizes import Sizes, kept_bytes
from sampo_cli.trust import does_not_load

NF4_BLOCK = 64
"""Weights that share one scale in bitsandbytes' 4-bit storage."""


@dataclass(frozen=True)
class ModelFacts:
    """What was really loaded, to print and to record."""

    folder: Path
    fingerprint: str
    device: str
    dtype: str
    quantized_layers: int
    linear_layers: int
    trainable_parameters: int
    total_parameters: int
    parameter_bytes: int
    kept_bytes: int
    adapter_layers: int
    layout: str
    layout_reason: str
    context: int | None
    attention: str
    kernels: str = "none"
    dtypes: dict[str, int] = field(default_factory=dict)


def pick_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype: as named, or bfloat16 where the device computes in it, else float16 (GPU) or float32 (CPU)."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast_bfloat16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast_bfloat16 else torch.float32


def load_config(config: ModelConfig, folder: Path) -> Any:
    """The architecture's config with every dropout at 0, so that two forwards of one model agree."""
    from transformers import AutoConfig

    try:
        architecture = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # whatever a config makes transformers raise
        hint = "its config.json must be one that transformers knows"
        what, trusted = f"model '{config.name}'", config.trust_remote_code
        raise does_not_load(what, folder, first_line(error), hint, trusted=trusted) from error
    for part in {id(part): part for part in (architecture, architecture.get_text_config())}.values():
        for key, value in part.to_dict().items():
            if isinstance(value, float) and any(word in key for word in ("dropout", "pdrop", "layerdrop", "jitter")):
                setattr(part, key, 0.0)
    return architecture


def context_length(architecture: Any) -> int | None:
    """Positions that the model was made for, where its config says."""
    return getattr(architecture.get_text_config(), "max_position_embeddings", None)


def _quantization(config: ModelConfig, architecture: Any, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import BitsAndBytesConfig

    misread = device.type == "cpu" and config.quantization == "nf4"
    left_out = unquantized_layers(architecture, on_cpu=misread, trust_remote_code=config.trust_remote_code)
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left_out)
    return BitsAndBytesConfig(
        llm_int8_skip_modules=left_out,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if is_sharded() else torch.uint8,  # FSDP shares out what has the compute dtype
    )


def unquantized_layers(architecture: Any, *, on_cpu: bool, trust_remote_code: bool = False) -> list[str]:
    """Names of the linear layers that stay in the compute dtype.

    The head; layers that state-space kernels read directly; and on the CPU those whose input size is no multiple of
    `NF4_BLOCK`: bitsandbytes 0.50 packs them rightly there but unpacks blocks that straddle two rows wrongly.
    """
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(architecture, trust_remote_code=trust_remote_code)
    head = skeleton.get_output_embeddings()
    fused = FUSED_LAYERS if is_state_space(type(skeleton)) else ()

    def stays(name: str, module: nn.Module) -> bool:
        inputs = module.weight.shape[0] if isinstance(module, Conv1D) else getattr(module, "in_features", NF4_BLOCK)
        return module is head or name.rpartition(".")[2] in fused or (on_cpu and bool(inputs % NF4_BLOCK))

    return [name for name, module in skeleton.named_modules() if stays(name, module)]


def _require_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:
        raise ModelError(
            f"bitsandbytes cannot be imported: {first_line(error)}",
            hint="pip install bitsandbytes, or train on an unquantized base with --quantization none",
        ) from error


def load_base(config: ModelConfig, device: torch.device) -> Any:
    """The base as a transformers causal language model, frozen, in train mode with dropout off.

    Raises:
        ModelError: not found, not loadable, already quantized otherwise, or nothing of it was quantized.
        OutOfMemory: no room on the device.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if config.quantization != "none":
        _require_bitsandbytes()
    folder = fetch_model(config.name, config.revision)
    architecture = load_config(config, folder)
    dtype = pick_dtype(config.dtype, device)
    place = torch.device("cpu") if is_sharded() else device  # a base to be shared out may be larger than a device
    options: dict[str, Any] = {"config": architecture, "dtype": dtype, "device_map": {"": place}}
    if config.attention in ("sdpa", "eager"):
        options["attn_implementation"] = config.attention
    try:
        if config.quantization != "none":
            options["quantization_config"] = _quantization(config, architecture, dtype, device)
        with _bars_on_terminals_only():
            model = AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=config.trust_remote_code, **options
            )
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"no room on {device} for model '{config.name}'", hint="use --quantization nf4 or a smaller model"
        ) from error
    except (ValueError, OSError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        hint = "it must be a causal language model that transformers knows, with whole safetensors files"
        what, trusted = f"model '{config.name}'", config.trust_remote_code
        raise does_not_load(what, folder, first_line(error), hint, trusted=trusted) from error
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _use_training_kernels(model)
    if config.quantization != "none" and not count_quantized(model):
        raise ModelError(
            f"model '{config.name}': {config.quantization} was asked for, but no layer was quantized",
            hint="use --quantization none for this architecture",
        )
    return model.train()


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Inside, transformers draws no progress bars into files and notebooks."""
    from transformers.utils import logging as progress

    drawn = progress.is_progress_bar_enabled() and not sys.stderr.isatty()
    if drawn:
        progress.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            progress.enable_progress_bar()


def _use_training_kernels(model: nn.Module) -> None:
    """Keep bitsandbytes on one code path on the CPU.

    In eval mode it repacks 4-bit weights for AVX512, whose results differ from those of training; policy and
    reference must be computed alike.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def count_quantized(model: nn.Module) -> int:
    """Number of linear layers stored in 4 or 8 bits. PEFT's wrappers carry the same class names and do not count."""
    quantized = ("bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Linear8bitLt")
    return sum(f"{type(module).__module__}.{type(module).__qualname__}" in quantized for module in model.modules())


def load_policy(
    config: ModelConfig, lora: LoraSection, *, seed: int, checkpointing: Checkpointing = "all", offload: bool = False
) -> tuple[Policy, ModelFacts]:
    """Base, adapters, checkpointing and layout, ready to train."""
    device = pick_device()
    base = load_base(config, device)
    kernels, no_flex = use_kernels(base, config.kernels), use_attention(base, config.attention)
    fingerprint = weights_fingerprint(fetch_model(config.name, config.revision))
    if config.adapter:
        model = resume_adapter(base, config.adapter, fingerprint, lora.dropout)
    else:
        model = add_adapter(base, lora, seed)
    for adapter in model.peft_config.values():
        adapter.base_model_name_or_path = str(local_folder(config.name) or config.name)
        adapter.revision = config.revision
    set_checkpointing(base, checkpointing)
    join_adapters(model, checkpointing)
    policy = Policy(model, dtype=pick_dtype(config.dtype, device), offload=offload)
    sizes = Sizes.of(model)
    if is_sharded():
        shard(policy.causal_lm, device)
        policy.sharded = True
    reason = settle_layout(policy, config)
    facts = describe(policy, config, reason, fingerprint, sizes)
    attention = f"{facts.attention} ({no_flex})" if no_flex else facts.attention
    return policy, replace(facts, attention=attention, kernels=kernels)


def settle_layout(policy: Policy, config: ModelConfig) -> str:
    """Check the head of a loaded model and find its layout; the reason for two rows per pair, if the test found one.

    Raises:
        ModelError: see `check_head`.
    """
    check_head(policy)
    reason = ""
    if config.layout == "auto":
        policy.layout, reason = find_layout(policy)
    else:
        policy.layout = config.layout
    use_pieces(policy)
    return reason


def describe(policy: Policy, config: ModelConfig, layout_reason: str, fingerprint: str, sizes: Sizes) -> ModelFacts:
    """What was loaded."""
    model = policy.model
    causal_lm = policy.causal_lm
    folder = fetch_model(config.name, config.revision)
    return ModelFacts(
        folder=folder,
        fingerprint=fingerprint,
        device=str(causal_lm.device),
        dtype=str(pick_dtype(config.dtype, causal_lm.device)).removeprefix("torch."),
        quantized_layers=count_quantized(model),
        linear_layers=sum(isinstance(m, nn.Linear) and ".lora_" not in name for name, m in model.named_modules()),
        trainable_parameters=sizes.trainable,
        total_parameters=sizes.total,
        parameter_bytes=sizes.bytes,
        kept_bytes=kept_bytes(model),
        adapter_layers=sum(POLICY_ADAPTER in getattr(module, "lora_A", ()) for module in model.modules()),
        layout=policy.layout,
        layout_reason=layout_reason,
        context=context_length(causal_lm.config),
        attention=policy.attention,
        dtypes=dict(sizes.dtypes),
    )
