"""The gradient of RL steps by hand, and how their rollouts are cut into updates and micro-batches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_data, make_module
from lightning import Trainer
from rl_steps import (
    Coin,
    Gradient,
    Gradients,
    Noting,
    by_hand,
    groups_of,
    item,
    prepare,
    questions,
    reinforcement,
    relative,
)
from torch import Tensor

from mifo_lightning.data.schedule import Schedule
from mifo_lightning.policy.loading import load_policy
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rollout.engine import Completion, Sampling
from mifo_lightning.steps.batch import Batch, Stream
from mifo_lightning.steps.optimizer import AdamWSettings
from mifo_lightning.steps.settings import PolicyLoss


def grpo_gradient(
    drawn: tuple[list[list[int]], list[list[Completion]]],
    reward: Reward,
    tokenizer: Any,
    temperature: float,
    bonus: float = 0.0,
) -> Gradient:
    """Gradient of GRPO at ratio 1, sequence by sequence: the token mean of -A log p - bonus H, mean over sequences."""
    policy = load_policy("embedded")
    total = torch.zeros(())
    rows = sum(map(len, drawn[1]))
    for prompt, group in zip(*drawn, strict=True):
        texts = tokenizer.batch_decode([c.tokens for c in group], skip_special_tokens=True)
        found = reward(texts, [""] * len(group))
        rewards = torch.tensor([r if c.finished else 0.0 for r, c in zip(found, group, strict=True)])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for c, advantage in zip(group, advantages, strict=True):
            logp, entropy = by_hand(policy, prompt, c.tokens, temperature)
            total = total - (advantage * logp + bonus * entropy).mean() / rows
    total.backward()
    return {f"policy.{n}": p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("settings", "passes", "micro_batches"),
    [
        (PolicyLoss(), 1, 1),
        (PolicyLoss(), 2, 4),
        (PolicyLoss(kl_coefficient=1.0), 2, 2),
        (PolicyLoss(entropy_bonus=0.5), 2, 2),
    ],
    ids=["on policy", "two passes", "kl", "entropy bonus"],
)
def test_the_gradient_is_that_of_the_sampling_temperature(
    make_trainer: Callable[..., Trainer], tokenizer: Any, settings: PolicyLoss, passes: int, micro_batches: int
) -> None:
    engine, watch = Noting(), Gradients()
    module = make_module(
        engine=engine,
        reward=Coin(),
        loss=settings,
        sampling=Sampling(0.7, max_new_tokens=14),
        rl=AdamWSettings(lr=0.0),
        micro_batches=micro_batches,
    )
    schedule = Schedule(rl_steps=1, prompts_per_step=4, epochs_per_rollout=passes)
    make_trainer([watch]).fit(module, datamodule=make_data(schedule=schedule))
    (drawn,) = engine.drawn
    bonus = settings.entropy_bonus
    expected, at_one = (grpo_gradient(drawn, Coin(), tokenizer, t, bonus) for t in (0.7, 1.0))
    if bonus:
        assert relative(grpo_gradient(drawn, Coin(), tokenizer, 0.7), expected) > 0.1
    assert relative(at_one, expected) > 0.1
    assert len(watch.found) == passes
    for gradient in watch.found:  # the weights stay, so every pass has ratio 1, and KL and its gradient are 0
        assert relative(gradient, expected) < 1e-4


@pytest.mark.parametrize("settings", [PolicyLoss(), PolicyLoss(kl_coefficient=0.1), PolicyLoss(entropy_bonus=0.1)])
def test_micro_batches_hold_every_sequence_that_pushes_once(
    policy: Policy, tokenizer: Any, settings: PolicyLoss
) -> None:
    rl = reinforcement(tokenizer, settings=settings)
    qs = questions(tokenizer)[:3]
    texts = ["3>7<eos>", "43>8<eos>", "543>8<eos>", "3>7", *["3>8<eos>"] * 4, *["3>7<eos>"] * 4]
    completions = groups_of(tokenizer, *texts)
    rollout = prepare(rl, policy, item(qs), rl.grade(qs, completions))
    parts = rollout.chunks(0, 6)
    for part in parts:
        assert part.rl.weight.shape == part.sequences.mask().shape
        assert part.rl.weight.any() == part.rl.weight.any(-1).all()  # whole sequences, or one that weighs nothing
        torch.testing.assert_close(
            part.rl.weight.sum(-1), torch.full((len(part.rl.weight),), float(part.rl.weight.any()) / 12)
        )
    rows = [
        (tuple(tokens[p : p + n].tolist()), float(advantage))
        for part in parts
        for tokens, p, n, advantage, weight in zip(*part.sequences, part.advantages, part.rl.weight, strict=True)
        if weight.any()
    ]
    always = settings.kl_coefficient > 0 or settings.entropy_bonus > 0
    pushing = 12 if always else 4
    flat = [c.tokens for group in completions for c in group]
    advantages = rollout.advantages.tolist()
    assert rows == [(tuple(t), a) for t, a in zip(flat, advantages, strict=True)][:pushing]
    assert sum(int((part.rl.weight > 0).sum()) for part in parts) == sum(map(len, flat[:pushing]))
    assert sum(not part.rl.weight.any() for part in parts) == (0 if always else 2)


def test_updates_work_on_their_own_minibatch_in_every_pass(policy: Policy, tokenizer: Any) -> None:
    rl, qs = reinforcement(tokenizer, settings=PolicyLoss(kl_coefficient=0.1)), questions(tokenizer)
    completions = groups_of(tokenizer, *[f"{i}>7<eos>" for i in range(8)], *["3>8<eos>"] * 8)
    rollout = prepare(rl, policy, item(qs, minibatches=2, updates=4), rl.grade(qs, completions))
    for update in range(4):
        parts = rollout.chunks(update % 2, 2)
        mine = torch.cat([part.question for part in parts])
        assert mine.tolist() == [2 * (update % 2) + i for i in (0, 1) for _ in range(4)]
        firsts = torch.cat([part.sequences.prompt_lengths for part in parts])
        assert firsts.tolist() == [len(q.prompt) for q in qs[2 * (update % 2) :][:2] for _ in range(4)]
        weights = torch.cat([part.rl.weight.sum(-1) for part in parts])
        torch.testing.assert_close(weights, torch.full((8,), 1 / 8))  # of this optimizer step alone


@pytest.mark.parametrize(
    "settings",
    [
        PolicyLoss(),
        PolicyLoss(entropy_fraction=0.5, kl_coefficient=0.1),
        PolicyLoss(aggregation="sum", entropy_bonus=0.1),
    ],
)
def test_a_rollout_survives_its_state(policy: Policy, tokenizer: Any, settings: PolicyLoss) -> None:
    rl, qs = reinforcement(tokenizer, settings=settings), questions(tokenizer)
    rl.set_reference(load_policy("embedded") if settings.kl_coefficient else None)
    rollout = prepare(rl, policy, item(qs, updates=2), rl.grade(qs, rl.draw(policy, qs, 0)))
    again = Batch.from_state_dict(rollout.state_dict(), torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(rollout.sequences, again.sequences, strict=True))
    for name, value in vars(rollout).items():
        if name != "sequences":
            found = getattr(again, name)
            if isinstance(value, Stream):
                assert torch.equal(value.weight, found.weight), name
                assert value[1:] == found[1:], name
            else:
                assert torch.equal(value, found) if isinstance(value, Tensor) else value == found, name
    assert (again.keep is None) == (again.logp_ref is None) == (settings.kl_coefficient == 0)
    assert (again.bonus is None) == (settings.entropy_bonus == 0)
