"""The rows an RL step trains on: every response with its advantage, and the demonstrations that are mixed in."""

from typing import NamedTuple

import torch
from torch import Tensor

from mifo_lightning.losses.advantages import group_advantages
from mifo_lightning.rollout.graded import Graded
from mifo_lightning.steps.settings import Mixing, RLSettings


class Rows(NamedTuple):
    """B responses and demonstrations, question by question.

    Attributes:
        question: [B] int64, index of the question.
        tokens: B lists of token ids, end-of-sequence token included.
        advantages: [B] fp32; with `own: sign` +1 or -1 for the policy's own responses.
        demonstrated: [B] bool, which are demonstrations.
        in_policy: [B] bool, which count in the denominator of the policy loss.
        active: [B] bool, which can give a gradient.
    """

    question: Tensor
    tokens: list[list[int]]
    advantages: Tensor
    demonstrated: Tensor
    in_policy: Tensor
    active: Tensor


def training_rows(
    graded: Graded, settings: RLSettings, mixing: Mixing | None, demonstration_rewards: Tensor | None
) -> Rows:
    """Lay out what an RL step trains on.

    Args:
        graded: Q questions with R responses each.
        settings: The policy loss.
        mixing: How demonstrations are mixed in; None mixes none in.
        demonstration_rewards: [Q] fp32 rewards of the demonstrations, 0 where there is none; needed if they are in
            groups.
    """
    q, r = graded.rewards.shape
    shown = torch.tensor([mixing is not None and bool(x.demonstration) for x in graded.questions])
    failed = torch.zeros(q, dtype=torch.bool)
    if mixing is not None and mixing.questions == "failed":
        failed = shown = shown & (graded.correct.sum(-1) <= mixing.gate)
    in_group = mixing is not None and mixing.in_group
    # the last column is the demonstration's, whether there is one or not
    advantages = torch.zeros(q, r + 1)
    together = shown & in_group
    advantages[~together, :r] = _advantages(graded.rewards[~together], settings)
    if demonstration_rewards is not None:
        joined = torch.cat([graded.rewards, demonstration_rewards[:, None]], dim=1)
        advantages[together] = _advantages(joined[together], settings)
    # dynamic sampling leaves a group without a signal out of everything
    counted = torch.ones(q, 1).bool()
    if settings.dynamic_sampling:
        counted = (advantages != 0).any(-1, keepdim=True) & graded.undecided[:, None]
    if mixing is not None and mixing.own == "sign":
        advantages[:, :r] = torch.where(graded.correct, 1.0, -1.0)
    advantages[failed, :r] = 0.0

    exists = torch.cat([torch.ones(q, r).bool(), shown[:, None]], dim=1)
    demonstrated = torch.zeros_like(exists)
    demonstrated[:, r] = True
    in_policy = (exists & (~demonstrated | in_group)) & counted
    if settings.mask_truncated:
        in_policy[:, :r] &= graded.finished
    always = settings.kl_coefficient > 0 or settings.entropy_bonus > 0
    active = in_policy & ((advantages != 0) | (always & ~demonstrated & ~failed[:, None]))
    if mixing is not None and max(mixing.sft, mixing.sft_end) > 0:
        active |= exists & demonstrated
    tokens = [
        row
        for question, group, has in zip(graded.questions, graded.completions, shown.tolist(), strict=True)
        for row in [*(c.tokens for c in group), *([question.demonstration or []] if has else [])]
    ]
    index = torch.arange(q)[:, None].expand_as(exists)
    fields = (advantages, demonstrated, in_policy, active)
    return Rows(index[exists], tokens, *(field[exists] for field in fields))


def _advantages(rewards: Tensor, settings: RLSettings) -> Tensor:
    """[N, G] advantages of N whole groups."""
    if not len(rewards):
        return rewards
    return group_advantages(rewards.flatten(), rewards.shape[1], settings.advantage).view_as(rewards)
