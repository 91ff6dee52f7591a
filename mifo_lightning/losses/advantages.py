"""Advantages of a group of rollouts: how much better each is than the others of its question."""

from typing import Literal

from torch import Tensor

Advantage = Literal["group_std", "group_mean", "leave_one_out"]


def group_advantages(rewards: Tensor, group_size: int, kind: Advantage = "group_std", eps: float = 1e-6) -> Tensor:
    """Advantages within each group of rollouts of one question; a group of equal rewards gets exactly 0.

    `group_std` is `(R - mean) / (std + eps)` (GRPO), `group_mean` is `R - mean` (Dr.GRPO, LUFFY, ReLIFT), and
    `leave_one_out` is `G / (G - 1) (R - mean)`, the reward less the mean of the others (RLOO).

    Args:
        rewards: [B] rewards; the rollouts of a question stand next to each other.
        group_size: G, the number of rollouts per question.
        kind: Which of the three.
        eps: Added to the standard deviation (over G - 1 degrees of freedom).

    Returns:
        [B] fp32 advantages.

    Raises:
        ValueError: If G < 2 or B is not a multiple of G.
    """
    if group_size < 2:
        raise ValueError(f"group advantages need at least 2 rollouts per question, got {group_size}")
    groups = rewards.float().view(-1, group_size)
    advantages = groups - groups.mean(-1, keepdim=True)
    if kind == "group_std":
        advantages = advantages / (groups.std(-1, keepdim=True) + eps)
    elif kind == "leave_one_out":
        advantages = advantages * (group_size / (group_size - 1))
    # the mean of equal numbers can be off by one rounding; that must not become a gradient
    equal = (groups == groups[:, :1]).all(-1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).flatten()
