"""Models of a known architecture with random weights, made on the spot: nothing is downloaded.

Weights are written once, in bfloat16, beside the other things that sampo can make again, and loaded from there by
whoever trains. What such a model says is nonsense; what a step costs is the same.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sampo_cli.cache import cache_folder

SHARD_BYTES = 2 * 2**30
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _llama(**sizes: int | bool) -> Callable[[], Any]:
    def config() -> Any:
        from transformers import LlamaConfig

        rope = {"rope_type": "default", "rope_theta": 500_000.0}
        return LlamaConfig(
            **sizes, rope_parameters=rope, rms_norm_eps=1e-5, pad_token_id=0, bos_token_id=1, eos_token_id=2
        )

    return config


RANDOM_MODELS: dict[str, Callable[[], Any]] = {
    "llama3-8b-random": _llama(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192,
    ),
    "llama3-1b-random": _llama(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "tiny-random": _llama(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192,
    ),
}  # fmt: skip
"""Llama-3-8B, Llama-3.2-1B, and one to try things out with."""


def random_model(name: str) -> Path:
    """The folder of a random model, made if it is not there yet."""
    folder = cache_folder() / "random-models" / name
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
        try:
            write_random(RANDOM_MODELS[name](), aside)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def write_random(config: Any, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model of `config` with random weights, shard by shard, and a byte-level tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tied = set(skeleton.all_tied_weights_keys)
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items() if name not in tied}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)

    def weight(shape: Any) -> Any:
        if len(shape) == 1:  # a norm's scale
            return torch.ones(shape, dtype=torch.bfloat16)
        values = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return values.normal_(0, config.initializer_range, generator=generator).cpu()

    shards = list(_shards(shapes, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: weight(shapes[name]) for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    size = 2 * sum(shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    byte_tokenizer().save_pretrained(folder)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # those who train are other processes
    config.architectures, config.dtype = [type(skeleton).__name__], torch.bfloat16
    config.save_pretrained(folder)


def _shards(shapes: dict[str, Any], shard_bytes: int) -> Iterator[list[str]]:
    """Names in groups of at most `shard_bytes`, two bytes an element, one at least."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + 2 * shape.numel() > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * shape.numel()
    yield names


def byte_tokenizer() -> Any:
    """A token for each byte, and ChatML's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHATML
    return fast
