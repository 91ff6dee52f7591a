"""One RL step: drawing, grading, advantages and scores, what callbacks hear of it, and the gradient by hand."""

import math
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_data, make_module, weights
from lightning import Callback, Trainer

from mifo_lightning.data.question import Question
from mifo_lightning.data.skills import Skills
from mifo_lightning.loader import WorkItem
from mifo_lightning.models import load_policy
from mifo_lightning.optim import AdamWSettings
from mifo_lightning.policy import Policy
from mifo_lightning.reinforcement import Reinforcement, RLSettings
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.last_answer import LastAnswerReward
from mifo_lightning.rollout.batch import Rollout
from mifo_lightning.rollout.engine import Completion, Sampling
from mifo_lightning.rollout.in_process import InProcessEngine
from mifo_lightning.schedule import Schedule

PROMPTS = ["123+456=", "777x12=", "s:40312=", "9+9="]


class Noting(InProcessEngine):
    """Decodes, and keeps prompts and responses."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[list[list[int]], list[list[Completion]]]] = []

    def generate(self, policy: Any, tokenizer: Any, prompts: Any, *rest: Any) -> list[list[Completion]]:
        completions = super().generate(policy, tokenizer, prompts, *rest)
        self.drawn.append((prompts, completions))
        return completions


class Tenths(Reward):
    """A graded reward: the response is the number of tenths."""

    def __call__(self, responses: list[str], truths: list[str]) -> list[float]:
        return [int(response) / 10 for response in responses]


class Coin(Reward):
    """Right for about half of all responses, so that there is an advantage to learn from."""

    def __call__(self, responses: list[str], truths: list[str]) -> list[float]:
        return [float(zlib.crc32(response.encode()) % 2) for response in responses]


def reinforcement(tokenizer: Any, **changes: Any) -> Reinforcement:
    settings = {
        "engine": InProcessEngine(),
        "tokenizer": tokenizer,
        "reward": LastAnswerReward(),
        "sampling": Sampling(max_new_tokens=14),
        "settings": RLSettings(),
        "group_size": 4,
        "solved_at": 1.0,
        "seed": 0,
    }
    return Reinforcement(**{**settings, **changes})


def questions(tokenizer: Any, demonstrated: tuple[bool, ...] = (True,) * 4) -> list[Question]:
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in PROMPTS[: len(demonstrated)]]
    return [
        Question(i, f"s{i}", PROMPTS[i], prompt, "7", [2, 1] if shown else None)
        for i, (prompt, shown) in enumerate(zip(ids, demonstrated, strict=True))
    ]


def item(qs: list[Question], **changes: Any) -> WorkItem:
    plain = {"rollout": 0, "update": 0, "updates": 1, "minibatches": 1, "step": 0, "micro": 0, "micro_batches": 1}
    return WorkItem(**{"phase": "rl", "questions": qs, **plain, **changes})


def completion(tokenizer: Any, text: str, logp: float = -1.0) -> Completion:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return Completion(tokens, [logp] * len(tokens), text.endswith("<eos>"))


def groups_of(tokenizer: Any, *texts: str, size: int = 4, logp: float = -1.0) -> list[list[Completion]]:
    flat = [completion(tokenizer, text, logp) for text in texts]
    return [flat[i : i + size] for i in range(0, len(flat), size)]


def by_hand(policy: Policy, prompt: list[int], response: list[int], temperature: float) -> tuple[Any, Any]:
    """Log-probability and entropy of each token of one response, from the logits of the bare model."""
    logits = policy.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    logp = logits.log_softmax(-1)
    return logp[torch.arange(len(response)), response], -(logp.exp() * logp).sum(-1)


def drawn_tokens(completions: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.tokens for c in group] for group in completions]


def test_what_was_cut_off_gets_no_reward(tokenizer: Any) -> None:
    rl = reinforcement(tokenizer)
    completions = groups_of(tokenizer, "3>7<eos>", "3>7", "3>8<eos>", "3>8", "7<eos>", "7", ">7", ">7<eos>")
    rewards = rl.grade(questions(tokenizer)[:2], completions)
    assert rewards.tolist() == [1, 0, 0, 0, 1, 0, 0, 1]
    assert rewards.dtype == torch.float32


def test_every_rl_step_draws_anew_and_the_same_step_repeats(policy: Policy, tokenizer: Any) -> None:
    rl, qs = reinforcement(tokenizer, sampling=Sampling(2.0, max_new_tokens=14)), questions(tokenizer)
    first, again, second = (drawn_tokens(rl.draw(policy, item(qs, rollout=r))) for r in (0, 0, 1))
    assert first == again
    assert all(a != b for a, b in zip(first, second, strict=True))
    other = reinforcement(tokenizer, sampling=Sampling(2.0, max_new_tokens=14), seed=1)
    assert all(a != b for a, b in zip(first, drawn_tokens(other.draw(policy, item(qs))), strict=True))
    # each question has randomness of its own, whichever place it has in the batch
    twins = [Question(i, "s", PROMPTS[0], qs[0].prompt, "7") for i in (0, 5)]
    pair = drawn_tokens(rl.draw(policy, item(twins)))
    assert pair == drawn_tokens(rl.draw(policy, item(twins[::-1])))[::-1]
    assert pair[0] != pair[1]
    assert pair[0] == first[0]
    assert all(len(group) == 4 for group in first)


def test_rollouts_of_one_question_differ_between_the_steps_of_a_run(make_trainer: Callable[..., Trainer]) -> None:
    runs = []
    for _ in range(2):
        engine = Noting()
        module = make_module(engine=engine, rl=AdamWSettings(lr=0.0), sampling=Sampling(2.0, max_new_tokens=14))
        schedule = Schedule(rl_steps=4, rl_questions=4)
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
    rl = reinforcement(tokenizer, reward=Tenths(), solved_at=0.5)
    qs = questions(tokenizer)[:2]
    completions = groups_of(tokenizer, "4<eos>", "5<eos>", "9<eos>", "9", "0<eos>", "1<eos>", "2<eos>", "3<eos>")
    rewards = rl.grade(qs, completions)
    torch.testing.assert_close(rewards, torch.tensor([0.4, 0.5, 0.9, 0, 0, 0.1, 0.2, 0.3]))
    rollout = rl.prepare(policy, item(qs), completions, rewards)
    assert rollout.correct.tolist() == [False, True, True, False] + [False] * 4
    assert rollout.finished.tolist() == [True, True, True, False] + [True] * 4
    for rows in (slice(0, 4), slice(4, 8)):
        group = rewards[rows]
        expected = (group - group.mean()) / (group.std() + 1e-6)
        torch.testing.assert_close(rollout.advantages[rows], expected)
    assert [g["n_correct"] for g in rl.groups(rollout, qs)] == [2, 0]


def test_groups_say_how_many_were_correct_and_who_has_a_demonstration(policy: Policy, tokenizer: Any) -> None:
    rl = reinforcement(tokenizer)
    qs = questions(tokenizer, (True, False, True))
    qs[2].id = 9
    right, wrong, cut = "3>7<eos>", "3>8<eos>", "3>7"
    texts = (right, wrong, wrong, wrong, cut, cut, wrong, right, right, right, right, right)
    completions = groups_of(tokenizer, *texts)
    rollout = rl.prepare(policy, item(qs), completions, rl.grade(qs, completions))
    assert rl.groups(rollout, qs) == [
        {"id": 0, "n_correct": 1, "size": 4, "has_demonstration": True},
        {"id": 1, "n_correct": 1, "size": 4, "has_demonstration": False},
        {"id": 9, "n_correct": 4, "size": 4, "has_demonstration": True},
    ]
    assert rl.samples(rollout, qs, completions) == [
        {"source": "s0", "prompt": PROMPTS[0], "response": text, "truth": "7", "reward": float(text == right)}
        for text in texts[:4]
    ]


def test_the_description_of_a_rollout(policy: Policy, tokenizer: Any) -> None:
    class Erring(LastAnswerReward):
        errors, timeouts = 3, 2

    rl = reinforcement(tokenizer, reward=Erring())
    qs = questions(tokenizer)[:3]
    mixed = groups_of(tokenizer, "3>7<eos>", "3>7<eos>", "8<eos>", "3>7", logp=-0.5)
    still = groups_of(tokenizer, *["3>8<eos>"] * 4, *["3>7<eos>"] * 4, logp=-2.0)
    completions = mixed + still
    rollout = rl.prepare(policy, item(qs), completions, rl.grade(qs, completions))
    described = rl.describe(rollout, completions, seconds=0.5)
    tokens = (4 + 4 + 2 + 3) + 4 * 4 + 4 * 4
    advantage = 0.5 / (math.sqrt(4 * 0.25 / 3) + 1e-6)  # rewards 1, 1, 0, 0
    assert described == pytest.approx(
        {
            "reward": 6 / 12,
            "correct": 6 / 12,
            "truncated": 1 / 12,
            "length": tokens / 12,
            "entropy": (13 * 0.5 + 32 * 2.0) / tokens,
            "advantage_abs": 4 * advantage / 12,
            "groups_without_signal": 2 / 3,
            "tokens_per_s": tokens / 0.5,
            "reward_errors": 3,
            "reward_timeouts": 2,
        }
    )
    # a rollout at the mean of its group has advantage 0, but its group does have a signal
    graded = torch.tensor([0, 0.5, 0.5, 1.0] + [1.0] * 8)
    assert rl.describe(rl.prepare(policy, item(qs), completions, graded), completions, 0.5)[
        "groups_without_signal"
    ] == pytest.approx(2 / 3)


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("fraction", [0.15, 0.5])
def test_the_tokens_of_highest_entropy_of_each_minibatch_push_the_policy(
    policy: Policy, tokenizer: Any, fraction: float, minibatches: int
) -> None:
    temperature = 0.7
    rl = reinforcement(
        tokenizer, sampling=Sampling(temperature, max_new_tokens=14), settings=RLSettings(entropy_fraction=fraction)
    )
    qs = questions(tokenizer)
    work = item(qs, minibatches=minibatches, updates=minibatches)
    completions = rl.draw(policy, work)
    rollout = rl.prepare(policy, work, completions, torch.zeros(16))
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
    rollout = rl.prepare(policy, item(qs), completions, torch.ones(4))
    assert rollout.keep is None
    assert rollout.logp_old is None
    assert rollout.logp_ref is None
    assert rl.prepare(policy, item(qs, updates=2), completions, torch.ones(4)).logp_old is not None


def test_old_and_reference_scores_are_those_of_the_sampling_temperature(tokenizer: Any) -> None:
    rl = reinforcement(
        tokenizer, sampling=Sampling(0.7, max_new_tokens=14), settings=RLSettings(kl_coefficient=0.1), group_size=2
    )
    old, reference = load_policy("embedded"), load_policy("embedded")
    with torch.no_grad():
        for p in old.parameters():
            p.mul_(1.01)
    rl.set_reference(reference)
    qs = questions(tokenizer)
    work = item(qs, updates=2)
    completions = rl.draw(old, work)
    rollout = rl.prepare(old, work, completions, torch.zeros(8))
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
    module = make_module(policy=RLSettings(kl_coefficient=0.1), rl=AdamWSettings(lr=5e-3))
    make_trainer().fit(module, datamodule=make_data())
    assert all(name.startswith("policy.") for name in module.state_dict())
    qs = questions(tokenizer)
    completions = module.reinforcement.draw(module.policy, item(qs))  # type: ignore[arg-type]
    rollout = module.reinforcement.prepare(module.policy, item(qs), completions, torch.zeros(16))  # type: ignore[arg-type]
    assert rollout.logp_ref is not None
    initial = load_policy("embedded")
    with torch.no_grad():
        torch.testing.assert_close(rollout.logp_ref, initial(rollout.sequences)[0], atol=2e-4, rtol=1e-4)
        assert (module.policy(rollout.sequences)[0] - rollout.logp_ref).abs().max() > 0.1  # type: ignore[misc]


class Gradients(Callback):
    """The gradient of every optimizer step, before clipping."""

    def __init__(self) -> None:
        self.found: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.found.append({n: p.grad.clone() for n, p in pl_module.named_parameters()})


def grpo_gradient(
    drawn: tuple[list[list[int]], list[list[Completion]]], reward: Reward, tokenizer: Any, temperature: float
) -> dict[str, torch.Tensor]:
    """Gradient of GRPO at ratio 1, sequence by sequence: -A times the token mean of log p, mean over sequences."""
    policy = load_policy("embedded")
    total = torch.zeros(())
    rows = sum(map(len, drawn[1]))
    for prompt, group in zip(*drawn, strict=True):
        texts = tokenizer.batch_decode([c.tokens for c in group], skip_special_tokens=True)
        found = reward(texts, [""] * len(group))
        rewards = torch.tensor([r if c.finished else 0.0 for r, c in zip(found, group, strict=True)])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for c, advantage in zip(group, advantages, strict=True):
            total = total - advantage * by_hand(policy, prompt, c.tokens, temperature)[0].mean() / rows
    total.backward()
    return {f"policy.{n}": p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """L2 distance of two gradients relative to the length of the second."""
    square = sum(float((a[n] - b[n]).square().sum()) for n in b)
    return math.sqrt(square / sum(float(g.square().sum()) for g in b.values()))


@pytest.mark.parametrize(
    ("settings", "passes", "micro_batches"),
    [(RLSettings(), 1, 1), (RLSettings(), 2, 4), (RLSettings(kl_coefficient=1.0), 2, 2)],
    ids=["on policy", "two passes", "kl"],
)
def test_the_gradient_is_that_of_the_sampling_temperature(
    make_trainer: Callable[..., Trainer], tokenizer: Any, settings: RLSettings, passes: int, micro_batches: int
) -> None:
    engine, watch = Noting(), Gradients()
    module = make_module(
        engine=engine,
        reward=Coin(),
        policy=settings,
        sampling=Sampling(0.7, max_new_tokens=14),
        rl=AdamWSettings(lr=0.0),
    )
    schedule = Schedule(rl_steps=1, rl_questions=4, passes=passes)
    make_trainer([watch], accumulate_grad_batches=micro_batches).fit(module, datamodule=make_data(schedule=schedule))
    (drawn,) = engine.drawn
    expected, at_one = (grpo_gradient(drawn, Coin(), tokenizer, t) for t in (0.7, 1.0))
    assert relative(at_one, expected) > 0.1
    assert len(watch.found) == passes
    for gradient in watch.found:  # the weights stay, so every pass has ratio 1, and KL and its gradient are 0
        assert relative(gradient, expected) < 1e-4


@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_micro_batches_hold_every_sequence_that_pushes_once(policy: Policy, tokenizer: Any, coefficient: float) -> None:
    rl = reinforcement(tokenizer, settings=RLSettings(kl_coefficient=coefficient))
    qs = questions(tokenizer)[:3]
    texts = ["3>7<eos>", "43>8<eos>", "543>8<eos>", "3>7", *["3>8<eos>"] * 4, *["3>7<eos>"] * 4]
    completions = groups_of(tokenizer, *texts)
    rollout = rl.prepare(policy, item(qs), completions, rl.grade(qs, completions))
    parts = [rl.micro_batch(rollout, item(qs, micro=m, micro_batches=6)) for m in range(6)]
    assert {part.sequences for part in parts} == {12}
    for part in parts:
        assert part.mask.dtype == torch.bool
        assert part.mask.shape == part.part.sequences.mask().shape
        assert part.mask.any() == part.mask.any(-1).all()  # whole sequences, or nothing at all
    rows = [
        (tuple(tokens[p : p + n].tolist()), float(advantage))
        for part in parts
        for tokens, p, n, advantage, valid in zip(*part.part.sequences, part.part.advantages, part.mask, strict=True)
        if valid.any() and valid.sum() == n
    ]
    pushing = 12 if coefficient else 4
    flat = [c.tokens for group in completions for c in group]
    advantages = rollout.advantages.tolist()
    assert rows == [(tuple(t), a) for t, a in zip(flat, advantages, strict=True)][:pushing]
    assert sum(int(part.mask.sum()) for part in parts) == sum(map(len, flat[:pushing]))
    assert sum(not part.mask.any() for part in parts) == (0 if coefficient else 2)


def test_updates_work_on_their_own_minibatch_in_every_pass(policy: Policy, tokenizer: Any) -> None:
    rl, qs = reinforcement(tokenizer, settings=RLSettings(kl_coefficient=0.1)), questions(tokenizer)
    completions = groups_of(tokenizer, *[f"{i}>7<eos>" for i in range(8)], *["3>8<eos>"] * 8)
    rollout = rl.prepare(policy, item(qs), completions, rl.grade(qs, completions))
    for update in range(4):
        work = item(qs, update=update, updates=4, minibatches=2)
        parts = [rl.micro_batch(rollout, {**work, "micro": m, "micro_batches": 2}) for m in range(2)]
        assert {part.sequences for part in parts} == {8}
        found = torch.cat([part.part.rewards for part in parts])
        assert found.tolist() == ([1.0] * 8 if update % 2 == 0 else [0.0] * 8)
        firsts = torch.cat([part.part.sequences.prompt_lengths for part in parts])
        assert firsts.tolist() == [len(q.prompt) for q in qs[2 * (update % 2) :][:2] for _ in range(4)]


def test_a_rollout_survives_its_state(policy: Policy, tokenizer: Any) -> None:
    rl, qs = reinforcement(tokenizer, settings=RLSettings(entropy_fraction=0.5)), questions(tokenizer)
    completions = rl.draw(policy, item(qs))
    rollout = rl.prepare(policy, item(qs, updates=2), completions, torch.arange(16) / 16)
    again = Rollout.from_state_dict(rollout.state_dict(), torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(rollout.sequences, again.sequences, strict=True))
    for name in ("rewards", "correct", "finished", "advantages", "logp_old", "keep"):
        assert torch.equal(getattr(rollout, name), getattr(again, name))
    assert again.logp_ref is None


def test_rollouts_leave_the_weights_alone(policy: Policy, tokenizer: Any) -> None:
    rl = reinforcement(tokenizer, settings=RLSettings(entropy_fraction=0.5))
    before = weights(policy)  # type: ignore[arg-type]
    rl.prepare(policy, item(questions(tokenizer)), rl.draw(policy, item(questions(tokenizer))), torch.zeros(16))
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in policy.named_parameters())
