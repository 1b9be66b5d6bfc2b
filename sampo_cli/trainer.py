"""The loop: steps, evaluations, checkpoints.

One step, read aloud: batch with its positions -> reference log-probs -> policy log-probs -> pair scores -> loss ->
backward -> a metrics row. What the loop does not do: load models, read data, draw positions, know a method.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from sampo_cli import checkpoint, metrics
from sampo_cli.batch import Draw, Pair, PairBatch, collate, micro_batches, step_indices, steps_per_epoch
from sampo_cli.config import Recipe
from sampo_cli.errors import Interrupted, NumericsError
from sampo_cli.lora import adopt_reference, save_adapter
from sampo_cli.losses import LossOutput, PairScores, add_likelihood
from sampo_cli.methods import Method
from sampo_cli.optim import make_optimizer, make_scheduler, memory_bytes
from sampo_cli.policy import Policy, reference, score_against_reference
from sampo_cli.rounds import round_folder, round_parts, total_steps
from sampo_cli.running import RewardMemory
from sampo_cli.scores import Tally, pair_scores
from sampo_cli.signals import StopRequest
from sampo_cli.state import Machinery, load_state, put_back, write_state
from sampo_cli.tracking import track

STEP_0_TOLERANCE = 1e-3
"""Nats per token by which policy and reference may differ before training; LoRA with B = 0 gives exactly 0."""

DORA_TOLERANCE = 5e-2
"""The same for DoRA, which multiplies by a norm over itself: 1 but for rounding in the compute dtype."""

ZERO_GRADIENT_STEPS = 3

LEAST_EVAL_EVERY = 10
"""Where the recipe says nothing: a short run is not to be all evaluation."""


class Pairs(Protocol):
    """Anything that gives pairs by index."""

    def __getitem__(self, index: int) -> Pair: ...


class View(Protocol):
    """Whatever shows the progress."""

    def train_row(self, row: Mapping[str, Any]) -> None: ...
    def eval_row(self, row: Mapping[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Split:
    """The pairs, and which of them train and which are held out (indices into `pairs`).

    `where` names the row that a pair id came from, for messages.
    """

    pairs: Pairs
    train: list[int]
    evaluation: list[int]
    where: Callable[[int], str] = str


@dataclass
class Progress:
    """What a checkpoint restores beside weights and optimizer; `rounds`: the last evaluation of each that is over."""

    step: int = 0
    round: int = 0
    rounds: list[dict[str, Any] | None] = field(default_factory=list)
    rewards: dict[str, Any] | None = None
    best: float | None = None
    best_row: dict[str, Any] | None = None
    last_evaluation: dict[str, Any] | None = None
    zero_gradients: int = 0


class Trainer:
    """Trains one policy on one split into one run folder.

    Args:
        policy: with adapters, on its device.
        split: the pairs.
        recipe: resolved; nothing in it is empty that the loop needs.
        method: of `methods.METHODS`.
        folder: the run's.
        view: told of every row.
        identity: fingerprints of what a resumed run must find unchanged, by name.

    Attributes:
        on_save: called after each checkpoint.
    """

    def __init__(
        self,
        policy: Policy,
        split: Split,
        recipe: Recipe,
        method: Method,
        folder: Path,
        view: View,
        identity: Mapping[str, str] | None = None,
    ) -> None:
        self.split, self.recipe, self.method, self.folder, self.view = split, recipe, method, folder, view
        self.identity = dict(identity or {})
        self.on_save: Callable[[], object] = lambda: None
        settings = recipe.train
        half = policy.dtype == torch.float16
        self.accelerator = Accelerator(
            mixed_precision="fp16" if half else "no",
            log_with=list(recipe.output.report_to) or None,
            project_dir=folder,
            cpu=policy.causal_lm.device.type == "cpu",
        )
        self.raw_policy = policy
        self.parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self.policy = self.accelerator.prepare_model(policy, device_placement=False)
        self.parts = round_parts(split.train, recipe.iterations, settings.seed)
        self.round_ends = list(accumulate(total_steps(settings, len(part)) for part in self.parts))
        self.steps = self.round_ends[-1]
        self.eval_every = settings.eval_every or max(LEAST_EVAL_EVERY, math.ceil(self.steps / 5))
        self.options = {name: getattr(recipe.method, name) for name in method.option_names}
        self.memory = RewardMemory(method.memory)
        self.progress = Progress()
        self._prepare_optimizer()

    def _prepare_optimizer(self) -> None:
        """A new optimizer and schedule: of the round that begins, or of the whole run if it does not restart."""
        settings, ends, number = self.recipe.train, self.round_ends, self.progress.round
        restarts = self.recipe.iterations.schedule == "restart"
        optimizer = make_optimizer(self.parameters, settings, self.accelerator.device)
        self.scheduler = make_scheduler(
            optimizer, settings, ends[number] - self.round_start if restarts else self.steps
        )
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.machinery = Machinery(self.raw_policy, self.optimizer, self.scheduler, self.accelerator.scaler)

    @property
    def round_start(self) -> int:
        """Steps that were taken before the present round."""
        return self.round_ends[self.progress.round - 1] if self.progress.round else 0

    def draw(self, epoch: int) -> Draw:
        method, seed = self.recipe.method, self.recipe.train.seed
        assert method.reduction is not None, "resolve() fills the reduction"
        return Draw(method.reduction, seed, epoch, method.sampling, bool(method.sft_weight), method.draws)

    def batches(self, indices: Iterable[int], epoch: int) -> Iterable[PairBatch]:
        """The micro-batches of some pairs, on the device, longest first."""
        pairs = [self.split.pairs[index] for index in indices]
        layout = self.raw_policy.layout
        for group in micro_batches(pairs, self.recipe.train.tokens_per_microbatch, layout):
            yield collate(group, self.draw(epoch), layout).to(self.accelerator.device)

    def scores(self, batch: PairBatch) -> PairScores:
        reference_logps = kl = None
        if self.method.needs_kl:
            policy_logps, reference_logps, kl = score_against_reference(self.policy, batch)
        else:
            if self.method.needs_reference:
                with reference(self.policy):
                    reference_logps = self.policy(batch)
            policy_logps = self.policy(batch)
        return pair_scores(batch, policy_logps, reference_logps, kl, likelihood=bool(self.recipe.method.sft_weight))

    def loss(self, scores: PairScores) -> LossOutput:
        out = self.method.loss(scores, **self.options, **self.memory.options())
        return add_likelihood(out, scores, self.recipe.method.sft_weight or 0.0)

    def train_step(self, indices: list[int], epoch: int) -> dict[str, Any]:
        """One optimizer step over the pairs at `indices`, however many micro-batches that takes."""
        tally = Tally()
        for batch in self.batches(indices, epoch):
            scores = self.scores(batch)
            out = self.loss(scores)
            self.accelerator.backward(out.losses.sum() / len(indices))
            tally.add(batch, scores, out)
        row = tally.row(self.split.where)
        row["learning_rate"] = self.scheduler.get_last_lr()[0]
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, self.recipe.train.max_grad_norm))
        self._check_gradient(norm, row["loss"])
        row["grad_norm"] = norm if math.isfinite(norm) else None  # float16's scaler skips such a step
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.memory.update(row["chosen_reward"], row["rejected_reward"], row["pairs"])
        return row

    def _check_gradient(self, norm: float, loss: float) -> None:
        if not math.isfinite(norm) and self.accelerator.scaler is None:
            raise NumericsError(f"the gradient's norm is {norm}", hint="lower train.learning_rate")
        vanished = norm == 0 and loss > 0  # a hinge whose margins are all reached has no gradient, and no loss
        self.progress.zero_gradients = self.progress.zero_gradients + 1 if vanished else 0
        if self.progress.zero_gradients >= ZERO_GRADIENT_STEPS:
            raise NumericsError(
                f"the gradient was exactly 0 for {ZERO_GRADIENT_STEPS} steps: nothing is being trained",
                hint="check lora.targets; a beta far too large saturates the loss",
            )

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Metrics over the held-out pairs, whose positions are those of epoch 0 every time."""
        tally = Tally()
        self.policy.eval()
        try:
            for batch in self.batches(self.split.evaluation, epoch=0):
                scores = self.scores(batch)
                tally.add(batch, scores, self.loss(scores))
        finally:
            self.policy.train()
        return {"kind": "eval", "step": self.progress.step, **tally.row(self.split.where)}

    @torch.no_grad()
    def check_reference(self) -> None:
        """Before the first step the policy must be its reference: mean difference over a micro-batch's tokens.

        Raises:
            NumericsError: it is not, so rewards would compare two different models.
        """
        if not self.method.needs_reference:
            return
        batch = next(iter(self.batches(self.split.train[: self.recipe.train.batch_pairs], epoch=0)))
        self.policy.train(self.recipe.lora.dropout == 0)  # as in training, unless dropout must make them differ
        try:
            with reference(self.policy):
                before = self.policy(batch)
            difference = (self.policy(batch) - before).abs().mean().item()
        finally:
            self.policy.train()
        tolerance = DORA_TOLERANCE if self.recipe.lora.dora else STEP_0_TOLERANCE
        if not difference < tolerance:
            raise NumericsError(
                f"before the first step, policy and reference differ by {difference:.3g} nats per token",
                hint="the adapter or its initialisation changes the base; use lora.init=default",
            )

    def fit(self, stop: StopRequest) -> None:
        """Train from wherever `progress` stands to the last step, or until `stop`.

        Raises:
            Interrupted: `stop` was set; the state is saved.
            NumericsError: see `train_step` and `check_reference`.
        """
        settings = self.recipe.train
        while self.progress.step < self.steps:
            if self.progress.step == self.round_ends[self.progress.round]:
                self.next_round()
            part, within = self.parts[self.progress.round], self.progress.step - self.round_start
            if within == 0:
                self.check_reference()
            epoch, chosen = step_indices(len(part), settings.batch_pairs, settings.seed, within)
            started = time.perf_counter()
            row = self.train_step([part[index] for index in chosen], epoch)
            self.progress.step += 1
            self._record_step(row, time.perf_counter() - started)
            last = self.progress.step == self.steps
            ends = self.progress.step in self.round_ends
            if self.split.evaluation and (ends or self.progress.step % self.eval_every == 0):
                self._record_evaluation()
            if last or stop or self.progress.step % settings.save_every == 0:
                self.save()
            if stop and not last:
                raise Interrupted(
                    f"stopped after step {self.progress.step} of {self.steps}; everything so far is saved",
                    hint=f"go on with: sampo train --resume {self.folder}",
                    terminated=stop.terminated,
                )

    def next_round(self) -> None:
        """The policy becomes the frozen reference; optimizer, schedule, best adapter and memory start again."""
        progress, kept = self.progress, round_folder(self.folder, self.progress.round)
        with checkpoint.whole_folder(kept) as aside:
            save_adapter(self.raw_policy, aside)
        adopt_reference(self.raw_policy, kept)
        progress.rounds = [*progress.rounds, progress.last_evaluation]
        progress.round, progress.best, progress.best_row = progress.round + 1, None, None
        shutil.rmtree(self.folder / checkpoint.BEST, ignore_errors=True)
        self.memory.reset()
        if self.recipe.iterations.schedule == "restart":
            self._prepare_optimizer()
        self.view.note(
            f"round {progress.round + 1} of {len(self.parts)}: the reference is now the policy of {kept.name}"
        )

    def _record_step(self, row: dict[str, Any], seconds: float) -> None:
        per_epoch = steps_per_epoch(len(self.parts[self.progress.round]), self.recipe.train.batch_pairs)
        row = {
            "kind": "train",
            "step": self.progress.step,
            "epoch": round(self.progress.step / per_epoch, 4),
            **row,
            "tokens_per_second": row["computed_tokens"] / seconds,
            "memory_bytes": memory_bytes(self.accelerator.device),
            "seconds": seconds,
        }
        metrics.append(self.folder / "metrics.jsonl", row)
        track(self.accelerator, "train", row)
        self.view.train_row(row)

    def _record_evaluation(self) -> None:
        row = self.progress.last_evaluation = self.evaluate()
        metric = self.recipe.output.best_metric
        better = -row[metric] if metric == "loss" else row[metric]
        if self.progress.best is None or better > self.progress.best:
            self.progress.best, self.progress.best_row = better, row
            with checkpoint.whole_folder(self.folder / checkpoint.BEST) as aside:
                save_adapter(self.raw_policy, aside)
        metrics.append(self.folder / "metrics.jsonl", row)
        track(self.accelerator, "eval", row)
        self.view.eval_row(row)

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        with checkpoint.whole_folder(checkpoint.step_folder(self.folder, self.progress.step)) as aside:
            checkpoint.link_folder(self.folder / checkpoint.BEST, aside / checkpoint.BEST)
            self.progress.rewards = self.memory.state_dict()
            write_state(aside, self.machinery, vars(self.progress), self.identity)
        checkpoint.prune(self.folder, self.recipe.train.keep_checkpoints)
        self.on_save()

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint: the next step is the one that would have come.

        What the run did after that step (rows, checkpoints, a better adapter) is dropped, as it will be done again.

        Raises:
            UsageError: the run's data or base are not what they were.
        """
        state = load_state(folder, self.identity)
        self.progress = Progress(**state["progress"])
        if self.progress.round:
            adopt_reference(self.raw_policy, round_folder(self.folder, self.progress.round - 1))
            self._prepare_optimizer()
        if self.progress.rewards:
            self.memory.load_state_dict(self.progress.rewards)
        put_back(state, folder, self.machinery)
        metrics.forget_after(self.folder / "metrics.jsonl", self.progress.step)
        checkpoint.forget_after(self.folder, folder)
