"""What BCO and KTO remember of earlier steps' rewards. Numbers in, numbers out; no tensors.

Both losses compare a reward with a mean over a batch. A step is cut into micro-batches and shared out to processes, and
the mean of one piece depends on the cut; the mean of the whole step is known only after its last forward pass, when
the first backward pass is long over. So a step uses the means of the steps before it. They are means over whole
steps, weighted by pairs, hence the same however steps were cut. Before the first step policy and reference agree,
every reward is 0, and so are these means: nothing has to be estimated to begin with.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Memory = Literal["none", "all steps", "last step"]


@dataclass
class RunningMean:
    """Mean of all numbers so far; 0 before there are any."""

    mean: float = 0.0
    count: int = 0

    def update(self, mean: float, count: int) -> None:
        """Take in `count` more numbers, given by their mean."""
        self.count += count
        self.mean += (mean - self.mean) * count / self.count


class RewardMemory:
    """The mean rewards of chosen and of rejected responses, over all training steps or over the last one.

    BCO takes the mean of all rewards so far (`all steps`): the shift d of arXiv 2404.04656. The released code gives
    each batch the same weight, whatever its size, and counts the batch that d is used for. KTO takes the means of the
    step before (`last step`), not below 0, as its estimate of beta times the KL: the policy moves, so an average over
    the whole run would lag. Evaluations read and do not update.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new reference makes every reward 0 again."""
        self.chosen, self.rejected = RunningMean(), RunningMean()

    def update(self, chosen_reward: float, rejected_reward: float, pairs: int) -> None:
        """Once per optimizer step: means over all of its pairs, of all micro-batches and processes."""
        if self.memory == "last step":
            self.reset()
        self.chosen.update(chosen_reward, pairs)
        self.rejected.update(rejected_reward, pairs)

    def options(self) -> dict[str, float]:
        """What the loss is called with beside the recipe's options."""
        if self.memory == "all steps":
            return {"baseline": (self.chosen.mean + self.rejected.mean) / 2}
        if self.memory == "last step":
            return {"chosen_baseline": max(0.0, self.chosen.mean), "rejected_baseline": max(0.0, self.rejected.mean)}
        return {}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: plain numbers."""
        return {"chosen": asdict(self.chosen), "rejected": asdict(self.rejected)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.chosen, self.rejected = RunningMean(**state["chosen"]), RunningMean(**state["rejected"])
