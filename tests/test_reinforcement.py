"""One RL step: drawing, grading, advantages and scores, what callbacks hear of it, and the gradient by hand."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_data, make_module, weights
from lightning import Trainer
from monitoring import Records
from rl_steps import (
    PROMPTS,
    Coin,
    Noting,
    by_hand,
    groups_of,
    item,
    prepare,
    questions,
    reinforcement,
)

from mifo_callbacks import Seed
from mifo_lightning.common.question import Question
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.data.skills import Skills
from mifo_lightning.policy.loading import load_policy
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rollout.engine import Completion, Sampling
from mifo_lightning.steps.optimizer import AdamWSettings
from mifo_lightning.steps.settings import PolicyLoss

CPU = torch.device("cpu")


class Tenths(Reward):
    """A graded reward: the response is the number of tenths."""

    isolate = False

    def __call__(self, responses: list[str], truths: list[str]) -> list[float]:
        return [int(response) / 10 for response in responses]


def drawn_tokens(completions: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.tokens for c in group] for group in completions]


def test_what_was_cut_off_gets_no_reward(tokenizer: Any) -> None:
    rl = reinforcement(tokenizer)
    completions = groups_of(tokenizer, "3>7<eos>", "3>7", "3>8<eos>", "3>8", "7<eos>", "7", ">7", ">7<eos>")
    graded = rl.grade(questions(tokenizer)[:2], completions)
    assert graded.rewards.tolist() == [[1, 0, 0, 0], [1, 0, 0, 1]]
    assert graded.rewards.dtype == torch.float32


def test_every_rl_step_draws_anew_and_the_same_step_repeats(policy: Policy, tokenizer: Any) -> None:
    rl, qs = reinforcement(tokenizer, sampling=Sampling(2.0, max_new_tokens=14)), questions(tokenizer)
    first, again, second = (drawn_tokens(rl.draw(policy, qs, r)) for r in (0, 0, 1))
    assert first == again
    assert all(a != b for a, b in zip(first, second, strict=True))
    other = reinforcement(tokenizer, sampling=Sampling(2.0, max_new_tokens=14), seed=Seed(1, "seed"))
    assert all(a != b for a, b in zip(first, drawn_tokens(other.draw(policy, qs, 0)), strict=True))
    # a question that comes once more within an RL step is answered anew
    assert drawn_tokens(rl.draw(policy, qs, 0, attempt=1)) != first
    # each question has randomness of its own, whichever place it has in the batch
    twins = [Question(i, "s", PROMPTS[0], qs[0].prompt, "7") for i in (0, 5)]
    pair = drawn_tokens(rl.draw(policy, twins, 0))
    assert pair == drawn_tokens(rl.draw(policy, twins[::-1], 0))[::-1]
    assert pair[0] != pair[1]
    assert pair[0] == first[0]
    assert all(len(group) == 4 for group in first)


def test_rollouts_of_one_question_differ_between_the_steps_of_a_run(make_trainer: Callable[..., Trainer]) -> None:
    runs = []
    for _ in range(2):
        engine = Noting()
        module = make_module(engine=engine, rl=AdamWSettings(lr=0.0), sampling=Sampling(2.0, max_new_tokens=14))
        schedule = Schedule(rl_steps=4, prompts_per_step=4)
        make_trainer().fit(module, datamodule=make_data(schedule=schedule, train=Skills(["addition", "mirrored"], 4)))
        runs.append([(prompts, drawn_tokens(completions)) for prompts, completions in engine.drawn])
    assert runs[0] == runs[1]
    seen: dict[tuple[int, ...], list[Any]] = {}
    for prompts, groups in runs[0]:
        for prompt, group in zip(prompts, groups, strict=True):
            seen.setdefault(tuple(prompt), []).append(group)
    assert len(seen) == 4
    for groups in seen.values():  # each question came in all four steps, with the same weights
        assert len({str(group) for group in groups}) == 4


def test_a_graded_reward_counts_as_correct_from_solved_at_on(policy: Policy, tokenizer: Any) -> None:
    rl = reinforcement(tokenizer, reward=Tenths(), success_threshold=0.5)
    qs = questions(tokenizer)[:2]
    completions = groups_of(tokenizer, "4<eos>", "5<eos>", "9<eos>", "9", "0<eos>", "1<eos>", "2<eos>", "3<eos>")
    graded = rl.grade(qs, completions)
    torch.testing.assert_close(graded.rewards, torch.tensor([[0.4, 0.5, 0.9, 0], [0, 0.1, 0.2, 0.3]]))
    rollout = prepare(rl, policy, item(qs), graded)
    assert graded.correct.tolist() == [[False, True, True, False], [False] * 4]
    assert rollout.question.tolist() == [0] * 4 + [1] * 4
    for i, group in enumerate(graded.rewards):
        expected = (group - group.mean()) / (group.std() + 1e-6)
        torch.testing.assert_close(rollout.advantages[4 * i : 4 * i + 4], expected)
    assert [g["n_correct"] for g in graded.groups(own=False)] == [2, 0]


def test_groups_say_how_many_were_correct_and_who_has_a_demonstration(tokenizer: Any) -> None:
    rl = reinforcement(tokenizer)
    qs = questions(tokenizer, ("7<eos>", "", "7<eos>"))
    qs[2].id = 9
    right, wrong, cut = "3>7<eos>", "3>8<eos>", "3>7"
    texts = (right, wrong, wrong, wrong, cut, cut, wrong, right, right, right, right, right)
    graded = rl.grade(qs, groups_of(tokenizer, *texts))
    assert graded.groups(own=False) == [
        {"id": 0, "n_correct": 1, "size": 4, "has_demonstration": True},
        {"id": 1, "n_correct": 1, "size": 4, "has_demonstration": False},
        {"id": 9, "n_correct": 4, "size": 4, "has_demonstration": True},
    ]
    assert graded.samples() == [
        {
            "source": "s0",
            "prompt": PROMPTS[0],
            "response": text.removesuffix("<eos>"),
            "truth": "7",
            "reward": float(text == right),
            "length": 4,
            "truncated": False,
        }
        for text in texts[:4]
    ]


def test_the_description_of_rollouts(tokenizer: Any) -> None:
    rl = reinforcement(tokenizer)
    qs = questions(tokenizer)[:3]
    mixed = groups_of(tokenizer, "3>7<eos>", "3>7<eos>", "8<eos>", "3>7", logp=-0.5)
    still = groups_of(tokenizer, *["3>8<eos>"] * 4, *["3>7<eos>"] * 4, logp=-2.0)
    graded = rl.grade(qs, mixed + still)
    tokens = (4 + 4 + 2 + 3) + 4 * 4 + 4 * 4
    assert graded.describe(CPU) == pytest.approx(
        {
            "reward": 6 / 12,
            "correct": 6 / 12,
            "truncated": 1 / 12,
            "length": tokens / 12,
            "entropy": (13 * 0.5 + 32 * 2.0) / tokens,
            "groups_without_signal": 2 / 3,
        }
    )
    assert graded.tokens == tokens + sum(len(q.prompt) for q in qs)
    # a rollout at the mean of its group has advantage 0, but its group does have a signal
    graded.rewards = torch.tensor([[0, 0.5, 0.5, 1.0], [1.0] * 4, [1.0] * 4])
    assert graded.describe(CPU)["groups_without_signal"] == pytest.approx(2 / 3)


def test_what_an_rl_step_logs_of_its_rollouts(make_trainer: Callable[..., Trainer], tokenizer: Any) -> None:
    class Erring(Coin):
        isolate = False
        errors, timeouts = 3, 2

    engine, records = Noting(), Records()
    module = make_module(engine=engine, reward=Erring(), rl=AdamWSettings(lr=0.0))
    make_trainer(logger=records, log_every_n_steps=1).fit(
        module, datamodule=make_data(schedule=Schedule(rl_steps=1, prompts_per_step=4))
    )
    ((_, completions),) = engine.drawn
    assert records.series("rollout/reward_errors", "rollout/reward_timeouts") == [3, 2]
    assert records.series("rollout/tokens_per_s")[0] > 0
    expected = []
    for group in completions:
        texts = tokenizer.batch_decode([c.tokens for c in group], skip_special_tokens=True)
        rewards = torch.tensor(Coin()(texts, [""] * 4)) * torch.tensor([c.finished for c in group])
        expected.append(((rewards - rewards.mean()) / (rewards.std() + 1e-6)).abs().mean())
    assert records.series("rollout/advantage_abs") == pytest.approx([float(torch.stack(expected).mean())])
    assert max(expected) > 0


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("fraction", [0.15, 0.5])
def test_the_tokens_of_highest_entropy_of_each_minibatch_push_the_policy(
    policy: Policy, tokenizer: Any, fraction: float, minibatches: int
) -> None:
    temperature = 0.7
    rl = reinforcement(
        tokenizer, sampling=Sampling(temperature, max_new_tokens=14), settings=PolicyLoss(entropy_fraction=fraction)
    )
    qs = questions(tokenizer)
    work = item(qs, minibatches=minibatches, updates=minibatches)
    completions = rl.draw(policy, qs, 0)
    rollout = prepare(rl, policy, work, rl.grade(qs, completions))
    keep, mask = rollout.keep, rollout.sequences.mask()
    assert keep is not None
    assert not (keep & ~mask).any()
    flat = [(q.prompt, c.tokens) for q, group in zip(qs, completions, strict=True) for c in group]
    entropy = torch.zeros(mask.shape)
    for row, (prompt, response) in enumerate(flat):
        entropy[row, : len(response)] = by_hand(policy, prompt, response, temperature)[1].detach()
    counts = []
    for rows in torch.arange(16).chunk(minibatches):
        valid, kept = entropy[rows][mask[rows]], keep[rows][mask[rows]]
        counts.append(int(kept.sum()))
        assert counts[-1] == math.ceil(fraction * len(valid) - 1e-9)
        assert valid[kept].min() >= valid[~kept].max() - 1e-4
        assert valid[kept].mean() > valid[~kept].mean() + 0.1
    if minibatches == 2:  # the two halves differ, so that one threshold for both would be another mask
        both, chosen = entropy[mask], keep[mask]
        assert not both[chosen].min() >= both[~chosen].max() - 1e-4


def test_without_an_entropy_mask_all_tokens_push(policy: Policy, tokenizer: Any) -> None:
    rl, qs = reinforcement(tokenizer), questions(tokenizer)[:1]
    completions = groups_of(tokenizer, *["3>7<eos>"] * 4)
    graded = rl.grade(qs, completions)
    rollout = prepare(rl, policy, item(qs), graded)
    assert rollout.keep is None
    assert rollout.logp_old is None
    assert rollout.logp_ref is None
    assert prepare(rl, policy, item(qs, updates=2), graded).logp_old is not None


def test_old_and_reference_scores_are_those_of_the_sampling_temperature(tokenizer: Any) -> None:
    rl = reinforcement(
        tokenizer, sampling=Sampling(0.7, max_new_tokens=14), settings=PolicyLoss(kl_coefficient=0.1), group_size=2
    )
    old, reference = load_policy("embedded"), load_policy("embedded")
    with torch.no_grad():
        for p in old.parameters():
            p.mul_(1.01)
    rl.set_reference(reference)
    qs = questions(tokenizer)
    work = item(qs, updates=2)
    completions = rl.draw(old, qs, 0)
    rollout = prepare(rl, old, work, rl.grade(qs, completions))
    flat = [(q.prompt, c) for q, group in zip(qs, completions, strict=True) for c in group]
    for row, (prompt, c) in enumerate(flat):
        n = len(c.tokens)
        for found, scorer in ((rollout.logp_old, old), (rollout.logp_ref, reference)):
            assert found is not None
            expected = by_hand(scorer, prompt, c.tokens, 0.7)[0].detach()
            torch.testing.assert_close(found[row, :n], expected, atol=2e-4, rtol=1e-4)
            assert (found[row, n:] == 0).all()
        assert rollout.logp_old is not None
        torch.testing.assert_close(rollout.logp_old[row, :n], torch.tensor(c.logp), atol=5e-4, rtol=1e-3)
    assert not torch.allclose(rollout.logp_old, rollout.logp_ref, atol=1e-2)  # type: ignore[arg-type]
    assert not any(p.requires_grad for p in reference.parameters())


def test_the_reference_is_still_the_initial_model_after_training(
    make_trainer: Callable[..., Trainer], tokenizer: Any
) -> None:
    module = make_module(loss=PolicyLoss(kl_coefficient=0.1), rl=AdamWSettings(lr=5e-3))
    make_trainer().fit(module, datamodule=make_data())
    assert all(name.startswith("policy.") for name in module.state_dict())
    qs, rl = questions(tokenizer), module.reinforcement
    graded = rl.grade(qs, rl.draw(module.policy, qs, 0))  # type: ignore[arg-type]
    rollout = prepare(rl, module.policy, item(qs), graded)  # type: ignore[arg-type]
    assert rollout.logp_ref is not None
    initial = load_policy("embedded")
    with torch.no_grad():
        torch.testing.assert_close(rollout.logp_ref, initial(rollout.sequences)[0], atol=2e-4, rtol=1e-4)
        assert (module.policy(rollout.sequences)[0] - rollout.logp_ref).abs().max() > 0.1  # type: ignore[misc]


def test_rollouts_leave_the_weights_alone(policy: Policy, tokenizer: Any) -> None:
    rl, qs = reinforcement(tokenizer, settings=PolicyLoss(entropy_fraction=0.5)), questions(tokenizer)
    before = weights(policy)  # type: ignore[arg-type]
    prepare(rl, policy, item(qs), rl.grade(qs, rl.draw(policy, qs, 0)))
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in policy.named_parameters())
