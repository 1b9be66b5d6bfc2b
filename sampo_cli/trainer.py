"""The loop: steps, evaluations, checkpoints.

One step, read aloud: batch with its positions -> reference log-probs -> policy log-probs -> pair scores -> loss ->
backward -> a metrics row. What the loop does not do: load models, read data, draw positions, know a method.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.utils import clip_grad_norm_

from sampo_cli import checkpoint, ranks
from sampo_cli.answers import Answers
from sampo_cli.batch import row_positions
from sampo_cli.budget import START_TOKENS, budget_note, find_budget, memory_advice
from sampo_cli.checks import check_evaluation, check_gradient, check_reference, refuse_or_skip
from sampo_cli.config import Recipe
from sampo_cli.early_stopping import Waiting, take_in
from sampo_cli.early_stopping import reason as stop_reason
from sampo_cli.errors import is_out_of_memory
from sampo_cli.evaluation import Evaluation
from sampo_cli.feed import Feed, Split
from sampo_cli.journal import Journal, View
from sampo_cli.lora import adopt_reference
from sampo_cli.method_table import Method
from sampo_cli.objective import Objective
from sampo_cli.optim import make_optimizer, make_scheduler, memory_bytes
from sampo_cli.passes import Passes
from sampo_cli.policy import Policy
from sampo_cli.reference import reference_of
from sampo_cli.rounds import Schedule, round_folder
from sampo_cli.signals import StopRequest
from sampo_cli.state import (
    Machinery,
    Progress,
    draw_apart,
    load_round,
    load_state,
    put_back,
    save_checkpoint,
    write_best,
    write_round,
)


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
        answers: prompts that are answered now and then, if there are any.

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
        answers: Answers | None = None,
    ) -> None:
        self.split, self.recipe, self.method, self.folder, self.view = split, recipe, method, folder, view
        self.identity, self.answers = dict(identity or {}), answers
        self.on_save: Callable[[], object] = lambda: None
        settings = recipe.train
        half = policy.dtype == torch.float16
        self.accelerator = Accelerator(
            mixed_precision="fp16" if half else "no",
            cpu=policy.causal_lm.device.type == "cpu",
        )
        self.journal = Journal(folder, self.accelerator, view)
        self.raw_policy = policy
        self.parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self.policy = self.accelerator.prepare_model(policy, device_placement=False, evaluation_mode=True)
        self.schedule = Schedule(split.train, recipe)
        self.steps = self.schedule.steps
        self.objective = Objective(self.policy, recipe, method)
        self.progress = Progress()
        device = self.accelerator.device
        tokens = settings.tokens_per_microbatch or START_TOKENS[device.type]
        self.feed = Feed(split.pairs, policy.layout, self.objective.draw, device, tokens, settings.pairs_per_microbatch)
        self.passes = Passes(self.accelerator, policy, self.parameters, self.feed, self.objective)
        self._prepare_optimizer()
        draw_apart(settings.seed, 0)

    def _prepare_optimizer(self) -> None:
        """A new optimizer and schedule: of the round that begins, or of the whole run if it does not restart."""
        number, settings = self.progress.round, self.recipe.train
        own = self.schedule.ends[number] - self.schedule.start(number)
        optimizer = make_optimizer(self.parameters, settings, self.accelerator.device)
        restarts = self.recipe.iterations.schedule == "restart"
        self.scheduler = make_scheduler(optimizer, settings, own if restarts else self.steps)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.machinery = Machinery(self.raw_policy, self.optimizer, self.scheduler, self.accelerator.scaler)

    def train_step(self, indices: list[int], epoch: int) -> dict[str, Any]:
        """One optimizer step over the pairs at `indices`, however many micro-batches that takes.

        Raises:
            NumericsError: a loss or the gradient is not finite and such a step may not be skipped, or see `checks`.
        """
        progress, scaler = self.progress, self.accelerator.scaler
        tally = self.passes.step(indices, epoch)
        row = {**tally.row(), "learning_rate": self.scheduler.get_last_lr()[0]}
        norm = math.nan
        if not row["nonfinite"]:
            self.accelerator.unscale_gradients()
            norm = float(clip_grad_norm_(self.parameters, self.recipe.train.max_grad_norm))
        row["grad_norm"] = norm if math.isfinite(norm) else None  # float16's scaler skips such a step
        if math.isfinite(norm) or (scaler is not None and not row["nonfinite"]):
            progress.zero_gradients = check_gradient(norm, row["loss"], progress.zero_gradients)
            self.optimizer.step()
            self.objective.memory.update(row["chosen_reward"], row["rejected_reward"], row["pairs"])
            progress.skipped_in_a_row = 0
        else:
            where = [self.split.where(pair) for pair in tally.broken() or tally.pair_ids()]
            self.view.note(refuse_or_skip(progress, self.recipe.train, bool(row["nonfinite"]), where, row["pairs"]))
            row["nonfinite"] = row["nonfinite"] or row["pairs"]
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return row

    def evaluate(self, stop: StopRequest | None = None) -> Evaluation:
        """The held-out pairs, whose positions are those of epoch 0 every time.

        Raises:
            Interrupted: `stop` was set meanwhile.
            NumericsError: a loss is not finite, and `train.on_nonfinite` is stop or all are like that.
        """
        assert self.recipe.method.beta is not None, "resolve() fills beta"
        granted = partial(self._agree_to_go_on, stop)
        found = self.passes.evaluation(self.split.evaluation, self.recipe.method.beta, granted)
        if broken := [self.split.where(pair) for pair in found.broken()]:
            check_evaluation(self.progress.step, len(self.split.evaluation), self.recipe.train, broken)
        return found

    def _refuse_to_go_on(self, stop: StopRequest | None) -> None:
        if stop:
            raise stop.after(self.progress.step, self.steps, self.folder)

    def _agree_to_go_on(self, stop: StopRequest | None) -> None:
        if stop is not None:
            stop.agree()
            self._refuse_to_go_on(stop)

    def find_budget(self) -> None:
        """Try the micro-batches that need most memory, and halve `feed.tokens` until they fit.

        Raises:
            OutOfMemory: they do not, with the budget that the recipe gives or with one pair at a time.
        """
        settings, train, progress = self.recipe.train, self.split.train, self.progress
        widths = row_positions(self.split.pairs, self.raw_policy.layout)[train]
        start = settings.tokens_per_microbatch or progress.tokens_per_microbatch or self.feed.tokens

        def backward(group: list[int]) -> None:
            self.passes.backward(self.feed.group([train[index] for index in group]), 1)

        tokens = find_budget(widths, start, settings, backward, self.parameters, together=self.raw_policy.sharded)
        if tokens != progress.tokens_per_microbatch:
            self.view.note(budget_note(tokens, given=settings.tokens_per_microbatch is not None))
        self.feed.tokens = progress.tokens_per_microbatch = tokens

    def prepare_reference(self, stop: object = False) -> None:
        """Where the recipe wants it, take the reference's log-probs of this round from disk; work them out if need be.

        Raises:
            Interrupted: `stop` became true meanwhile.
        """
        setting, number = self.recipe.train.cache_reference, self.progress.round
        wanted = setting == "on" or (setting == "auto" and self.schedule.repeats(number))
        self.feed.reference = None
        if wanted and self.method.caches_reference:
            of = f"{self.recipe.model.name}{f', round {number + 1}' if number else ''}"
            pairs, indices = self.split.pairs, sorted(self.split.train + self.split.evaluation)
            told = self.view.note, stop
            self.feed.reference = reference_of(self.policy, pairs, indices, self.identity, of, self.feed.tokens, *told)

    def begin_round(self, stop: StopRequest) -> None:
        """What a round needs: a budget that fits, the reference's log-probs where they are kept, and that it is one."""
        self.find_budget()
        self.prepare_reference(stop)
        number, lora = self.progress.round, self.recipe.lora
        if self.method.needs_reference and self.progress.step == self.schedule.start(number):
            batch = next(self.feed.batches(*self.schedule.pairs(self.progress.step, number))) or self.feed.filler()
            check_reference(self.policy, batch, dropout=lora.dropout > 0, rounded=lora.dora)

    def fit(self, stop: StopRequest) -> None:
        """Train from wherever `progress` stands to the last step, or until `stop`.

        Raises:
            Interrupted: `stop` was set; the state is saved.
            NumericsError: see `train_step` and `check_reference`.
            OutOfMemory: the device has no room; the newest checkpoint is as it was.
            SampoError: the disk is full; so are the earlier checkpoints.
        """
        progress, begun = self.progress, -1
        progress.generation_due |= self.answers is not None and progress.step == 0
        try:
            while progress.due or (progress.step < self.steps and not self.stopped_early()):
                if progress.step == self.schedule.ends[progress.round] and not progress.due:
                    self.next_round()
                if begun != progress.round:
                    self.begin_round(stop)
                    begun = progress.round
                if progress.evaluation_due:
                    self._evaluate_and_save(stop)
                elif progress.generation_due:
                    self._answer_and_save(stop)
                else:
                    self._advance(stop)
        except (RuntimeError, MemoryError, OSError) as error:
            if is_out_of_memory(error):
                raise memory_advice(error, self.folder, progress.step, self.feed.tokens) from error
            raise

    def _advance(self, stop: StopRequest) -> None:
        """One step and its row; a checkpoint where it is time for one, and before an evaluation, which may fail."""
        progress, schedule = self.progress, self.schedule
        indices, epoch = schedule.pairs(progress.step, progress.round)
        if progress.step + 1 < schedule.ends[progress.round]:
            self.feed.look_ahead(*schedule.pairs(progress.step + 1, progress.round))
        started = time.perf_counter()
        row = self.train_step(indices, epoch)
        progress.step += 1
        self._record_step(row, time.perf_counter() - started)
        ends = progress.step in schedule.ends
        progress.evaluation_due = bool(self.split.evaluation) and schedule.evaluates(progress.step)
        progress.generation_due = self.answers is not None and schedule.answers(progress.step)
        stop.agree()
        if progress.due or ends or stop or progress.step % self.recipe.train.save_every == 0:
            self.save()
        if progress.step < self.steps or progress.due:
            self._refuse_to_go_on(stop)

    def next_round(self) -> None:
        """The policy becomes the frozen reference; optimizer, schedule, best adapter and memory start again."""
        progress, kept = self.progress, round_folder(self.folder, self.progress.round)
        write_round(kept, self.machinery)
        adopt_reference(self.raw_policy, kept)
        progress.rounds = [*progress.rounds, progress.last_evaluation]
        progress.round, progress.stopping, progress.best, progress.best_row = progress.round + 1, Waiting(), None, None
        if ranks.is_first():
            shutil.rmtree(self.folder / checkpoint.BEST, ignore_errors=True)
        self.objective.memory.reset()
        if self.recipe.iterations.schedule == "restart":
            self._prepare_optimizer()
        which = f"round {progress.round + 1} of {len(self.schedule.parts)}"
        self.view.note(f"{which}: the reference is now the policy of {kept.name}")

    def _record_step(self, row: dict[str, Any], seconds: float) -> None:
        step, per_epoch = self.progress.step, self.schedule.steps_per_epoch(self.progress.round)
        row = {
            **{"kind": "train", "step": step, "epoch": round(step / per_epoch, 4)},
            **row,
            "tokens_per_second": row["computed_tokens"] / seconds,
            "memory_bytes": max(ranks.gather(memory_bytes(self.accelerator.device))),
            "seconds": seconds,
        }
        self.journal.write(row)

    def _evaluate_and_save(self, stop: StopRequest) -> None:
        """The evaluation that is due, the best adapter if this is it, and a checkpoint that knows of both."""
        evaluation = self.evaluate(stop)
        metric, progress = self.recipe.output.best_metric, self.progress
        row = {"kind": "eval", "step": progress.step, **evaluation.row()}
        better = -row[metric] if metric == "loss" else row[metric]
        if progress.best is None or better > progress.best:
            progress.best, progress.best_row = better, row
            write_best(self.folder, self.machinery)
        progress.last_evaluation, progress.evaluation_due = row, False
        self.journal.write_pairs(progress.step, evaluation.pairs())
        self._write_and_save(row)

    def _answer_and_save(self, stop: StopRequest) -> None:
        """The answers that are due, and a checkpoint that knows of them; none before the first step."""
        assert self.answers is not None, "answers are due only where there are prompts"
        progress = self.progress
        answers, granted = self.answers, lambda: self._refuse_to_go_on(stop)
        row = ranks.from_first(lambda: answers.row(self.raw_policy, progress.step, granted))
        progress.generated, progress.generation_due = row, False
        if progress.best_row and progress.best_row["step"] == progress.step:
            progress.best_generated = row
        self._write_and_save(row)

    def _write_and_save(self, row: dict[str, Any]) -> None:
        self.journal.write(row)
        if self.progress.step:
            take_in(self.recipe.train.early_stopping, self.progress.stopping, row)
            self.save()

    def stopped_early(self) -> str | None:
        """Why the run is over before its last step, if it is."""
        before = self.progress.step < self.steps
        return stop_reason(self.recipe.train.early_stopping, self.progress.stopping) if before else None

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        self.journal.put_on_disk()
        self.progress.rewards = self.objective.memory.state_dict()
        facts = {"identity": self.identity, "recipe": self.recipe.model_dump(mode="json")}
        save_checkpoint(self.folder, self.machinery, self.progress, facts, self.recipe.train.keep_checkpoints)
        self.on_save()

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint: the next step is the one that would have come.

        What the run did after that step (rows, checkpoints, a better adapter) is dropped, as it will be done again.

        Raises:
            UsageError: the run's data or base are not what they were, or the checkpoint cannot be read.
        """
        state = load_state(folder, self.identity)
        self.progress = Progress.from_plain(state["progress"])
        self.schedule.refuse_elsewhere(self.progress.step, self.progress.round)
        if self.progress.round:
            load_round(round_folder(self.folder, self.progress.round - 1), self.machinery)
            self._prepare_optimizer()
        if self.progress.rewards:
            self.objective.memory.load_state_dict(self.progress.rewards)
        put_back(state, folder, self.machinery)
        draw_apart(self.recipe.train.seed, self.progress.step)
        ranks.wait()
        if ranks.is_first():
            checkpoint.forget_after(self.folder, folder)
        done = {"evaluated": not self.progress.evaluation_due, "answered": not self.progress.generation_due}
        self.journal.go_back(self.progress.step, **done)
