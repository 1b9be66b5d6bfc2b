"""A model in transformers' format as a GGUF file, without llama.cpp: Llama, Mistral, Qwen 2 and Qwen 3.

What llama.cpp's own converter does for these, with the `gguf` package, which comes from the same source: names of
tensors, metadata, 8-bit rounding. Other architectures are the converter's. Memory holds one tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sampo_cli.errors import ModelError, NumericsError
from sampo_cli.fingerprint import StoredTensor, read_header, weight_files
from sampo_cli.gguf_vocab import write_vocab

FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
"""What can be written here -> its name in `gguf.LlamaFileType`."""

ARCHITECTURES = {
    "LlamaForCausalLM": "LLAMA",
    "MistralForCausalLM": "LLAMA",
    "Qwen2ForCausalLM": "QWEN2",
    "Qwen3ForCausalLM": "QWEN3",
}
"""transformers' class -> its name in `gguf.MODEL_ARCH`."""

LARGEST_F16 = 65504.0
_ROPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class _Target:
    """A tensor on its way: the stored one, its file, and name and type in the GGUF file."""

    path: Path
    tensor: StoredTensor
    name: str
    kind: Any


def write_gguf(folder: Path, target: Path, kind: str, *, config: Any, tokenizer: Any, name: str) -> None:
    """Write `target` from the model in `folder`.

    Args:
        kind: a key of `FILE_TYPES`.
        config: the model's, as transformers reads it.
        tokenizer: the model's, loaded.
        name: what the file calls the model.

    Raises:
        ModelError: an architecture, a tokenizer or settings that are not among those known here.
        NumericsError: a weight that is not finite, or that float16 cannot hold.
    """
    import gguf

    architecture = (config.architectures or [""])[0]
    check_architecture(folder, config)
    arch = gguf.MODEL_ARCH[ARCHITECTURES[architecture]]
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[arch])
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
        _write_shape(writer, config)
        write_vocab(writer, folder, tokenizer, config.vocab_size)
        _write_tensors(writer, _targets(folder, arch, config, kind), _rope_factors(config), config)
    finally:
        writer.close()


def check_architecture(folder: Path, config: Any) -> None:
    """Raises ModelError for a model that is not among those known here."""
    architecture = (config.architectures or ["?"])[0]
    rope = config.get_text_config().to_dict().get("rope_parameters") or {}
    problem = None
    if architecture not in ARCHITECTURES:
        problem = f"{str(architecture)[:80]} is none of {', '.join(ARCHITECTURES)}"
    elif rope.get("rope_type", "default") not in _ROPES:
        problem = f"its rotary embeddings are of the kind {str(rope['rope_type'])[:40]!r}"
    elif config.hidden_act != "silu":
        problem = f"its activation is {str(config.hidden_act)[:40]!r}"
    if problem:
        raise ModelError(
            f"{folder}: it cannot be written as GGUF without llama.cpp: {problem}",
            hint="install llama.cpp, whose converter knows it, or give its folder with --llama-cpp",
        )


def _write_shape(writer: Any, config: Any) -> None:
    """Sizes and constants of the architecture.

    llama.cpp has no sliding window for these: up to one window's length it makes no difference, and that is the
    context then.
    """
    import gguf

    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    writer.add_block_count(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_context_length(min(window, config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rope_factors(config: Any) -> NDArray[np.float32] | None:
    """By what each frequency is divided in Llama 3.1 and later, [head / 2]; None for models without such a table.

    Long wavelengths are stretched by `factor`, short ones not, those between in proportion: transformers'
    `_compute_llama3_parameters`, as a table.
    """
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head, 2) / head)
    smooth = (rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    smooth = np.clip(smooth, 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _targets(folder: Path, arch: Any, config: Any, kind: str) -> list[_Target]:
    """Every stored tensor with its name and type in the GGUF file."""
    import gguf

    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found = []
    for path in weight_files(folder):
        for tensor in read_header(path):
            if tensor.name.endswith("rotary_emb.inv_freq"):
                continue
            if tensor.name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise ModelError(
                    f"{folder}: '{tensor.name}' has no place in a GGUF file of this architecture",
                    hint="install llama.cpp, whose converter may know it",
                )
            found.append(_Target(path, tensor, name, _kind(tensor, name, kind)))
    return found


def _kind(tensor: StoredTensor, name: str, kind: str) -> Any:
    """The type of a tensor: vectors stay in float32; rows that do not divide into blocks of 32 are float16."""
    import gguf

    if len(tensor.shape) < 2 or name.endswith("_norm.weight"):
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0]:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[kind.upper()]


def _write_tensors(writer: Any, targets: list[_Target], rope: NDArray[np.float32] | None, config: Any) -> None:
    """The list of tensors, then each of them."""
    import gguf

    if rope is not None:
        writer.add_tensor_info("rope_freqs.weight", rope.shape, rope.dtype, rope.nbytes)
    for target in targets:
        plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
        shape, dtype = target.tensor.shape, np.dtype(plain.get(target.kind, np.uint8))
        if target.kind not in plain:
            shape = gguf.quant_shape_to_byte_shape(shape, target.kind)
        writer.add_tensor_info(target.name, shape, dtype, math.prod(shape) * dtype.itemsize, target.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if rope is not None:
        writer.write_tensor_data(rope)
    for target in targets:
        writer.write_tensor_data(gguf.quantize(_read(target, config), target.kind))


def _read(target: _Target, config: Any) -> NDArray[np.float32]:
    """A tensor in float32, its rows in llama.cpp's order."""
    import gguf
    from safetensors import safe_open

    with safe_open(target.path, framework="pt") as file:
        value = file.get_tensor(target.tensor.name).to(torch.float32)
    peak = float(value.abs().max())
    if not math.isfinite(peak):
        raise NumericsError(f"'{target.tensor.name}' is not finite in {target.path}", hint="merge again")
    if target.kind == gguf.GGMLQuantizationType.F16 and peak > LARGEST_F16:
        raise NumericsError(
            f"'{target.tensor.name}' has a weight of {peak:.3g}, which float16 cannot hold",
            hint="take --gguf bf16 or q8_0",
        )
    rotated = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    module = target.tensor.name.split(".")[-2]
    if ARCHITECTURES[config.architectures[0]] == "LLAMA" and module in rotated:
        value = interleaved(value, rotated[module])
    return value.numpy()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in the order that llama.cpp rotates in for Llama.

    transformers rotates element i of a head with element i + half; llama.cpp's `llama` rotates neighbours, as Meta's
    files do. [heads * head, ...] -> the same shape.
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)
