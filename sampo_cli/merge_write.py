"""The files of a merged model: weights one tensor at a time, config, tokenizer and what else belongs to it.

Memory holds one tensor, not a file and not the model. Beside the weights only files that lie in the folders of base
and adapter are copied, none that a link in them leads to.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sampo_cli.errors import NumericsError
from sampo_cli.fingerprint import INDEX_FILE, StoredTensor, adapter_digest, read_json
from sampo_cli.merge_plan import FLOATS, Plan
from sampo_cli.trust import check_inside, files_like

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model*"),
    *("spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "*.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
BASE_FILES = (
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("*.py", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_VOCABULARIES = ("tokenizer.model*", "spiece.model", "sentencepiece.bpe.model")
_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
_STORED_AS = {name: stored for stored, name in FLOATS.items()}


def written_as(tensor: StoredTensor, plan: Plan, dtype: str) -> str:
    """The dtype in which a tensor is written: integers stay, and what the architecture keeps in float32 does too."""
    if tensor.dtype not in FLOATS:
        return tensor.dtype
    return "F32" if tensor.name in plan.float32 else _STORED_AS[dtype]


def written_size(tensor: StoredTensor, plan: Plan, dtype: str) -> int:
    """Bytes that a tensor takes when written."""
    stored = written_as(tensor, plan, dtype)
    return tensor.end - tensor.begin if stored == tensor.dtype else tensor.elements * _BYTES[stored]


def total_size(files: Iterable[list[StoredTensor]], plan: Plan, dtype: str) -> int:
    """Bytes that all tensors take when written."""
    return sum(written_size(tensor, plan, dtype) for tensors in files for tensor in tensors)


def write_shard(source: Path, target: Path, tensors: list[StoredTensor], plan: Plan, dtype: str) -> None:
    """Copy a safetensors file, its updates added in float32 and its floats cast to `dtype`.

    The header is known beforehand, so tensors are read, changed and appended one by one; the library's own writer
    wants them all at once. Larger elements come first, as there, so that every tensor is aligned.

    Raises:
        NumericsError: an updated weight is not finite in `dtype`.
    """
    ordered = sorted(tensors, key=lambda t: (-written_size(t, plan, dtype) // max(1, t.elements), t.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        end = position + written_size(tensor, plan, dtype)
        header[tensor.name] = {
            "dtype": written_as(tensor, plan, dtype),
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with target.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in ordered:
            value = _merged(source, tensor, plan, written_as(tensor, plan, dtype))
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _merged(source: Path, tensor: StoredTensor, plan: Plan, stored: str) -> Tensor:
    """A tensor as it is written. The file is opened for it alone: a longer mapping would count as memory in use."""
    from safetensors import safe_open

    with safe_open(source, framework="pt") as file:
        value: Tensor = file.get_tensor(tensor.name)
    updates = plan.updates.get(tensor.name, [])
    for update in updates:
        value = update.apply(tensor.name, value)
    if stored != tensor.dtype or updates:
        value = value.to(getattr(torch, FLOATS[stored]))
    if updates and not torch.isfinite(value).all():
        raise NumericsError(
            f"'{tensor.name}' is not finite after merging {updates[-1].adapter}",
            hint="the adapter is broken, or its numbers need --dtype bfloat16 or float32",
        )
    return value


def write_config(base: Path, folder: Path, size: int, dtype: str) -> None:
    """config.json without quantization and with the written dtype; the index, if the base has one."""
    config = read_json(base / "config.json")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        part.pop("quantization_config", None)
        part.update({key: dtype for key in ("dtype", "torch_dtype") if key in part})
    config["dtype"] = dtype
    _write_json(folder / "config.json", config)
    if len(list(folder.glob("*.safetensors"))) > 1 or not (folder / "model.safetensors").is_file():
        index = read_json(base / INDEX_FILE)
        metadata = index.get("metadata")
        index["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": size}
        _write_json(folder / INDEX_FILE, index)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def files_to_copy(base: Path, adapter: Path) -> dict[Path, Path]:
    """Beside the weights: relative path in the merged model -> file.

    Tokenizer and template from the adapter's folder if it has a tokenizer, else from the base; the rest from the base.
    A sentencepiece vocabulary comes from the base if the adapter has none: transformers does not save it again, and
    converters of other runtimes read it.

    Raises:
        UsageError: one is a link that leads out of its folder.
    """
    own = any((adapter / name).is_file() for name in _TOKENIZERS)
    of_base = BASE_FILES + (_VOCABULARIES if own else TOKENIZER_FILES)
    of_adapter = TOKENIZER_FILES if own else ("chat_template.jinja",)
    found = {}
    for source, patterns in ((base, of_base), (adapter, of_adapter)):
        for path in (path for pattern in patterns for path in files_like(pattern, source)):
            check_inside(path, source)
            found[path.relative_to(source)] = path
    return found


def copy_files(files: Mapping[Path, Path], adapter: Path, folder: Path) -> None:
    """Copy `files_to_copy` as they are, and write down which adapter was merged."""
    for name, path in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
    record = read_json(adapter / "sampo.json") if (adapter / "sampo.json").is_file() else {}
    _write_json(folder / "sampo.json", {**record, "adapter_sha256": adapter_digest(adapter)})
