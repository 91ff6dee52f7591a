"""Advantages of a group of rollouts: how much better each is than the others of its question."""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from mifo_callbacks.collectives import gather_ranks
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

    def within(self, rewards: Tensor) -> "Advantage":
        """The same among all rewards [N, G] that a step trains on, of which these are the rank's; may be collective."""
        return self

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


class BatchStd(Advantage):
    """`(R - mean) / (std + eps)`, the mean of the group, the deviation of all responses of the step.

    So no group is amplified because its rewards hardly differ (Lite PPO, arXiv 2508.08221).

    Args:
        eps: Added to the deviation.
        std: The deviation; None takes that of the rewards which are given.
    """

    def __init__(self, eps: float = 1e-4, std: float | None = None) -> None:
        self.eps, self.std = eps, std

    def within(self, rewards: Tensor) -> Advantage:
        everything = [reward for part in gather_ranks(rewards.flatten().tolist()) for reward in part]
        # over n - 1 degrees of freedom; in double, so that the order of the ranks decides nothing
        std = torch.tensor(everything, dtype=torch.double).std() if len(everything) > 1 else torch.zeros(())
        return BatchStd(self.eps, float(std))

    def scale(self, centred: Tensor, groups: Tensor) -> Tensor:
        return centred / ((groups.std() if self.std is None else self.std) + self.eps)


AdvantageName = Literal["group_std", "group_mean", "leave_one_out", "batch_std"]
ADVANTAGES = {"group_std": GroupStd, "group_mean": GroupMean, "leave_one_out": LeaveOneOut, "batch_std": BatchStd}


def as_advantage(choice: AdvantageName | Advantage) -> Advantage:
    """The advantage that a configuration names."""
    return named(choice, ADVANTAGES, Advantage, "model.loss.advantage")
