"""The commands with which other programs take what was exported: shown after an export, and nothing more."""

from __future__ import annotations

import shlex
from pathlib import Path

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `vllm serve --max-lora-rank` takes."""


def model_commands(folder: Path) -> dict[str, str]:
    """For a whole model in transformers' format."""
    messages = [{"role": "user", "content": "What is a hash table?"}]
    code = (
        f"from transformers import pipeline; chat = pipeline('text-generation', {str(folder)!r}); "
        f"print(chat({messages}, max_new_tokens=64)[0]['generated_text'][-1]['content'])"
    )
    return {"vllm": shlex.join(["vllm", "serve", str(folder)]), "transformers": _python(code)}


def _python(code: str) -> str:
    """A line of Python as a command; in double quotes, easier to read, where a shell leaves it alone in them."""
    plain = not set(code) & set('"$`\\!')
    return f'python -c "{code}"' if plain else shlex.join(["python", "-c", code])


def gguf_commands(file: Path, modelfile: Path, name: str) -> dict[str, str]:
    """For a GGUF file and its Modelfile."""
    create = shlex.join(["ollama", "create", name.lower(), "-f", str(modelfile)])
    return {"ollama": create, "llama.cpp": shlex.join(["llama-server", "--jinja", "-m", str(file)])}


def adapter_commands(folder: Path, base: str, name: str, rank: int) -> dict[str, str]:
    """For an adapter that is loaded beside its base."""
    words = ["vllm", "serve", base, "--enable-lora", "--lora-modules", f"{name}={folder}"]
    words += ["--max-lora-rank", str(next(size for size in VLLM_RANKS if size >= rank))]
    if (folder / "chat_template.jinja").is_file():
        words += ["--chat-template", str(folder / "chat_template.jinja")]
    code = (
        "from peft import AutoPeftModelForCausalLM; "
        f"print(AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}, dtype='auto'))"
    )
    return {"vllm": shlex.join(words), "peft": _python(code)}
