"""Which weights lie in a folder: the files, what is in them, and a fingerprint, without loading them.

No torch, no network. The fingerprint tells a base from every other model, a fine-tuned copy of itself included; it is
no proof against somebody who wants to forge one.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sampo_cli.errors import ModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SAMPLE_BYTES = 4096
ARCHITECTURE = ("model_type", "hidden_size", "vocab_size", "num_hidden_layers")

_HEADER_LIMIT = 100_000_000
_SHARD = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file: its dtype as the file names it, its shape, and its bytes [begin, end)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model or adapter.

    Raises:
        ModelError: the file cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read: {error}", hint="copy or download the folder again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object", hint="copy or download the folder again")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads in `folder`: one, or the shards of the index, sorted by name.

    Files beside them, such as `consolidated.safetensors`, do not count.

    Raises:
        ModelError: there are none, a shard of the index is missing, or the index names something else than a
            safetensors file beside it.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise ModelError(
            f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}",
            hint="give a model folder in transformers' format with safetensors weights",
        )
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / INDEX_FILE}: no 'weight_map'", hint="copy or download the folder again")
    foreign = [name for name in weight_map.values() if not isinstance(name, str) or not _SHARD.fullmatch(name)]
    if foreign:
        raise ModelError(
            f"{folder / INDEX_FILE}: {str(foreign[0])[:100]!r} is no safetensors file beside it",
            hint="do not use this model: its index leads elsewhere, or to pickled weights, which can run code",
        )
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:3])}",
            hint="copy or download the folder again",
        )
    return shards


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file in the order of their bytes; offsets count from the start of the file.

    Raises:
        ModelError: not a safetensors file, or one that was cut short.
    """
    broken = ModelError(f"{path}: not a whole safetensors file", hint="copy or download it again")
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: Any = json.loads(file.read(length)) if length < _HEADER_LIMIT else None
        header.pop("__metadata__", None)
        tensors = [_stored(name, entry, 8 + length) for name, entry in header.items()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
        raise broken from error
    if max((tensor.end for tensor in tensors), default=0) > path.stat().st_size:
        raise broken
    return sorted(tensors, key=lambda tensor: (tensor.begin, tensor.name))


def _stored(name: str, entry: dict[str, Any], start: int) -> StoredTensor:
    """One entry of a header; `start` is where the data begins. Raises ValueError, TypeError or KeyError."""
    (begin, end), shape = entry["data_offsets"], entry["shape"]
    sound = isinstance(entry["dtype"], str) and all(type(number) is int for number in (begin, end, *shape))
    if not sound or not name.isprintable() or not 0 <= begin <= end or min(shape, default=0) < 0:
        raise ValueError(name)
    return StoredTensor(name, entry["dtype"], tuple(shape), start + begin, start + end)


def _samples(file: BinaryIO, tensor: StoredTensor) -> Iterator[bytes]:
    """Begin, middle and end of a tensor's bytes; all of them where it is small."""
    size = tensor.end - tensor.begin
    if size <= 3 * SAMPLE_BYTES:
        file.seek(tensor.begin)
        yield file.read(size)
        return
    for start in (0, (size - SAMPLE_BYTES) // 2, size - SAMPLE_BYTES):
        file.seek(tensor.begin + start)
        yield file.read(SAMPLE_BYTES)


def adapter_digest(folder: Path) -> str:
    """sha256 of an adapter's weights: tells whether a merged model is of this adapter or of an earlier one."""
    with (folder / "adapter_model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def merged_from(folder: Path) -> str | None:
    """`adapter_digest` of the adapter that the model in `folder` was merged from, or None where nothing says so."""
    record = folder / "sampo.json"
    made_of = read_json(record).get("adapter_sha256") if record.is_file() else None
    return made_of if isinstance(made_of, str) else None


def merged_is_current(run: Path) -> bool:
    """False if a run's merged/ records another adapter than the one in adapter/ now."""
    return merged_from(run / "merged") in (None, adapter_digest(run / "adapter"))


def weights_fingerprint(folder: Path) -> str:
    """32 hex digits that say which model lies in `folder`.

    The first 16 bytes of the SHA-256 over the architecture (`ARCHITECTURE` in config.json) and, for every tensor in
    the order of their names: name, dtype, shape and three samples of `SAMPLE_BYTES`. Sampled per tensor and not per
    file, so a fine-tune that changed only some layers is another model; and independent of how the weights are cut
    into shards. Reads 12 KiB a tensor: a few MB for an 8B model.

    Raises:
        ModelError: no config.json, no safetensors, or files that cannot be read.
    """
    config = read_json(folder / "config.json")
    digest = hashlib.sha256(json.dumps([config.get(key) for key in ARCHITECTURE]).encode())
    found: list[tuple[str, bytes]] = []
    for path in weight_files(folder):
        with path.open("rb") as file:
            for tensor in read_header(path):
                own = hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode())
                for sample in _samples(file, tensor):
                    own.update(sample)
                found.append((tensor.name, own.digest()))
    for name, tensor_digest in sorted(found):
        digest.update(name.encode() + b"\0" + tensor_digest)
    return digest.hexdigest()[:32]
