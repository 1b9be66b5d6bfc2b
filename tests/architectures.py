"""Models that people tune, as their config.json on the Hub describes them, and how many parameters the Hub counts.

What no dry run depends on is left at its default: epsilons, frequencies of rotary embeddings, ids of special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)


@dataclass(frozen=True)
class Architecture:
    """A model on the Hub.

    Attributes:
        parameters: that the Hub counts in its safetensors.
        kind: class of its config in transformers.
        settings: of the config.
    """

    parameters: int
    kind: Any
    settings: Mapping[str, Any]

    def config(self) -> Any:
        return self.kind(**self.settings)


def sizes(vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, context: int) -> dict:
    """What all configs have, by transformers' names."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
    }


TIED = {"tie_word_embeddings": True}
GEMMA_2 = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}
GEMMA_3 = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 1024}
SIGLIP = {
    **{"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16},
    **{"image_size": 896, "patch_size": 14, "vision_use_head": False},
}
"""The vision tower of Gemma 3."""


def with_vision(**settings: Any) -> dict[str, Any]:
    return {"text_config": settings, "vision_config": SIGLIP, "mm_tokens_per_image": 256}


def phi(original_context: int, *numbers: int, **settings: Any) -> dict[str, Any]:
    return {**sizes(*numbers), "original_max_position_embeddings": original_context, **settings}


ARCHITECTURES = {
    "meta-llama/Llama-3.2-3B-Instruct": Architecture(
        3_212_749_824, LlamaConfig, sizes(128_256, 3072, 8192, 28, 24, 8, 131_072) | TIED
    ),
    "meta-llama/Llama-3.1-8B-Instruct": Architecture(
        8_030_261_248, LlamaConfig, sizes(128_256, 4096, 14_336, 32, 32, 8, 131_072)
    ),
    "meta-llama/Llama-3.3-70B-Instruct": Architecture(
        70_553_706_496, LlamaConfig, sizes(128_256, 8192, 28_672, 80, 64, 8, 131_072)
    ),
    "Qwen/Qwen2.5-3B-Instruct": Architecture(
        3_085_938_688, Qwen2Config, sizes(151_936, 2048, 11_008, 36, 16, 2, 32_768) | TIED
    ),
    "Qwen/Qwen2.5-7B-Instruct": Architecture(
        7_615_616_512, Qwen2Config, sizes(152_064, 3584, 18_944, 28, 28, 4, 32_768)
    ),
    "Qwen/Qwen2.5-14B-Instruct": Architecture(
        14_770_033_664, Qwen2Config, sizes(152_064, 5120, 13_824, 48, 40, 8, 32_768)
    ),
    "Qwen/Qwen2.5-72B-Instruct": Architecture(
        72_706_203_648, Qwen2Config, sizes(152_064, 8192, 29_568, 80, 64, 8, 32_768)
    ),
    "Qwen/Qwen3-4B-Instruct-2507": Architecture(
        4_022_468_096, Qwen3Config, sizes(151_936, 2560, 9728, 36, 32, 8, 262_144) | TIED | {"head_dim": 128}
    ),
    "Qwen/Qwen3-8B": Architecture(
        8_190_735_360, Qwen3Config, sizes(151_936, 4096, 12_288, 36, 32, 8, 40_960) | {"head_dim": 128}
    ),
    "Qwen/Qwen3-14B": Architecture(
        14_768_307_200, Qwen3Config, sizes(151_936, 5120, 17_408, 40, 40, 8, 40_960) | {"head_dim": 128}
    ),
    "Qwen/Qwen3-32B": Architecture(
        32_762_123_264, Qwen3Config, sizes(151_936, 5120, 25_600, 64, 64, 8, 40_960) | {"head_dim": 128}
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": Architecture(
        7_248_023_552, MistralConfig, sizes(32_768, 4096, 14_336, 32, 32, 8, 32_768) | {"sliding_window": None}
    ),
    "mistralai/Mistral-Nemo-Instruct-2407": Architecture(
        12_247_782_400,
        MistralConfig,
        sizes(131_072, 5120, 14_336, 40, 32, 8, 131_072) | {"head_dim": 128, "sliding_window": None},
    ),
    "mistralai/Mistral-Small-24B-Instruct-2501": Architecture(
        23_572_403_200,
        MistralConfig,
        sizes(131_072, 5120, 32_768, 40, 32, 8, 32_768) | {"head_dim": 128, "sliding_window": None},
    ),
    "google/gemma-2-2b-it": Architecture(
        2_614_341_888, Gemma2Config, sizes(256_000, 2304, 9216, 26, 8, 4, 8192) | GEMMA_2
    ),
    "google/gemma-2-9b-it": Architecture(
        9_241_705_984, Gemma2Config, sizes(256_000, 3584, 14_336, 42, 16, 8, 8192) | GEMMA_2
    ),
    "google/gemma-2-27b-it": Architecture(
        27_227_128_320,
        Gemma2Config,
        sizes(256_000, 4608, 36_864, 46, 32, 16, 8192) | GEMMA_2 | {"head_dim": 128, "query_pre_attn_scalar": 144},
    ),
    "google/gemma-3-1b-it": Architecture(
        999_885_952,
        Gemma3TextConfig,
        sizes(262_144, 1152, 6912, 26, 4, 1, 32_768) | GEMMA_3 | {"sliding_window": 512},
    ),
    "google/gemma-3-4b-it": Architecture(
        4_300_079_472, Gemma3Config, with_vision(**sizes(262_208, 2560, 10_240, 34, 8, 4, 131_072), **GEMMA_3)
    ),
    "google/gemma-3-12b-it": Architecture(
        12_187_325_040, Gemma3Config, with_vision(**sizes(262_208, 3840, 15_360, 48, 16, 8, 131_072), **GEMMA_3)
    ),
    "google/gemma-3-27b-it": Architecture(
        27_432_406_640,
        Gemma3Config,
        with_vision(
            **sizes(262_208, 5376, 21_504, 62, 32, 16, 131_072),
            **GEMMA_3 | {"head_dim": 128, "query_pre_attn_scalar": 168},
        ),
    ),
    "microsoft/Phi-3.5-mini-instruct": Architecture(
        3_821_079_552, Phi3Config, phi(4096, 32_064, 3072, 8192, 32, 32, 32, 131_072, sliding_window=262_144)
    ),
    "microsoft/Phi-4-mini-instruct": Architecture(
        3_836_021_760,
        Phi3Config,
        phi(4096, 200_064, 3072, 8192, 32, 24, 8, 131_072, sliding_window=262_144, **TIED),
    ),
    "microsoft/phi-4": Architecture(14_659_507_200, Phi3Config, phi(16_384, 100_352, 5120, 17_920, 40, 40, 10, 16_384)),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": Architecture(
        1_711_376_384, LlamaConfig, sizes(49_152, 2048, 8192, 24, 32, 32, 8192) | TIED
    ),
    "allenai/OLMo-2-0425-1B-Instruct": Architecture(
        1_484_916_736, Olmo2Config, sizes(100_352, 2048, 8192, 16, 16, 16, 4096)
    ),
    "allenai/OLMo-2-1124-7B-Instruct": Architecture(
        7_298_617_344, Olmo2Config, sizes(100_352, 4096, 11_008, 32, 32, 32, 4096)
    ),
    "allenai/OLMo-2-1124-13B-Instruct": Architecture(
        13_716_198_400, Olmo2Config, sizes(100_352, 5120, 13_824, 40, 40, 40, 4096)
    ),
    "allenai/OLMo-2-0325-32B-Instruct": Architecture(
        32_234_279_936, Olmo2Config, sizes(100_352, 5120, 27_648, 64, 40, 8, 4096)
    ),
}
