"""Advantages of a group of rollouts: how much better each is than the others of its question."""

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor

from mifo_lightning.losses.named import named


class Advantage(ABC):
    """The reward less the mean of its group, scaled by `scale`; a group of equal rewards gets exactly 0."""

    def __call__(self, rewards: Tensor) -> Tensor:
        """Advantages of N questions.

        Args:
            rewards: [N, G] rewards, a question a row.

        Returns:
            [N, G] fp32 advantages.

        Raises:
            ValueError: If G < 2.
        """
        groups = rewards.float()
        if groups.shape[-1] < 2:
            raise ValueError(f"group advantages need at least 2 rollouts per question, got {groups.shape[-1]}")
        advantages = self.scale(groups - groups.mean(-1, keepdim=True), groups)
        # the mean of equal numbers can be off by one rounding; that must not become a gradient
        equal = (groups == groups[:, :1]).all(-1, keepdim=True)
        return advantages.masked_fill(equal, 0.0)

    @abstractmethod
    def scale(self, centred: Tensor, groups: Tensor) -> Tensor:
        """What becomes of `centred`, `R - mean`; both [N, G] fp32."""


class GroupStd(Advantage):
    """`(R - mean) / (std + eps)`, the deviation over G - 1 degrees of freedom (GRPO)."""

    def __init__(self, eps: float = 1e-6) -> None:
        self.eps = eps

    def scale(self, centred: Tensor, groups: Tensor) -> Tensor:
        return centred / (groups.std(-1, keepdim=True) + self.eps)


class GroupMean(Advantage):
    """`R - mean` (Dr.GRPO, LUFFY, ReLIFT)."""

    def scale(self, centred: Tensor, groups: Tensor) -> Tensor:
        return centred


class LeaveOneOut(Advantage):
    """`G / (G - 1) (R - mean)`, the reward less the mean of the others (RLOO)."""

    def scale(self, centred: Tensor, groups: Tensor) -> Tensor:
        return centred * (groups.shape[-1] / (groups.shape[-1] - 1))


AdvantageName = Literal["group_std", "group_mean", "leave_one_out"]
ADVANTAGES = {"group_std": GroupStd, "group_mean": GroupMean, "leave_one_out": LeaveOneOut}


def as_advantage(choice: AdvantageName | Advantage) -> Advantage:
    """The advantage that a configuration names."""
    return named(choice, ADVANTAGES, Advantage, "model.loss.advantage")
