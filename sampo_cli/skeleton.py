"""A policy without weights: the modules that a run would load, quantized and with adapters, on fake tensors.

Built from the config on the meta device, then given fake tensors of torch: they have shapes, dtypes and autograd, and
every operator takes them as if they were real, but nothing is stored. No weight file is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from sampo_cli.adapter import CONFIG_FILE
from sampo_cli.config import LoraSection, ModelConfig
from sampo_cli.errors import ModelError
from sampo_cli.flex import FLEX
from sampo_cli.lora import adapter_to_go_on_from, add_adapter
from sampo_cli.model import NF4_BLOCK, unquantized_layers
from sampo_cli.pair_attention import NAME as IN_PIECES
from sampo_cli.remote import first_line
from sampo_cli.target import ON_CPU, ON_CUDA

NESTED_BLOCK = 256
"""Scales of NF4 blocks that share a scale of their own (arXiv 2305.14314, double quantization)."""


def build_base(config: ModelConfig, architecture: Any, dtype: torch.dtype, device: str) -> Any:
    """The base on the meta device, frozen, in train mode, its linear layers stored as `config.quantization` says.

    Args:
        dtype: compute dtype.
        device: kind of the device that it is meant for, "cpu" or "cuda".
    """
    from transformers import AutoModelForCausalLM

    named = {"attn_implementation": config.attention} if config.attention in ("sdpa", "eager") else {}
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            architecture, dtype=dtype, trust_remote_code=config.trust_remote_code, **named
        )
    base.requires_grad_(False)
    if config.quantization != "none":
        try:
            _quantize(base, config, architecture, dtype, device)
        except ImportError as error:
            hint = "pip install bitsandbytes, or --quantization none"
            raise ModelError(f"bitsandbytes cannot be imported: {first_line(error)}", hint=hint) from error
    _choose_attention(base, config.attention, device)
    return base.train()


def _choose_attention(base: Any, wanted: str, device: str) -> None:
    """Switch to what `load_policy` switches to: flex on CUDA where the architecture has it, or sdpa in pieces."""
    flex = device == ON_CUDA and wanted in ("auto", "flex") and base._supports_flex_attn and base._supports_sdpa
    settings = base.config.get_text_config()
    if flex or settings._attn_implementation == "sdpa":
        settings._attn_implementation = FLEX if flex else IN_PIECES


def _quantize(base: Any, config: ModelConfig, architecture: Any, dtype: torch.dtype, device: str) -> None:
    """What transformers does before it loads weights and bitsandbytes when they come, but for the numbers."""
    import bitsandbytes as bnb
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear

    four_bits = config.quantization == "nf4"
    stays = unquantized_layers(
        architecture, on_cpu=four_bits and device == ON_CPU, trust_remote_code=config.trust_remote_code
    )
    options: dict[str, Any] = {"load_in_8bit": True}
    if four_bits:
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    settings = BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=dtype)
    replace_with_bnb_linear(base, modules_to_not_convert=stays, quantization_config=settings)
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = four_bits, not four_bits  # PEFT asks for these
    for layer in base.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.weight = _packed(layer, dtype)
        elif isinstance(layer, bnb.nn.Linear8bitLt):
            rows, columns = layer.weight.shape
            weight = torch.empty(rows, columns, dtype=torch.int8, device="meta")
            scales = torch.empty(rows, device="meta")
            layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, CB=weight, SCB=scales)
        if isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) and layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)


def _packed(layer: Any, dtype: torch.dtype) -> Any:
    """A 4-bit weight as bitsandbytes keeps it: two weights a byte, a byte of scale a block, and the scales' scales."""
    import bitsandbytes as bnb

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weights = layer.weight.numel()
    blocks = -(-weights // NF4_BLOCK)
    nested = bnb.functional.QuantState(
        absmax=meta(-(-blocks // NESTED_BLOCK)), code=meta(256), blocksize=NESTED_BLOCK, dtype=torch.float32
    )
    state = bnb.functional.QuantState(
        absmax=meta(blocks, dtype=torch.uint8),
        shape=layer.weight.shape,
        code=meta(16),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=meta(),
        state2=nested,
    )
    packed = meta((weights + 1) // 2, 1, dtype=torch.uint8)
    return bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True, module=layer)


def storages(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter and buffer of a model, with every tensor that is stored for it: itself, scales, lookup tables."""
    owner: Any
    for owner in {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values():
        yield owner, owner
        holder = getattr(owner, "quant_state", None)
        while holder is not None:
            yield from ((owner, part) for part in vars(holder).values() if isinstance(part, Tensor))
            holder = holder.state2
        if getattr(owner, "SCB", None) is not None:
            yield owner, owner.SCB


def put_fakes(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace every tensor of a model on the meta device by a fake one in main memory; shared ones stay shared."""
    made: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    def fake_parameter(meta: Any) -> Any:
        parameter: Any = nn.Parameter(fake(meta.data), requires_grad=meta.requires_grad)
        if getattr(meta, "quant_state", None) is not None:
            parameter.quant_state = meta.quant_state
            for state in (meta.quant_state, meta.quant_state.state2):
                vars(state).update({key: fake(part) for key, part in vars(state).items() if isinstance(part, Tensor)})
        if getattr(meta, "SCB", None) is not None:
            parameter.CB, parameter.SCB = parameter.data, fake(meta.SCB)
        return parameter

    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor.device.type == "meta":
                    if id(tensor) not in made:
                        make = fake_parameter if isinstance(tensor, nn.Parameter) else fake
                        made[id(tensor)] = (tensor, make(tensor))  # the old one too, so that no other has its id
                    table[name] = made[id(tensor)][1]


def layer_list(causal_lm: Any) -> tuple[nn.Module, str] | None:
    """Where a model keeps its layers: the module and the name of the list; None if they differ or are not found."""
    layers = causal_lm.config.get_text_config().num_hidden_layers
    for module in causal_lm.base_model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == layers:
                shapes = {tuple((key, p.shape, p.dtype) for key, p in layer.named_parameters()) for layer in child}
                return (module, name) if len(shapes) == 1 else None
    return None


@contextmanager
def cut_to(place: tuple[nn.Module, str], layers: int) -> Iterator[None]:
    """Inside, the model has its first `layers` layers only."""
    module, name = place
    whole: Any = getattr(module, name)
    setattr(module, name, nn.ModuleList(list(whole)[:layers]))
    try:
        yield
    finally:
        setattr(module, name, whole)


def with_adapter(base: Any, config: ModelConfig, lora: LoraSection) -> Any:
    """A `PeftModel` around the base: with a new adapter, or with one like that which the recipe goes on from."""
    if config.adapter is None:
        return add_adapter(base, lora, seed=0)
    from peft import PeftConfig, get_peft_model

    folder = adapter_to_go_on_from(config.adapter, patterns=(CONFIG_FILE,))
    try:
        settings = PeftConfig.from_pretrained(str(folder))
        settings.inference_mode = False
        return get_peft_model(base, settings)
    except (ValueError, OSError) as error:
        raise ModelError(f"adapter '{config.adapter}': {first_line(error)}", hint="give a run's folder") from error
