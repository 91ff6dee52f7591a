"""What an RL step trains on when demonstrations are mixed in: rows, advantages, who counts and who pushes."""

from typing import Any

import pytest
import torch
from conftest import make_data, make_module
from lightning import Callback
from rl_steps import Gradients, groups_of, item, prepare, questions, reinforcement, relative, step_loss

from mifo_lightning.common.errors import InputError
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.data.skills import Skills
from mifo_lightning.methods import HPT, SRFT, Chord, Luffy, Mixing
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rollout.graded import Graded
from mifo_lightning.steps.optimizer import AdamWSettings
from mifo_lightning.steps.rows import Rows, training_rows
from mifo_lightning.steps.settings import PolicyLoss

SHOWN = ("43>7<eos>", "65432>7<eos>", "", "7<eos>")
# one of three right, none, one, all
REWARDS = torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 1, 1]])
WHERE_SHOWN = [False, False, False, True] * 2 + [False] * 3 + [False, False, False, True]


def graded(tokenizer: Any) -> Graded:
    texts = [f"{i}>8<eos>" for i in range(12)]
    return Graded(questions(tokenizer, SHOWN), groups_of(tokenizer, *texts, size=3), REWARDS, 1.0)


def rows(tokenizer: Any, mixing: Mixing | None, *found: float, **settings: Any) -> Rows:
    """Rows of four questions with three responses each; `found` are the demonstrations' rewards."""
    rewards = torch.tensor(found) if found else None
    supervised = mixing is not None and mixing.scales(0)[1] > 0
    return training_rows(graded(tokenizer), PolicyLoss(advantage="group_mean", **settings), mixing, rewards, supervised)


def split(values: torch.Tensor, where: list[bool]) -> tuple[list[Any], list[Any]]:
    """The values of own responses, and those of demonstrations."""
    shown = torch.tensor(where)
    return values[~shown].tolist(), values[shown].tolist()


def test_rows_stand_question_by_question_with_the_demonstration_last(tokenizer: Any) -> None:
    found = rows(tokenizer, Chord())
    assert found.demonstrated.tolist() == WHERE_SHOWN
    assert found.question.tolist() == [0] * 4 + [1] * 4 + [2] * 3 + [3] * 4
    own = [c.tokens for group in graded(tokenizer).completions for c in group]
    demos = [q.demonstration for q in questions(tokenizer, SHOWN) if q.demonstration]
    assert found.tokens == [*own[:3], demos[0], *own[3:6], demos[1], *own[6:12], demos[2]]


def test_nothing_is_mixed_in_where_nothing_is_asked_for(tokenizer: Any) -> None:
    found = rows(tokenizer, None)
    assert not found.demonstrated.any()
    centred = [2 / 3, -1 / 3, -1 / 3, 0, 0, 0, 2 / 3, -1 / 3, -1 / 3, 0, 0, 0]
    assert found.advantages.tolist() == pytest.approx(centred)
    assert found.in_policy.all()
    assert found.active.tolist() == [a != 0 for a in centred]


def test_beside_the_group_a_demonstration_changes_no_advantage(tokenizer: Any) -> None:
    plain, found = rows(tokenizer, None), rows(tokenizer, Chord())
    advantages, of_demos = split(found.advantages, WHERE_SHOWN)
    assert (advantages, of_demos) == (plain.advantages.tolist(), [0, 0, 0])
    assert split(found.in_policy, WHERE_SHOWN) == ([True] * 12, [False] * 3)
    assert split(found.active, WHERE_SHOWN) == (plain.active.tolist(), [True] * 3)
    assert not rows(tokenizer, Mixing()).active[torch.tensor(WHERE_SHOWN)].any()


def test_in_the_group_a_demonstration_is_one_more_member(tokenizer: Any) -> None:
    # the second demonstration is right, the last one is not, and the third question has none
    found = rows(tokenizer, Luffy(), 1.0, 1.0, 0.0, 0.0)
    assert found.advantages.tolist() == pytest.approx(
        [0.5, -0.5, -0.5, 0.5, -0.25, -0.25, -0.25, 0.75, 2 / 3, -1 / 3, -1 / 3, 0.25, 0.25, 0.25, -0.75]
    )
    assert found.in_policy.all()
    assert found.active.all()
    still = rows(tokenizer, Luffy(), 1.0, 0.0, 0.0, 1.0)
    assert (still.advantages[4:8] == 0).all()
    assert (still.advantages[11:] == 0).all()
    assert still.in_policy.all()
    assert not still.active[4:8].any()


def test_the_sign_pushes_every_own_response_and_no_demonstration(tokenizer: Any) -> None:
    found = rows(tokenizer, SRFT(), 1.0, 1.0, 0.0, 1.0)
    signs = [1 if r == 1 else -1 for r in REWARDS.flatten().tolist()]
    assert split(found.advantages, WHERE_SHOWN) == (signs, pytest.approx([0.5, 0.75, 0.0]))


@pytest.mark.parametrize(("gate", "failed"), [(0, [1]), (1, [0, 1]), (3, [0, 1, 3])])
def test_failed_questions_lend_their_demonstration_and_their_rollouts_rest(
    tokenizer: Any, gate: int, failed: list[int]
) -> None:
    for extra in ({}, {"kl_coefficient": 0.1}, {"entropy_bonus": 0.1}):
        found = rows(tokenizer, HPT(gate), **extra)
        assert found.question[found.demonstrated].tolist() == failed  # the third question has none to lend
        resting = torch.isin(found.question, torch.tensor(failed)) & ~found.demonstrated
        assert (found.advantages[resting] == 0).all()
        assert not found.active[resting].any()
        assert found.active[found.demonstrated].all()
        assert found.in_policy[resting].all()
        assert int((found.in_policy & ~found.demonstrated).sum()) == 12


def test_the_weight_of_the_sft_loss_goes_along_half_a_cosine_to_its_end() -> None:
    mixing = Chord(0.9, 0.1, 4)
    assert [mixing.mu_at(i) for i in range(7)] == pytest.approx(
        [0.9, 0.5 + 0.4 * 2**-0.5, 0.5, 0.5 - 0.4 * 2**-0.5, 0.1, 0.1, 0.1]
    )
    assert [mixing.scales(i) for i in (0, 6)] == [(pytest.approx(0.1), pytest.approx(0.9)), (0.9, 0.1)]
    assert [Chord(0.3, convex=False).scales(i) for i in (0, 9)] == [(1.0, 0.3)] * 2


def test_a_method_s_weight_of_the_policy_loss_holds_without_an_sft_loss(policy: Policy, tokenizer: Any) -> None:
    class Quarter(Mixing):
        def scales(self, step: int) -> tuple[float, float]:
            return 0.25, 0.0

    found = []
    for mixing in (Mixing(), Quarter()):
        rl, qs = reinforcement(tokenizer, mixing=mixing, settings=PolicyLoss(entropy_bonus=0.1)), questions(tokenizer)
        texts = ["3>7<eos>", "3>8<eos>", "4>8<eos>", "5>7<eos>"] * 4
        found.append(step_loss(rl, policy, prepare(rl, policy, item(qs), rl.grade(qs, groups_of(tokenizer, *texts)))))
    torch.testing.assert_close(found[1], 0.25 * found[0])
    assert found[0] != 0


class Never(Reward):
    """No response is right."""

    isolate = False

    def __call__(self, responses: list[str], truths: list[str]) -> list[float]:
        return [0.0] * len(responses)


def test_every_rl_step_of_a_run_mixes_at_its_own_weight(make_trainer: Any) -> None:
    mixing, watch = Chord(0.9, 0.1, 2), Gradients()
    # without a right response only the SFT loss pushes; all steps have the same questions and the same model
    module = make_module(reward=Never(), mixing=mixing, rl=AdamWSettings(lr=0.0))
    data = make_data(train=Skills(["addition", "mirrored"], 4), schedule=Schedule(rl_steps=3, prompts_per_step=4))
    make_trainer([watch]).fit(module, datamodule=data)
    at_one = {n: g / 0.9 for n, g in watch.found[0].items()}
    assert len(watch.found) == 3
    for gradient, weight in zip(watch.found, (0.9, 0.5, 0.1), strict=True):
        assert relative(gradient, {n: weight * g for n, g in at_one.items()}) < 1e-4


def test_demonstrations_are_graded_by_the_verifier_of_the_rollouts(policy: Policy, tokenizer: Any) -> None:
    rl = reinforcement(tokenizer, mixing=Luffy(), settings=PolicyLoss(advantage="group_mean"))
    qs = questions(tokenizer, ("43>7<eos>", "3>8<eos>"))  # the second one is wrong
    drawn = rl.draw(policy, qs, 0)
    assert [len(group) for group in drawn] == [3, 3]
    texts = ["3>7<eos>", "3>8<eos>", "3>7", "3>7<eos>", "3>8<eos>", "3>7<eos>"]
    rollout = prepare(rl, policy, item(qs), rl.grade(qs, groups_of(tokenizer, *texts, size=3)))
    assert rollout.advantages is not None
    assert rollout.advantages.tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5, 0.5, -0.5, 0.5, -0.5])
    assert rollout.demonstrated is not None
    assert rollout.demonstrated.any(-1).tolist() == [False, False, False, True] * 2


@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_an_entropy_mask_leaves_demonstrations_whole(policy: Policy, tokenizer: Any, fraction: float) -> None:
    rl = reinforcement(tokenizer, mixing=Chord(), settings=PolicyLoss(entropy_fraction=fraction))
    qs = questions(tokenizer, SHOWN)
    rollout = prepare(rl, policy, item(qs), rl.grade(qs, rl.draw(policy, qs, 0)))
    assert rollout.demonstrated is not None
    assert (rollout.keep is None) == (fraction == 1)
    if rollout.keep is not None:
        mask, shown = rollout.sequences.mask(), rollout.demonstrated
        assert rollout.keep[shown].all()
        own = int(mask[~shown].sum())
        assert int(rollout.keep[~shown].sum()) == -(-int(own * 30) // 100)


def test_work_names_the_demonstrations_that_a_step_trained_on(make_trainer: Any) -> None:
    class Work(Callback):
        def __init__(self) -> None:
            self.shown: list[tuple[list[int], list[int]]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.shown.append((outputs["work"]["demonstrations"], [q.id for q in batch["questions"]]))

    for mixing, all_shown in ((None, False), (Chord(), True), (Mixing(), False)):
        work = Work()
        data = make_data(schedule=Schedule(rl_steps=2, prompts_per_step=4))
        make_trainer([work]).fit(make_module(mixing=mixing, micro_batches=2), datamodule=data)
        assert len(work.shown) == 2
        for found, asked in work.shown:
            assert sorted(found) == (sorted(asked) if all_shown else [])


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: HPT(gate=-1), "model.mixing.gate: -1"),
        (lambda: HPT(sft=-0.5), "model.mixing.sft: -0.5"),
        (lambda: SRFT(positive_weight=-1), "model.mixing.positive_weight: -1"),
        (lambda: Luffy(shape=0.0), "model.mixing.shape: 0.0"),
        (lambda: Chord(1.5), "model.mixing.mu: 1.5 .* between 0 and 1"),
        (lambda: Chord(0.5, 0.1), "model.mixing.decay_steps: 0"),
        (lambda: Mixing("flow"), "model.mixing.token_weight: flow"),
        (lambda: Mixing("nonsense"), "model.mixing.token_weight: 'nonsense' .* uniform, dft"),  # type: ignore[arg-type]
    ],
)
def test_impossible_mixtures_are_refused(make: Any, what: str) -> None:
    with pytest.raises(InputError, match=what):
        make()


def test_a_group_needs_two_rollouts_beside_its_demonstration(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"group_size: 2 .* beside the demonstration"):
        reinforcement(tokenizer, mixing=Luffy(), group_size=2)
