"""How many positions one forward pass may have: found by trying the worst micro-batches before the first step.

So a run that begins does not end with an out-of-memory error at step 280.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from traceback import clear_frames

import numpy as np
import torch
from numpy.typing import NDArray

from sampo_cli import ranks
from sampo_cli.checkpoint import all_checkpoints
from sampo_cli.config import TrainConfig
from sampo_cli.errors import OutOfMemory, is_out_of_memory
from sampo_cli.optim import rehearsal_optimizer
from sampo_cli.remote import first_line
from sampo_cli.signals import resume_command
from sampo_cli.state import generator_states, restore_generators

START_TOKENS = {"cuda": 8192, "cpu": 4096}
"""Where the search begins; more makes a step faster only where a card waits for the processor (docs/performance.md)."""

HINT = "lower --max-length, try --set train.offload_activations=true, --quantization nf4 or a smaller --lora-r"


def worst_groups(widths: NDArray[np.int64], tokens: int, most_pairs: int) -> list[list[int]]:
    """The micro-batches that need most memory among all that a budget allows: by index into `widths`.

    One with as many of the longest pairs as fit (its attention and its mask are the largest) and, if that is another,
    the one with most positions.

    Args:
        widths: positions of each pair, int64 [n].
        tokens: the budget; a pair that is longer gets a micro-batch of its own.
        most_pairs: of one micro-batch.
    """
    order = np.argsort(-widths, kind="stable")
    longest_first = widths[order]
    counts = np.minimum(np.maximum(tokens // longest_first, 1), most_pairs)
    counts = np.minimum(counts, len(order) - np.arange(len(order)))
    fullest = int(np.argmax(counts * longest_first))
    return [order[first : first + counts[first]].tolist() for first in dict.fromkeys((0, fullest))]


def largest_that_fits(start: int, longest: int, attempt: Callable[[int], object], *, halve: bool) -> int:
    """The first of start, start / 2, start / 4 ... with which `attempt` does not run out of memory.

    Args:
        longest: positions of the longest pair; below that, halving changes nothing.
        halve: False to try `start` alone.

    Raises:
        OutOfMemory: not even one pair fits, or `start` was to be the only one and does not.
    """
    tokens = start
    while True:
        try:
            attempt(tokens)
            return tokens
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not halve:
                raise OutOfMemory(
                    f"a micro-batch of {tokens} positions does not fit",
                    hint=f"lower train.tokens_per_microbatch; {HINT}",
                ) from error
            if tokens <= longest:
                raise OutOfMemory(f"not even one pair fits; the longest has {longest} positions", hint=HINT) from error
        release()
        tokens //= 2


def find_budget(
    widths: NDArray[np.int64],
    start: int,
    settings: TrainConfig,
    backward: Callable[[list[int]], object],
    parameters: Sequence[torch.Tensor],
    *,
    together: bool = False,
) -> int:
    """Most positions of a micro-batch with which the worst of them fits everywhere, `start` or less.

    Args:
        widths: positions of each pair of the run, int64 [n].
        backward: a forward and a backward pass of the pairs with these indices into `widths`.
        together: no process can try again alone, as all compute each pass together.

    Raises:
        OutOfMemory: it does not fit, with the budget that `settings` give or with one pair at a time.
    """
    most_pairs = min(settings.pairs_per_microbatch or settings.batch_pairs, settings.batch_pairs)

    def attempt(tokens: int) -> None:
        for group in worst_groups(widths, tokens, most_pairs):
            rehearse(partial(backward, group), parameters, settings)

    halve = settings.tokens_per_microbatch is None and not together
    return min(ranks.gather(largest_that_fits(start, int(widths.max()), attempt, halve=halve)))


def budget_note(tokens: int, *, given: bool) -> str:
    """What to say of the budget of a run. `given`: by the recipe."""
    found = "as given" if given else "found by trying the worst micro-batch of the run"
    return f"budget: at most {tokens:,} positions a forward pass, {found}"


def memory_advice(error: BaseException, run: Path, step: int, tokens: int) -> OutOfMemory:
    """What to say where memory ran out after `step` although the trial before the first step fitted."""
    clear_frames(error.__traceback__)  # what the failed pass held is free again
    less = f"--set train.tokens_per_microbatch={max(tokens // 2, 1)}"
    again = f"{resume_command(run)} {less}" if all_checkpoints(run) else f"the same command with {less}"
    return OutOfMemory(
        f"out of memory in step {step + 1}, with {tokens:,} positions a forward pass: {first_line(error)}",
        hint=f"something else may have taken memory; what is saved is as it was. Go on with: {again}; or {HINT}",
    )


def rehearse(backward: Callable[[], object], parameters: Sequence[torch.Tensor], settings: TrainConfig) -> None:
    """A step that leaves no trace: `backward` for its memory, and an optimizer that moves by 0 with gradients of 0."""
    generators = generator_states()
    try:
        backward()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        rehearsal_optimizer(parameters, settings, parameters[0].device).step()
    finally:
        for parameter in parameters:
            parameter.grad = None
        restore_generators(generators)


def release() -> None:
    """Give back what a failed attempt held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
