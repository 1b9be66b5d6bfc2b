"""trl's DPOTrainer as the judge: the same pairs, the same adapter, the same loss and gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from tests import tiny
from tests.test_trainer import make_pairs, make_recipe, make_trainer


def make_trl(policy: Any, folder: Path, beta: float) -> DPOTrainer:
    """trl's trainer on our model object. A fresh adapter (B = 0) makes its reference, a copy, the base."""
    config = DPOConfig(
        output_dir=str(folder),
        beta=beta,
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


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_loss_and_gradient_equal_trls(tiny_llama: Path, tmp_path: Path, beta: float) -> None:
    trainer = make_trainer(make_recipe(tiny_llama, "dpo", method={"beta": beta}), tmp_path / "run")
    policy = trainer.raw_policy
    opponent = make_trl(policy, tmp_path / "trl", beta)
    torch.manual_seed(3)
    for name, parameter in policy.named_parameters():
        if "lora_B.default" in name:
            parameter.data.normal_(0, 0.05)
    pairs = make_pairs()
    losses = [
        trainer.method.loss(trainer.scores(batch), **trainer.options).losses
        for batch in trainer.batches(range(len(pairs)), 0)
    ]
    ours, gradients = loss_and_gradients(policy, torch.cat(losses).mean())

    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(keys, (p.prompt.tolist(), p.chosen.tolist(), p.rejected.tolist()), strict=True)) for p in pairs]
    theirs, expected = loss_and_gradients(policy, opponent.compute_loss(opponent.model, opponent.data_collator(rows)))

    assert ours == pytest.approx(theirs, abs=2e-6)
    assert abs(ours - 0.6931) > 0.01
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-6, rtol=1e-4)
