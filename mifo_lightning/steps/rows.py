"""The rows an RL step trains on: every response with its advantage, and the demonstrations that are mixed in."""

from typing import NamedTuple

import torch
from torch import Tensor

from mifo_lightning.common.question import Question
from mifo_lightning.losses.advantages import Advantage, as_advantage
from mifo_lightning.methods.mixing import Mixing
from mifo_lightning.rollout.engine import Completion
from mifo_lightning.rollout.graded import Graded
from mifo_lightning.steps.settings import PolicyLoss


class Rows(NamedTuple):
    """B responses and demonstrations, question by question.

    Attributes:
        question: [B] int64, index of the question.
        tokens: B lists of token ids, end-of-sequence token included.
        logp: B lists of log-probabilities in nats as the engine had them; 0 for demonstrations, which it did not draw.
        advantages: [B] fp32; a method may push its own responses otherwise (`Mixing.push`).
        demonstrated: [B] bool, which are demonstrations.
        in_policy: [B] bool, which count in the denominator of the policy loss.
        active: [B] bool, which can give a gradient.
    """

    question: Tensor
    tokens: list[list[int]]
    logp: list[list[float]]
    advantages: Tensor
    demonstrated: Tensor
    in_policy: Tensor
    active: Tensor


def training_rows(
    graded: Graded,
    settings: PolicyLoss,
    mixing: Mixing | None = None,
    demonstration_rewards: Tensor | None = None,
    supervised: bool = False,
    charged: Tensor | None = None,
) -> Rows:
    """Lay out what an RL step trains on.

    Args:
        graded: Q questions with R responses each.
        settings: The policy loss.
        mixing: How demonstrations are mixed in; None mixes none in.
        demonstration_rewards: [Q] fp32 rewards of the demonstrations, 0 where there is none; needed if they are in
            groups.
        supervised: Whether the step has an SFT loss.
        charged: [Q, R] fp32, what is taken off the rewards before advantages; None takes nothing off.
    """
    q, r = graded.rewards.shape
    lent = torch.zeros(q, dtype=torch.bool)
    if mixing is not None:
        lent = torch.tensor([bool(x.demonstration) for x in graded.questions]) & mixing.lends(graded)
    trains = torch.ones_like(lent) if mixing is None else mixing.trains(lent)
    rewards = graded.rewards if charged is None else graded.rewards - charged
    with_signal = graded.undecided if settings.dynamic_sampling else torch.ones(q, dtype=torch.bool)
    rule = as_advantage(settings.advantage).within(rewards[with_signal])
    advantages = _advantages(rewards, rule, lent, demonstration_rewards)
    # dynamic sampling leaves a group without a signal out of everything
    counted = torch.ones(q, 1).bool()
    if settings.dynamic_sampling:
        counted = (advantages != 0).any(-1, keepdim=True) & with_signal[:, None]
    if mixing is not None:
        advantages[:, :r] = mixing.push(advantages[:, :r], graded)
    advantages[~trains, :r] = 0.0

    exists = torch.cat([torch.ones(q, r).bool(), lent[:, None]], dim=1)
    demonstrated = torch.zeros_like(exists)
    demonstrated[:, r] = True
    in_policy = (exists & (~demonstrated | (demonstration_rewards is not None))) & counted
    if settings.mask_truncated:
        in_policy[:, :r] &= graded.finished
    always = settings.kl_in_loss > 0 or settings.entropy_bonus > 0
    active = in_policy & ((advantages != 0) | (always & ~demonstrated & trains[:, None]))
    if supervised:
        active |= exists & demonstrated
    drawn = [
        completion
        for question, group, has in zip(graded.questions, graded.completions, lent.tolist(), strict=True)
        for completion in [*group, *([as_completion(question)] if has else [])]
    ]
    index = torch.arange(q)[:, None].expand_as(exists)
    fields = (advantages, demonstrated, in_policy, active)
    tokens, logp = [c.tokens for c in drawn], [c.logp for c in drawn]
    return Rows(index[exists], tokens, logp, *(field[exists] for field in fields))


def as_completion(question: Question) -> Completion:
    """The demonstration of a question in the place of a response; no engine drew it, so its log-probabilities are 0."""
    tokens = question.demonstration or []
    return Completion(tokens, [0.0] * len(tokens), True)


def _advantages(rewards: Tensor, rule: Advantage, lent: Tensor, demonstration_rewards: Tensor | None) -> Tensor:
    """[Q, R + 1] advantages of whole groups, the last column the demonstration's, whether there is one or not."""
    q, r = rewards.shape
    advantages = torch.zeros(q, r + 1)
    together = lent & (demonstration_rewards is not None)
    if not together.all():
        advantages[~together, :r] = rule(rewards[~together])
    if demonstration_rewards is not None and together.any():
        joined = torch.cat([rewards, demonstration_rewards[:, None]], dim=1)
        advantages[together] = rule(joined[together])
    return advantages
