"""Models of a few thousand weights, a tokenizer and pairs to go with them, all made on the spot."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from sampo_cli.batch import Pair

VOCABULARY = 320


class PairList(list[Pair]):
    """Pairs in memory, with the ids and lengths that the trainer plans by."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        super().__init__(pairs)
        self.pair_ids = np.array([pair.pair_id for pair in self])
        self.prompt_tokens, self.chosen_tokens, self.rejected_tokens = (
            np.array([len(getattr(pair, part)) for pair in self]) for part in ("prompt", "chosen", "rejected")
        )


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _sizes(*without: str, **more: Any) -> dict[str, Any]:
    return {key: value for key, value in SIZES.items() if key not in without} | more


MIXED = ["sliding_attention", "full_attention"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=8),
    "gemma2": lambda: Gemma2Config(**SIZES, sliding_window=8, layer_types=MIXED, query_pre_attn_scalar=16),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, sliding_window=8, layer_types=MIXED, query_pre_attn_scalar=16),
    "qwen2": lambda: Qwen2Config(**_sizes("head_dim"), tie_word_embeddings=True),
    "qwen2-window": lambda: Qwen2Config(
        **_sizes("head_dim"), use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "phi3": lambda: Phi3Config(**_sizes("head_dim"), sliding_window=8),
    "gpt_neox": lambda: GPTNeoXConfig(**_sizes("head_dim", "num_key_value_heads"), rotary_pct=0.5),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2,
    ),
    "mamba": lambda: MambaConfig(
        vocab_size=VOCABULARY, hidden_size=64, state_size=4, num_hidden_layers=2, initializer_range=0.2
    ),
}  # fmt: skip


def make_model(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def make_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a handful of merges, ChatML's special tokens and `template`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the user and the assistant say the same thing again and again"] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    fast.chat_template = template
    return fast


def save_model(config: Any, folder: Path, *, template: str | None = CHATML, **options: Any) -> Path:
    make_model(config).save_pretrained(folder, **options)
    make_tokenizer(template).save_pretrained(folder)
    return folder


WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "cats",
    "dogs",
    "birds",
    "run",
    "walk",
    "sleep",
    "because",
    "and",
    "or",
    "so",
]


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs whose chosen response starts with 'yes' and whose rejected one starts with 'no': easy to learn."""
    generator = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(low, high)))

    return [
        {"prompt": f"{i}: {text(2, 8)}?", "chosen": f"yes {text(1, 12)}", "rejected": f"no {text(1, 12)}"}
        for i in range(count)
    ]


def write_pairs(path: Path, count: int, seed: int = 0) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(count, seed)))
    return path
