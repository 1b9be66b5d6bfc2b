"""The reference's log-probs on disk, per token: one pass over the pairs, then no reference forward any more.

Per token, not summed: one cache serves every method, reduction, beta, learning rate, epoch and seed. Its key is a
hash of everything that the numbers depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import nn

from sampo_cli import ranks
from sampo_cli.batch import Draw, Logps, Pair, Pairs, collate, micro_batches, shares
from sampo_cli.budget import largest_that_fits
from sampo_cli.cache import UNFINISHED, cache_folder, is_complete, lock
from sampo_cli.disk import check_room, flush, folder_bytes, writing
from sampo_cli.errors import ExitCode, Interrupted
from sampo_cli.kernels import replaced_parts
from sampo_cli.policy import REFERENCE_ADAPTER, Policy, reference

FORMAT = 1
BLOCK = 256
"""Pairs scored between two writes: what an interruption loses at most."""

LARGER = 4
"""How many times the positions of a training pass fit into one without gradients, to begin with."""

ROOM_HINT = "sampo cache clear, set SAMPO_CACHE to another disk, or use --cache-reference off"

LOGPS, INDEX, META = "logps.bin", "index.npy", "meta.json"


class ReferenceCache:
    """Log-probs by pair, memory-mapped. Called with a pair: float32 [T_w + T_l], chosen then rejected."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._logps = np.memmap(folder / LOGPS, np.float32, "r")
        self._ids, self._starts = np.load(folder / INDEX)

    def __call__(self, pair: Pair) -> Logps:
        row = int(np.searchsorted(self._ids, pair.pair_id))
        if row == len(self._ids) or self._ids[row] != pair.pair_id:
            raise KeyError(f"pair {pair.pair_id} is not in {self.folder}")
        start = int(self._starts[row])
        return self._logps[start : start + len(pair.chosen) + len(pair.rejected)]


def key_parts(policy: Policy, identity: Mapping[str, str]) -> dict[str, Any]:
    """Everything that changes the reference's log-probs.

    Args:
        identity: fingerprints of "the data" (pairs, tokenizer, template, truncation) and "the base" (its weights).
    """
    config = policy.causal_lm.config
    quantization = getattr(config, "quantization_config", None)
    device = policy.causal_lm.device
    return {
        "format": FORMAT,
        "data": identity["the data"],
        "base": identity["the base"],
        "adapter": adapter_digest(policy),
        "quantization": str(quantization.to_dict()) if quantization else "none",
        "dtype": str(policy.dtype),
        "layout": policy.layout,
        "attention": config._attn_implementation,
        "kernels": replaced_parts(policy.causal_lm),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "peft")},
    }


def adapter_digest(policy: Policy) -> str:
    """sha256 of the frozen reference adapter's weights as they are in memory, or "none" where adapter-off is it."""
    weights = {name: p for name, p in policy.named_parameters() if f".{REFERENCE_ADAPTER}." in name}
    if not weights:
        return "none"
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def score_pairs(policy: nn.Module, pairs: Sequence[Pair], tokens: int) -> list[Logps]:
    """The reference's log-probs of every response token of `pairs`, float32 [T_w + T_l] each, in their order.

    Each process scores its share, and all get the whole.

    Args:
        tokens: positions of one forward pass; halved where they do not fit.
    """
    raw: Any = getattr(policy, "module", policy)
    parts = shares(pairs, ranks.count(), raw.layout)
    found: dict[int, Logps] = {}

    def attempt(tokens: int) -> None:
        plans = [micro_batches(part, tokens, raw.layout) for part in parts]
        groups = plans[ranks.rank()]
        if raw.sharded:  # all run each layer together, as often as who has most to do
            groups = groups + [[pairs[0]]] * (max(map(len, plans)) - len(groups))
        for group in groups:
            batch = collate(group, Draw("sum", 0, 0), raw.layout).to(raw.causal_lm.device)
            with reference(policy):
                logps = policy(batch).cpu().numpy()
            ends = np.cumsum([len(pair.chosen) + len(pair.rejected) for pair in group])
            found.update((pair.pair_id, part) for pair, part in zip(group, np.split(logps, ends[:-1]), strict=True))

    longest = max(max(pair.row_lengths(raw.layout)) for pair in pairs)
    largest_that_fits(tokens, longest, attempt, halve=not raw.sharded)
    everything = {pair_id: logps for part in ranks.gather(found) for pair_id, logps in part.items()}
    return [everything[pair.pair_id] for pair in pairs]


def reference_of(
    policy: nn.Module,
    pairs: Pairs,
    indices: Sequence[int],
    identity: Mapping[str, str],
    of: str,
    tokens: int,
    note: Callable[[str], object],
    stop: object = False,
) -> ReferenceCache:
    """The log-probs that `policy`'s reference gives `pairs`; see `key_parts` and `find_or_build` for the arguments.

    Args:
        tokens: positions of a forward pass in training.

    Raises:
        Interrupted: `stop` became true meanwhile.
    """
    raw: Any = getattr(policy, "module", policy)
    parts = key_parts(raw, identity)
    return find_or_build(
        parts, of, pairs, indices, lambda block: score_pairs(policy, block, LARGER * tokens), note, stop
    )


def find_or_build(
    parts: Mapping[str, Any],
    of: str,
    pairs: Pairs,
    indices: Sequence[int],
    score: Callable[[Sequence[Pair]], Sequence[Logps]],
    note: Callable[[str], object],
    stop: object = False,
) -> ReferenceCache:
    """The cache of that key: found, finished where an earlier pass stopped, or built.

    All processes of a run build it together; on each machine the first one keeps it.

    Args:
        parts: what the key is made of (`key_parts`).
        of: what `sampo cache list` shows.
        indices: of the pairs, ascending by pair id.
        score: gives the log-probs of some pairs.
        stop: true once the pass is to end; what it worked out is kept.

    Raises:
        Interrupted: `stop` became true.
        SampoError: the disk is full.
    """
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_folder() / "reference" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    if all(ranks.gather(is_complete(folder))):
        note(f"reference: log-probs of {len(indices):,} pairs from {folder}")
        return ReferenceCache(folder)
    with _locked(folder, note, stop) if ranks.is_first_on_machine() else nullcontext():
        ranks.wait()
        if not all(ranks.gather(is_complete(folder))):
            _build(folder, {"of": of, "parts": dict(parts)}, pairs, indices, score, note, stop)
        ranks.wait()
    return ReferenceCache(folder)


def _locked(folder: Path, note: Callable[[str], object], stop: object) -> FileLock:
    """The lock of a key, held; it dies with its process."""
    held = lock("reference", folder.name)
    waiting = False
    while True:
        try:
            held.acquire(timeout=1)
        except Timeout:
            if not waiting:
                note("reference: another run is working out the same log-probs; waiting for it")
            waiting = True
            if stop:
                raise _interrupted(stop) from None
        else:
            return held


def _interrupted(stop: object) -> Interrupted:
    return Interrupted(
        "stopped while the reference's log-probs were worked out; what there is of them is kept",
        hint="the same command goes on from there, or --resume if the run has a checkpoint",
        exit_code=getattr(stop, "exit_code", ExitCode.INTERRUPTED),
    )


def _build(
    folder: Path,
    meta: Mapping[str, Any],
    pairs: Pairs,
    indices: Sequence[int],
    score: Callable[[Sequence[Pair]], Sequence[Logps]],
    note: Callable[[str], object],
    stop: object,
) -> None:
    """Append block after block to a file aside; on from the last whole block that is there."""
    aside = folder.with_name(f"{UNFINISHED}{folder.name}")
    lengths = (pairs.chosen_tokens + pairs.rejected_tokens)[indices].astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.array([pairs.pair_ids[index] for index in indices], np.int64)
    needed = 4 * int(starts[-1]) + 2 * ids.nbytes
    if not ranks.is_first_on_machine():
        _append(None, pairs, indices, starts, score, note, stop)
        return
    shutil.rmtree(folder, ignore_errors=True)  # damaged, or not there on every machine
    with writing(aside, needed, ROOM_HINT):
        aside.mkdir(exist_ok=True)
        check_room(aside, needed - folder_bytes(aside), "the reference's log-probs", ROOM_HINT)
        with (aside / LOGPS).open("ab") as file:
            _append(file, pairs, indices, starts, score, note, stop)
        np.save(aside / INDEX, np.stack([ids, starts[:-1]]))
        sizes = {name: (aside / name).stat().st_size for name in (LOGPS, INDEX)}
        (aside / META).write_text(json.dumps({**meta, "sizes": sizes}, indent=2) + "\n", encoding="utf-8")
        for path in (aside / INDEX, aside / META, aside):
            flush(path)
        aside.rename(folder)


def _append(
    file: BinaryIO | None,
    pairs: Pairs,
    indices: Sequence[int],
    starts: NDArray[np.int64],
    score: Callable[[Sequence[Pair]], Sequence[Logps]],
    note: Callable[[str], object],
    stop: object,
) -> None:
    """The blocks that are not in every machine's file yet; a process that keeps no file scores its share of them.

    Args:
        starts: where each pair's log-probs begin, and the end of the last.
    """
    firsts = range(0, len(indices) + BLOCK, BLOCK)
    done = min(ranks.gather(max(n for n in firsts if not file or 4 * _at(starts, n) <= file.tell())))
    if file:
        file.truncate(4 * _at(starts, done))
    if done:
        note(f"reference: {min(done, len(indices)):,} of {len(indices):,} pairs were done before")
    for first in range(done, len(indices), BLOCK):
        if any(ranks.gather(bool(stop))):
            raise _interrupted(stop)
        found = score([pairs[index] for index in indices[first : first + BLOCK]])
        if file:
            file.write(np.concatenate(found).astype(np.float32).tobytes())
            file.flush()
            os.fsync(file.fileno())
        note(f"reference: {min(first + BLOCK, len(indices)):,} of {len(indices):,} pairs")


def _at(starts: np.ndarray, first: int) -> int:
    return int(starts[min(first, len(starts) - 1)])
