"""How far a merged model is from the one that was trained: log-probs against the live quantized base with its adapter.

The adapter was trained on a rounded base and is merged into the exact one, so the two differ; this says by how much.
One model is in memory at a time. Changes nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sampo_cli.adapter import Adapter
from sampo_cli.config import ModelConfig, read_recipe, validate
from sampo_cli.errors import SampoError
from sampo_cli.fingerprint import read_header, weight_files
from sampo_cli.model import context_length, load_base, load_config, pick_device
from sampo_cli.remote import first_line
from sampo_cli.trust import does_not_load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TOKENS = 512
"""A text is cut to its last tokens; more would only take time."""

SENTENCES = (
    "The capital of France is Paris. It lies on the Seine, and about two million people live there.",
    "To boil an egg, put it into boiling water for seven minutes, then cool it under running water.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "She wrote a short letter to her brother, thanked him for the book, and asked when he would visit.",
)

_CHUNK = 64
_ROOM = 1.25


@dataclass(frozen=True)
class Drift:
    """Differences of per-token log-probs, merged minus live, in nats.

    Attributes:
        tokens: number of tokens compared.
        mean_abs: mean of |difference|.
        max_abs: the largest |difference|.
        quantization: of the live base: nf4, int8 or none.
        texts: what was compared on: "pairs of the run", "sentences" (and why not the pairs) or "given texts".
    """

    tokens: int
    mean_abs: float
    max_abs: float
    quantization: str
    texts: str

    def describe(self) -> str:
        """One line for people."""
        live = "the unquantized base" if self.quantization == "none" else f"the {self.quantization} base"
        return (
            f"log-probs differ from those of {live} with the adapter by {self.mean_abs:.4f} nats a token on average, "
            f"{self.max_abs:.3f} at most ({self.tokens:,} tokens, {self.texts})"
        )


@dataclass(frozen=True)
class Text:
    """Token ids; those from `start` on are scored."""

    ids: Sequence[int]
    start: int = 1


def compare_with_live(
    adapters: list[Adapter],
    base: Path,
    merged: Path,
    *,
    pairs: int,
    texts: Sequence[Sequence[int]] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Drift | None, str | None]:
    """The drift of the model in `merged`, or None and the reason why it was not measured.

    Args:
        adapters: what was merged, parents first; the last one's record says how its base was quantized (nf4 if none).
        base: folder of the 16-bit base.
        pairs: how many pairs of the run to compare on; as many sentences where the run's pairs are out of reach.
        texts: token ids to compare on instead.
    """
    if len(adapters) > 1 and any(adapter.dora for adapter in adapters):
        return None, "DoRA adapters on top of each other cannot be live on one base"
    if not torch.cuda.is_available() and not _fits_memory(merged):
        return None, "the merged model does not fit into this machine's memory"
    architecture = load_config(ModelConfig(name=str(merged), trust_remote_code=trust_remote_code), merged)
    context = context_length(architecture)
    if texts is None:
        recipe = adapters[-1].folder.parent / "recipe.yaml"
        try:
            chosen, kind = _own_texts(recipe, base, merged, pairs, context, trust_remote_code=trust_remote_code)
        except SampoError as error:
            return None, error.message
    else:
        chosen, kind = [Text(ids) for ids in texts], "given texts"
    chosen = [_cut(text, min(MAX_TOKENS, context or MAX_TOKENS)) for text in chosen]
    if not chosen:
        return None, "no tokenizer beside the adapter or the base"
    quantization = adapters[-1].record.get("quantization", "nf4")
    live = ModelConfig(
        name=str(base),
        quantization=quantization,
        dtype=adapters[-1].record.get("dtype", "auto"),
        trust_remote_code=trust_remote_code,
    )
    plain = ModelConfig(name=str(merged), quantization="none", dtype="auto", trust_remote_code=trust_remote_code)
    try:
        expected = _scores(live, [adapter.folder for adapter in adapters], chosen)
        actual = _scores(plain.model_copy(update={"dtype": _stored_dtype(merged)}), [], chosen)
    except SampoError as error:
        return None, error.message
    except torch.OutOfMemoryError:
        return None, "the device has no room for the comparison"
    except (ValueError, RuntimeError, KeyError, OSError) as error:  # the merge is done; only its check is not
        return None, f"the comparison failed: {first_line(error)}"
    difference = (actual - expected).abs()
    return Drift(len(difference), difference.mean().item(), difference.max().item(), quantization, kind), None


def _fits_memory(merged: Path) -> bool:
    import psutil

    size = sum(path.stat().st_size for path in weight_files(merged))
    return bool(psutil.virtual_memory().available > size * _ROOM)


def _stored_dtype(merged: Path) -> str:
    stored = {tensor.dtype for path in weight_files(merged) for tensor in read_header(path)}
    return next(name for code, name in (("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")) if code in stored)


def _scores(config: ModelConfig, adapters: list[Path], texts: Sequence[Text]) -> Tensor:
    """Load a model with its adapters, score the texts and free it: float32 [tokens] on the CPU."""
    model = load_base(config, pick_device())
    if adapters:
        from peft import PeftModel

        names = [str(number) for number in range(len(adapters))]
        model = PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
        for folder, name in zip(adapters[1:], names[1:], strict=True):
            model.load_adapter(folder, adapter_name=name)
        base_model: Any = model.base_model
        base_model.set_adapter(names)
    model.eval()
    try:
        return torch.cat([token_logps(model, text) for text in texts])
    finally:
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@torch.no_grad()
def token_logps(model: Any, text: Text) -> Tensor:
    """log p(token | before it) of the scored tokens of a text, float32 on the CPU, from the model's own logits."""
    ids = torch.tensor([list(text.ids)], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, text.start - 1 : -1]
    chunks = [
        part.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        for part, targets in zip(torch.split(logits, _CHUNK), torch.split(ids[0, text.start :], _CHUNK), strict=True)
    ]
    return torch.cat(chunks).cpu()


def _own_texts(
    recipe: Path, base: Path, merged: Path, count: int, context: int | None, *, trust_remote_code: bool
) -> tuple[list[Text], str]:
    """What to compare on where nothing is given, and its name: the run's pairs, or sentences."""
    kind = "sentences"
    if recipe.is_file():
        try:
            return _pair_texts(recipe, base, count, context, trust_remote_code), "pairs of the run"
        except SampoError as error:
            kind = f"sentences, since the run's pairs cannot be read: {error.message}"
    return _sentence_texts(merged, count, trust_remote_code), kind


def _cut(text: Text, longest: int) -> Text:
    """The last `longest` tokens of a text."""
    dropped = max(0, len(text.ids) - longest)
    return Text(list(text.ids)[dropped:], max(1, text.start - dropped))


def _pair_texts(recipe: Path, base: Path, count: int, context: int | None, trust_remote_code: bool) -> list[Text]:
    """Prompt with chosen and prompt with rejected of the run's first pairs; the responses are scored.

    With the base's tokenizer, as in the run, so that the pairs are found in the cache.
    """
    from sampo_cli.dataset import prepare
    from sampo_cli.template import load_tokenizer

    config = validate(read_recipe(recipe))
    model = ModelConfig(name=str(base), trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(model, config.data)
    dataset = prepare(config.data, tokenizer, context=context)
    chosen = [dataset[index] for index in range(min(count, len(dataset)))]
    return [
        Text([*pair.prompt.tolist(), *response.tolist()], len(pair.prompt))
        for pair in chosen
        for response in (pair.chosen, pair.rejected)
    ]


def _sentence_texts(merged: Path, count: int, trust_remote_code: bool) -> list[Text]:
    if not any((merged / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return []
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(merged, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the tokenizer's own files make transformers raise
        hint = "only the comparison with the live model needs it"
        what, trusted = "the merged model's tokenizer", trust_remote_code
        raise does_not_load(what, merged, first_line(error), hint, trusted=trusted) from error
    return [Text(tokenizer(sentence).input_ids) for sentence in SENTENCES[:count]]
