"""What BCO and KTO remember of earlier rewards."""

from __future__ import annotations

import numpy as np
import pytest

from sampo_cli.method_table import METHODS
from sampo_cli.running import RewardMemory, RunningMean

STEPS = [(0.4, -0.2, 4), (1.0, 0.6, 4), (-0.5, -0.9, 2)]
"""Mean chosen reward, mean rejected reward, pairs."""


def remembered(memory: str, steps: list = STEPS) -> RewardMemory:
    rewards = RewardMemory(memory)
    for step in steps:
        rewards.update(*step)
    return rewards


def test_a_running_mean_weighs_by_count() -> None:
    mean = RunningMean()
    mean.update(3.0, 1)
    mean.update(5.0, 3)
    assert (mean.mean, mean.count) == (4.5, 4)  # (3 + 3 * 5) / 4


def test_nothing_is_remembered_before_the_first_step() -> None:
    assert RewardMemory("all steps").options() == {"baseline": 0.0}
    assert RewardMemory("last step").options() == {"chosen_baseline": 0.0, "rejected_baseline": 0.0}


def test_bco_is_given_the_mean_of_all_rewards_so_far() -> None:
    # chosen (4 * 0.4 + 4 * 1.0 + 2 * -0.5) / 10 = 0.46; rejected (-0.8 + 2.4 - 1.8) / 10 = -0.02; mean 0.22
    assert remembered("all steps").options() == {"baseline": pytest.approx(0.22)}


def test_kto_is_given_the_last_steps_means_not_below_0() -> None:
    assert remembered("last step", STEPS[:2]).options() == {"chosen_baseline": 1.0, "rejected_baseline": 0.6}
    assert remembered("last step").options() == {"chosen_baseline": 0.0, "rejected_baseline": 0.0}
    assert remembered("last step", STEPS[:1]).options() == {"chosen_baseline": 0.4, "rejected_baseline": 0.0}


def test_other_methods_are_given_nothing() -> None:
    assert remembered("none").options() == {}
    assert {name: m.memory for name, m in METHODS.items() if m.memory != "none"} == {
        "kto-pair": "last step",
        "bco-pair": "all steps",
    }


def test_the_mean_does_not_depend_on_how_pairs_were_cut_into_steps() -> None:
    rewards = np.random.default_rng(0).normal(size=96)
    for size in (1, 7, 32, 96):
        mean = RunningMean()
        for start in range(0, 96, size):
            part = rewards[start : start + size]
            mean.update(float(part.mean()), len(part))
        assert mean.mean == pytest.approx(rewards.mean(), abs=1e-14)


@pytest.mark.parametrize("memory", ["all steps", "last step", "none"])
def test_a_restored_memory_goes_on_as_if_nothing_had_happened(memory: str) -> None:
    half = RewardMemory(memory)
    half.load_state_dict(remembered(memory, STEPS[:2]).state_dict())
    half.update(*STEPS[2])
    assert half.options() == remembered(memory).options()


def test_a_new_reference_is_a_new_start() -> None:
    rewards = remembered("all steps")
    rewards.reset()
    assert rewards.options() == {"baseline": 0.0}
