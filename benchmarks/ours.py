"""sampo as a contender: the trainer that `sampo train` runs, step by step."""

from __future__ import annotations

from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.contender import Gate, Work, share_adapter
from benchmarks.pairs import Silent
from benchmarks.settings import recipe_of
from sampo_cli import feed, model
from sampo_cli.batch import Pair
from sampo_cli.method_table import METHODS
from sampo_cli.model import load_policy
from sampo_cli.trainer import Split, Trainer


def run(work: Work, connection: Connection) -> None:
    """Load a policy as the variant's recipe says and train it on the work's steps."""
    recipe = recipe_of(work.settings, work.variant)
    train = recipe.train
    if not work.variant.sorting:
        # How a step is cut is no setting of sampo, so the function is replaced, in this process only.
        feed.micro_batches = in_given_order(work.settings.pairs_per_microbatch)
    if not work.variant.joined:  # nor is this
        model.join_adapters = lambda *_, **__: 0
    policy, facts = load_policy(
        recipe.model, recipe.lora, seed=train.seed, checkpointing=train.checkpointing, offload=train.offload_activations
    )
    share_adapter(policy.model, work.adapter)
    split = Split(work.pairs, list(range(len(work.pairs))), [])
    identity = {"the data": "the pairs of a benchmark", "the base": facts.fingerprint}  # its cache is its own
    trainer = Trainer(policy, split, recipe, METHODS[recipe.method.name], work.folder, Silent(), identity)
    gate = Gate(connection, policy.causal_lm.device)
    gate.settle(policy.parameters())
    with gate.preparing("budget"):
        trainer.find_budget()
    with gate.preparing("reference"):
        trainer.prepare_reference()
    found = {"dtype": facts.dtype, "beta": recipe.method.beta, "cached": trainer.feed.reference is not None}
    gate.ready(found | {"layout": facts.layout, "tokens_per_microbatch": trainer.feed.tokens})
    for number, (epoch, indices) in enumerate(work.order):
        gate.open()
        for next_epoch, next_indices in work.order[number + 1 : number + 2]:
            trainer.feed.look_ahead(next_indices, next_epoch)
        row = trainer.train_step(indices, epoch)
        gate.close(row["loss"], row["computed_tokens"])
    gate.end()


def in_given_order(most_pairs: int) -> Any:
    """A function in the place of `batch.micro_batches` that cuts a step's pairs as they come."""

    def cut(pairs: Iterable[Pair], *_: Any, **__: Any) -> list[list[Pair]]:
        listed = list(pairs)
        return [listed[start : start + most_pairs] for start in range(0, len(listed), most_pairs)]

    return cut
