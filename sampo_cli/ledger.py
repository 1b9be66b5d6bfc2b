"""Which tensors are alive, of what kind, and when together they were most: counted by storage, on any device.

It sees what goes through torch's dispatcher, on fake tensors as on real ones. What a kernel allocates for itself is
counted only where `_hidden` knows of it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

UNPACKED = "unpacked weights"
"""Booked by itself: 4-bit weights that bitsandbytes unpacks for a product."""


class Ledger(TorchDispatchMode):
    """Inside, every new storage is booked under the part that is current, and struck off when it is freed.

    Tensors on the meta device are not booked: they stand for what lies elsewhere.

    Args:
        part: what storages are booked under, where nothing else is said.

    Attributes:
        live: bytes by part.
        peak: `live` as it was when its sum was largest since `restart`, kernels' own memory included.
    """

    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part
        self._entries: dict[int, tuple[str, int]] = {}
        self.live: Counter[str] = Counter()
        self.peak: Mapping[str, int] = {}
        self._total = self._most = 0

    @contextmanager
    def booking(self, part: str) -> Iterator[None]:
        """Inside, new storages are booked under `part`."""
        before, self._part = self._part, part
        try:
            yield
        finally:
            self._part = before

    def book(self, tensors: Iterable[Tensor], part: str) -> None:
        """Book storages under `part`, whether they are new or known."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._entries:
                was, size = self._entries[key]
                self._entries[key] = (part, size)
                self.live[was] -= size
                self.live[part] += size
            else:
                self._open(tensor, part)
        self._observe(0)

    def restart(self) -> None:
        """Forget the peak so far."""
        self._most = 0
        self._observe(0)

    def _open(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self._entries[storage._cdata] = (part, size)
        self.live[part] += size
        self._total += size
        weakref.finalize(storage, self._close, storage._cdata)

    def _close(self, key: int) -> None:
        part, size = self._entries.pop(key)
        self.live[part] -= size
        self._total -= size

    def _observe(self, hidden: int) -> None:
        """Compare with the peak so far; `hidden`: unpacked weights that live only while an operator runs."""
        if self._total + hidden > self._most:
            self._most = self._total + hidden
            self.peak = {**self.live, UNPACKED: self.live[UNPACKED] + hidden}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        part = UNPACKED if str(func).startswith("bitsandbytes.dequantize_4bit") else self._part
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
                continue
            if tensor.untyped_storage()._cdata not in self._entries:
                self._open(tensor, part)
        self._observe(_hidden(func, args))
        return out


def _hidden(func: Any, args: Any) -> int:
    """Bytes that an operator needs while it runs, beside what it returns.

    bitsandbytes' 4-bit product unpacks the weight, whose shape is args[2], into its input's dtype.
    """
    if str(func).startswith("bitsandbytes.gemm_4bit"):
        return prod(args[2]) * int(args[0].element_size())
    return 0
