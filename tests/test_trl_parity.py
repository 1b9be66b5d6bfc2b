"""trl as the judge: the same pairs, the same adapter, the same loss and gradient."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from sampo_cli.losses import PairScores
from sampo_cli.method_table import METHODS
from tests import tiny
from tests.test_trainer import make_pairs, make_recipe, make_trainer


def make_trl(policy: Any, folder: Path, beta: float, loss_type: str) -> DPOTrainer:
    """trl's trainer on our model object. A fresh adapter (B = 0) makes its reference, a copy, the base."""
    config = DPOConfig(
        output_dir=str(folder),
        beta=beta,
        loss_type=loss_type,
        max_length=None,
        report_to="none",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_dropout=True,
    )
    dataset = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    return DPOTrainer(policy.model, args=config, train_dataset=dataset, processing_class=tiny.make_tokenizer())


def loss_and_gradients(policy: Any, loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    policy.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


SAME = [("dpo", "sum", "sigmoid"), ("dpo", "mean", "sigmoid_norm"), ("hinge", "sum", "hinge"), ("ipo", "mean", "ipo")]
SAME += [("nca-pair", "sum", "nca_pair"), ("bco-pair", "sum", "bco_pair"), ("sppo-hard", "sum", "sppo_hard")]


@pytest.mark.parametrize(("name", "reduction", "loss_type"), SAME)
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_loss_and_gradient_equal_trls(
    tiny_llama: Path, tmp_path: Path, name: str, reduction: str, loss_type: str, beta: float
) -> None:
    """trl's bco_pair has no running mean of rewards; ours is 0 in a first step."""
    method = {"beta": beta, "reduction": reduction}
    trainer = make_trainer(make_recipe(tiny_llama, name, method=method), tmp_path / "run")
    policy = trainer.raw_policy
    opponent = make_trl(policy, tmp_path / "trl", beta, loss_type)
    torch.manual_seed(3)
    for name, parameter in policy.named_parameters():
        if "lora_B.default" in name:
            parameter.data.normal_(0, 0.05)
    pairs = make_pairs()
    batches = trainer.feed.batches(range(len(pairs)), 0)
    losses = torch.cat([trainer.objective.measure(batch).out.losses for batch in batches])
    ours, gradients = loss_and_gradients(policy, losses.mean())

    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(keys, (p.prompt.tolist(), p.chosen.tolist(), p.rejected.tolist()), strict=True)) for p in pairs]
    theirs, expected = loss_and_gradients(policy, opponent.compute_loss(opponent.model, opponent.data_collator(rows)))

    assert ours == pytest.approx(theirs, abs=2e-6, rel=1e-6)
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    assert largest > 1e-4
    for layer, gradient in gradients.items():  # the squares of sppo-hard have gradients of hundreds
        torch.testing.assert_close(gradient, expected[layer], atol=max(2e-6, 1e-6 * largest), rtol=1e-4)


def mean_log_probs(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, rejected = -torch.rand(2, count, generator=torch.Generator().manual_seed(1)) * 4 - 0.01
    return chosen, rejected


@pytest.mark.filterwarnings("ignore::trl.import_utils.TRLExperimentalWarning")
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["cpo", "simpo", "cpo-simpo"])
def test_cpo_and_simpo_equal_trls_on_the_same_log_probs(name: str, label_smoothing: float) -> None:
    from trl.experimental.cpo import CPOTrainer

    options = {key: METHODS[name].defaults["method"][key] for key in METHODS[name].option_names[:-1]}
    settings = SimpleNamespace(
        alpha=0.0,
        beta=options["beta"],
        simpo_gamma=options.get("gamma"),
        label_smoothing=label_smoothing,
        loss_type="sigmoid" if name == "cpo" else "simpo",
        accelerator=SimpleNamespace(device="cpu"),
    )
    chosen, rejected = mean_log_probs()
    ours = METHODS[name].loss(without_reference(chosen, rejected), **options, label_smoothing=label_smoothing)
    theirs = CPOTrainer.cpo_loss(settings, chosen, rejected)
    for mine, their in zip((ours.losses, ours.chosen_rewards, ours.rejected_rewards), theirs, strict=True):
        torch.testing.assert_close(mine, their, atol=1e-5, rtol=1e-6)


@pytest.mark.filterwarnings("ignore::trl.import_utils.TRLExperimentalWarning")
def test_orpos_odds_term_equals_trls_on_the_same_log_probs() -> None:
    from trl.experimental.orpo import ORPOTrainer

    settings = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = mean_log_probs()
    ours = METHODS["orpo"].loss(without_reference(chosen, rejected), beta=0.1)
    losses, chosen_rewards, rejected_rewards, *_ = ORPOTrainer.odds_ratio_loss(settings, chosen, rejected)
    torch.testing.assert_close(ours.losses, -losses)  # trl adds it to the likelihood term with a minus
    torch.testing.assert_close(ours.chosen_rewards, chosen_rewards)
    torch.testing.assert_close(ours.rejected_rewards, rejected_rewards)


def without_reference(chosen: torch.Tensor, rejected: torch.Tensor) -> PairScores:
    one = torch.ones(len(chosen), dtype=torch.int64)
    return PairScores(chosen, rejected, None, None, *[one] * 4)
