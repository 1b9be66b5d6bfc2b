"""What a model's parameters are and take, whole and in this process."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn


@dataclass
class Sizes:
    """What a model's parameters are: a packed 4-bit weight counts by its elements, not its bytes."""

    total: int = 0
    trainable: int = 0
    bytes: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, model: nn.Module) -> Sizes:
        """Count a whole model, before it is shared out."""
        sizes = cls()
        for parameter in model.parameters():
            state = getattr(parameter, "quant_state", None)
            elements = state.shape.numel() if state is not None else parameter.numel()
            sizes.total += elements
            sizes.trainable += elements if parameter.requires_grad else 0
            sizes.bytes += parameter.numel() * parameter.element_size()
            sizes.dtypes["nf4" if state is not None else str(parameter.dtype).removeprefix("torch.")] += elements
        return sizes


def kept_bytes(model: nn.Module) -> int:
    """Of a model's parameters, those that this process keeps."""
    kept = 0
    for parameter in model.parameters():
        own = getattr(parameter, "_local_tensor", getattr(parameter, "ds_tensor", parameter))  # of FSDP, of ZeRO-3
        stays = getattr(parameter, "ds_persist", False)  # ZeRO-3 keeps small ones whole once they are gathered
        kept += (parameter.ds_numel if stays else own.numel()) * own.element_size()  # type: ignore[attr-defined]
    return kept
