"""The loop: steps, evaluations, checkpoints.

One step, read aloud: batch with its positions -> reference log-probs -> policy log-probs -> pair scores -> loss ->
backward -> a metrics row. What the loop does not do: load models, read data, draw positions, know a method.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from sampo_cli import checkpoint, metrics
from sampo_cli.batch import Draw, Pair, PairBatch, collate, micro_batches, step_indices, steps_per_epoch
from sampo_cli.config import Recipe, TrainConfig
from sampo_cli.errors import Interrupted, NumericsError, UsageError
from sampo_cli.lora import save_adapter
from sampo_cli.losses import Method, PairScores
from sampo_cli.optim import make_optimizer, make_scheduler, memory_bytes
from sampo_cli.policy import Policy, reference
from sampo_cli.remote import first_line
from sampo_cli.scores import Tally, pair_scores
from sampo_cli.signals import StopRequest
from sampo_cli.state import Machinery, read_state, write_state

STEP_0_TOLERANCE = 1e-3
"""Nats per token by which policy and reference may differ before training; LoRA with B = 0 gives exactly 0."""

DORA_TOLERANCE = 5e-2
"""The same for DoRA, which multiplies by a norm over itself: 1 but for rounding in the compute dtype."""

ZERO_GRADIENT_STEPS = 3


def total_steps(settings: TrainConfig, pairs: int) -> int:
    """Optimizer steps of a run on `pairs` training pairs."""
    return settings.max_steps or math.ceil((settings.epochs or 1) * steps_per_epoch(pairs, settings.batch_pairs))


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
    """What a checkpoint restores beside weights and optimizer."""

    step: int = 0
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
        method: of `losses.METHODS`.
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
        self.steps = total_steps(settings, len(split.train))
        self.eval_every = settings.eval_every or max(1, math.ceil(self.steps / 5))
        optimizer = make_optimizer(self.parameters, settings, self.accelerator.device)
        self.scheduler = make_scheduler(optimizer, settings, self.steps)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.machinery = Machinery(policy, self.optimizer, self.scheduler, self.accelerator.scaler)
        self.options = {name: getattr(recipe.method, name) for name in method.option_names}
        self.progress = Progress()

    def draw(self, epoch: int) -> Draw:
        method = self.recipe.method
        assert method.reduction is not None, "resolve() fills the reduction"
        return Draw(method.reduction, self.recipe.train.seed, epoch, method.sampling)

    def batches(self, indices: Iterable[int], epoch: int) -> Iterable[PairBatch]:
        """The micro-batches of some pairs, on the device, longest first."""
        pairs = [self.split.pairs[index] for index in indices]
        layout = self.raw_policy.layout
        for group in micro_batches(pairs, self.recipe.train.tokens_per_microbatch, layout):
            yield collate(group, self.draw(epoch), layout).to(self.accelerator.device)

    def scores(self, batch: PairBatch) -> PairScores:
        reference_logps = None
        if self.method.needs_reference:
            with reference(self.policy):
                reference_logps = self.policy(batch)
        return pair_scores(batch, self.policy(batch), reference_logps)

    def train_step(self, indices: list[int], epoch: int) -> dict[str, Any]:
        """One optimizer step over the pairs at `indices`, however many micro-batches that takes."""
        tally = Tally()
        for batch in self.batches(indices, epoch):
            scores = self.scores(batch)
            out = self.method.loss(scores, **self.options)
            self.accelerator.backward(out.losses.sum() / len(indices))
            tally.add(batch, scores, out)
        row = tally.row(self.split.where)
        row["learning_rate"] = self.scheduler.get_last_lr()[0]
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, self.recipe.train.max_grad_norm))
        self._check_gradient(norm)
        row["grad_norm"] = norm if math.isfinite(norm) else None  # float16's scaler skips such a step
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return row

    def _check_gradient(self, norm: float) -> None:
        if not math.isfinite(norm) and self.accelerator.scaler is None:
            raise NumericsError(f"the gradient's norm is {norm}", hint="lower train.learning_rate")
        self.progress.zero_gradients = self.progress.zero_gradients + 1 if norm == 0 else 0
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
                tally.add(batch, scores, self.method.loss(scores, **self.options))
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
        if self.progress.step == 0:
            self.check_reference()
        settings = self.recipe.train
        while self.progress.step < self.steps:
            pairs = len(self.split.train)
            epoch, chosen = step_indices(pairs, settings.batch_pairs, settings.seed, self.progress.step)
            started = time.perf_counter()
            row = self.train_step([self.split.train[index] for index in chosen], epoch)
            self.progress.step += 1
            self._record_step(row, time.perf_counter() - started)
            last = self.progress.step == self.steps
            if self.split.evaluation and (last or self.progress.step % self.eval_every == 0):
                self._record_evaluation()
            if last or stop or self.progress.step % settings.save_every == 0:
                self.save()
            if stop and not last:
                raise Interrupted(
                    f"stopped after step {self.progress.step} of {self.steps}; everything so far is saved",
                    hint=f"go on with: sampo train --resume {self.folder}",
                    terminated=stop.terminated,
                )

    def _record_step(self, row: dict[str, Any], seconds: float) -> None:
        per_epoch = steps_per_epoch(len(self.split.train), self.recipe.train.batch_pairs)
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
        self._track("train", row)
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
        self._track("eval", row)
        self.view.eval_row(row)

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """Trackers that were asked for, open inside and closed afterwards."""
        if self.recipe.output.report_to:
            settings = {f"{s}.{k}": str(v) for s, part in self.recipe.model_dump().items() for k, v in part.items()}
            try:
                own_folder = {"wandb": {"name": self.folder.name, "dir": str(self.folder)}}
                self.accelerator.init_trackers("sampo", settings, own_folder)
            except Exception as error:  # a tracker's own: no login, no network, a bad folder
                reason = f"--report-to {' '.join(self.recipe.output.report_to)}: {first_line(error)}"
                raise UsageError(reason, hint="log in to the tracker, or train without it") from error
        try:
            yield
        finally:
            self.accelerator.end_training()

    def _track(self, prefix: str, row: Mapping[str, Any]) -> None:
        if self.recipe.output.report_to:
            numbers = {f"{prefix}/{key}": value for key, value in row.items() if key not in ("kind", "step")}
            self.accelerator.log(numbers, step=row["step"])

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        with checkpoint.whole_folder(checkpoint.step_folder(self.folder, self.progress.step)) as aside:
            checkpoint.link_folder(self.folder / checkpoint.BEST, aside / checkpoint.BEST)
            write_state(aside, self.machinery, vars(self.progress), self.identity)
        checkpoint.prune(self.folder, self.recipe.train.keep_checkpoints)
        self.on_save()

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint: the next step is the one that would have come.

        What the run did after that step (rows, checkpoints, a better adapter) is dropped, as it will be done again.

        Raises:
            UsageError: the run's data or base are not what they were.
        """
        self.progress = Progress(**read_state(folder, self.machinery, self.identity))
        metrics.forget_after(self.folder / "metrics.jsonl", self.progress.step)
        checkpoint.forget_after(self.folder, folder)
