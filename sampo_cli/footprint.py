"""How much memory a training step needs, by part, before any weight is loaded.

The step is run on the policy's skeleton, whose tensors are fake, by the code that trains: what is counted is what its
modules and operators really keep and allocate. Two depths of the model are run and the rest is a straight line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from sampo_cli.activations import set_checkpointing
from sampo_cli.batch import Draw, Layout, Pair, PairBatch, collate
from sampo_cli.config import Recipe
from sampo_cli.errors import ModelError
from sampo_cli.ledger import UNPACKED, Ledger
from sampo_cli.lora_linear import join_adapters
from sampo_cli.method_table import METHODS
from sampo_cli.optim import SMALLEST_8BIT, optimizer_name
from sampo_cli.pair_attention import LEAST_POSITIONS, Bounds, row_bounds
from sampo_cli.pair_attention import NAME as IN_PIECES
from sampo_cli.policy import Policy, is_state_space, reference, score_against_reference
from sampo_cli.remote import first_line
from sampo_cli.skeleton import build_base, cut_to, layer_list, put_fakes, storages, with_adapter
from sampo_cli.standins import AwayOnCuda, on_cuda, without_casts
from sampo_cli.target import ON_CUDA, Device

WEIGHTS, ADAPTER, GRADIENTS, OPTIMIZER = "weights", "adapter", "gradients", "optimizer"
ACTIVATIONS, LOGITS, MASKS = "activations", "logits", "attention masks"
PARTS = (WEIGHTS, ADAPTER, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS, MASKS, UNPACKED)


class _Booked(Policy):
    """A policy that says in the ledger what its tensors are for.

    Attributes:
        bounds: of the rows of the batch that it is given, which cannot be read off fake tensors.
    """

    ledger: Ledger
    bounds: Bounds

    def inputs(self, batch: PairBatch) -> dict[str, Any]:
        pieces_from, self.pieces_from = self.pieces_from, None
        try:
            with self.ledger.booking(MASKS):
                inputs = super().inputs(batch)
        finally:
            self.pieces_from = pieces_from
        if pieces_from is not None and batch.input_ids.shape[1] >= pieces_from:
            inputs["pair_bounds"] = self.bounds
        return inputs

    def hidden(self, batch: PairBatch) -> Tensor:
        with self.ledger.booking(ACTIVATIONS):
            return super().hidden(batch)

    def forward(self, *args: Any) -> Any:
        with self.ledger.booking(LOGITS):
            return super().forward(*args)


@dataclass(frozen=True)
class Footprint:
    """Most bytes alive at once in a training step, by part (keys of `PARTS`)."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Rehearsal:
    """A recipe's policy as a skeleton, on which steps can be run for their memory.

    Args:
        recipe: resolved.
        architecture: the model's config, from `load_config`.
        device: that it is meant for; it need not be here.

    Attributes:
        layout: that the policy will have, as far as can be told without weights.
        trainable_parameters, total_parameters: elements; a packed 4-bit weight counts by its elements.
        parameter_bytes: of all parameters, as `ModelFacts` counts them.

    Raises:
        ModelError: the architecture cannot be built, or its adapters cannot.
    """

    def __init__(self, recipe: Recipe, architecture: Any, device: Device) -> None:
        self.recipe, self.device = recipe, device
        cuda, dtype = device.kind == ON_CUDA, device.compute_dtype(recipe.model.dtype)
        self._offloads = recipe.train.offload_activations and cuda
        base = build_base(recipe.model, architecture, dtype, device.kind)
        with torch.device("meta"):
            model = with_adapter(base, recipe.model, recipe.lora)
        set_checkpointing(base, recipe.train.checkpointing)
        join_adapters(model, recipe.train.checkpointing)
        if cuda:
            without_casts(model)
        self.layout: Layout = "separate" if is_state_space(type(base)) else "shared"
        if recipe.model.layout != "auto":
            self.layout = recipe.model.layout
        self._mode = FakeTensorMode()
        put_fakes(model, self._mode)
        self.policy = _Booked(model, self.layout, dtype)
        if self.layout == "shared" and base.config.get_text_config()._attn_implementation == IN_PIECES:
            self.policy.pieces_from = LEAST_POSITIONS
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        sizes = [getattr(p, "quant_state", None) for p in model.parameters()]
        elements = [s.shape.numel() if s else p.numel() for s, p in zip(sizes, model.parameters(), strict=True)]
        self.total_parameters = sum(elements)
        self.trainable_parameters = sum(p.numel() for p in self._trainable)
        self.parameter_bytes = sum(p.numel() * p.element_size() for p in model.parameters())

    def footprint(self, pairs: Sequence[Pair], *, others: bool) -> Footprint:
        """The peak of a step, with the optimizer's state from earlier steps.

        Args:
            pairs: of the micro-batch that needs most.
            others: the step has more micro-batches, so gradients are there already.

        Raises:
            ModelError: the architecture cannot be run without its weights.
        """
        name = type(self.policy.causal_lm).__name__
        if is_state_space(type(self.policy.causal_lm)):
            raise ModelError(f"the memory of {name} cannot be predicted: what its own kernels need is not known")
        try:
            phases = self._at_full_depth(pairs, others=others)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(f"the memory of {name} cannot be predicted: {first_line(error)}") from error
        constant = self._constant()
        peak = max(phases, key=lambda parts: sum(parts.values()))
        return Footprint({part: peak.get(part, 0) + constant.get(part, 0) for part in PARTS})

    def _at_full_depth(self, pairs: Sequence[Pair], *, others: bool) -> list[dict[str, int]]:
        """`_phases` of the whole model, from two depths of it: with the layers of one period, and of two."""
        place, layers = layer_list(self.policy.causal_lm), self.policy.causal_lm.config.get_text_config()
        whole, period = layers.num_hidden_layers, _period(getattr(layers, "layer_types", None))
        if place is None or whole <= 2 * period:
            return self._phases(pairs, others=others)
        runs = []
        for depth in (period, 2 * period):
            with cut_to(place, depth):
                runs.append(self._phases(pairs, others=others))
        return [_extended(one, two, whole / period) for one, two in zip(*runs, strict=True)]

    def _constant(self) -> dict[str, int]:
        """What is there in every phase: weights, adapters and what the optimizer remembers."""
        stored: dict[str, int] = dict.fromkeys((WEIGHTS, ADAPTER), 0)
        for owner, tensor in storages(self.policy.model):
            stored[ADAPTER if owner.requires_grad else WEIGHTS] += tensor.numel() * tensor.element_size()
        if self.recipe.model.adapter or self.recipe.iterations.count > 1:
            stored[ADAPTER] *= 2  # the reference is a frozen copy
        name = optimizer_name(self.recipe.train, torch.device(self.device.kind))
        stored[OPTIMIZER] = optimizer_bytes([p.numel() for p in self._trainable], name)
        return stored

    def _phases(self, pairs: Sequence[Pair], *, others: bool) -> list[dict[str, int]]:
        """Peak by part, without what is constant, of each forward and backward pass over a micro-batch."""
        method, policy = METHODS[self.recipe.method.name], self.policy
        ledger = policy.ledger = Ledger(ACTIVATIONS)
        peaks: list[dict[str, int]] = []

        def phase(run: Callable[[], Any]) -> Any:
            ledger.restart()
            result = run()
            peaks.append({part: size for part, size in ledger.peak.items() if part not in (WEIGHTS, ADAPTER)})
            return result

        def of_reference() -> Tensor:
            with reference(policy):
                return policy(batch)

        def of_policy() -> Any:
            with AwayOnCuda(policy.model) if self._offloads else nullcontext():
                return score_against_reference(policy, batch) if method.needs_kl else policy(batch)

        batch = self._fake_batch(pairs)
        cuda = on_cuda(self.device.memory) if self.device.kind == ON_CUDA else nullcontext()
        with cuda, self._mode, self._gradients(ledger, others), ledger:
            before = phase(of_reference) if method.needs_reference and not method.needs_kl else None
            outputs = phase(of_policy)
            loss = sum(output.sum() for output in (outputs if method.needs_kl else [outputs]))
            phase(loss.backward)
            del before  # the loss needs it until here
        return peaks

    @contextmanager
    def _gradients(self, ledger: Ledger, there: bool) -> Iterator[None]:
        """Books weights, and gradients as they come; afterwards there are no gradients. `there`: before already."""
        ledger.book((tensor for _, tensor in storages(self.policy.model)), WEIGHTS)
        hooks = []
        for parameter in self._trainable:
            parameter.grad = torch.empty_like(parameter) if there else None
            hooks.append(parameter.register_post_accumulate_grad_hook(lambda p: ledger.book([p.grad], GRADIENTS)))
        ledger.book((p.grad for p in self._trainable if p.grad is not None), GRADIENTS)
        try:
            yield
        finally:
            for hook, parameter in zip(hooks, self._trainable, strict=True):
                hook.remove()
                parameter.grad = None

    def _fake_batch(self, group: Sequence[Pair]) -> PairBatch:
        method = self.recipe.method
        assert method.reduction is not None, "resolve() fills the reduction"
        draw = Draw(method.reduction, 0, 0, method.sampling, bool(method.sft_weight), method.draws)
        batch = collate(group, draw, self.layout)
        self.policy.bounds = row_bounds(batch.segments)
        tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
        with self._mode:
            return replace(batch, **{name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors.items()})


def _period(kinds: Sequence[str] | None) -> int:
    """After how many layers their kinds (full attention, sliding window) come again in the same order."""
    kinds = kinds or [""]
    return next(n for n in range(1, len(kinds) + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))


def _extended(one: Mapping[str, int], two: Mapping[str, int], periods: float) -> dict[str, int]:
    """The straight line through a model of one period of layers and one of two, at so many."""
    added = {part: two.get(part, 0) - one.get(part, 0) for part in one.keys() | two.keys()}
    return {part: one.get(part, 0) + round((periods - 1) * more) for part, more in added.items()}


OPTIMIZER_BLOCK = 256
"""Elements of an 8-bit state that share a scale, in bitsandbytes."""


def optimizer_bytes(sizes: Sequence[int], name: str) -> int:
    """What AdamW remembers of tensors of these sizes: two moments, in 32 bits or in 8 with a scale a block."""
    if name == "adamw":
        return sum(8 * size for size in sizes)
    return sum(8 * n if n < SMALLEST_8BIT else 2 * n + 8 * -(-n // OPTIMIZER_BLOCK) for n in sizes)
