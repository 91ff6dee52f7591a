"""Dynamic sampling (DAPO): groups without a signal are replaced by further questions, and count nowhere."""

from contextlib import nullcontext
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import make_data, make_module
from lightning import Callback
from rl_steps import completion, encode, gradient, item, moved, prepare, reinforcement, relative, step_loss

from mifo_callbacks import BufferPhaseSwitch
from mifo_lightning.common.question import Question
from mifo_lightning.data.loader import PhaseLoader
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.methods import Chord
from mifo_lightning.policy.loading import load_policy
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rollout.engine import Completion
from mifo_lightning.rollout.graded import Chosen, Graded
from mifo_lightning.steps import reinforcement as rl_module
from mifo_lightning.steps.reinforcement import Reinforcement
from mifo_lightning.steps.settings import PolicyLoss


class Scripted:
    """Two responses each: one right and one wrong where the prompt begins with 1, otherwise both wrong."""

    def __init__(self) -> None:
        self.asked: list[list[list[int]]] = []

    def generate(self, policy: Any, tokenizer: Any, prompts: Any, keys: Any, samples: int, sampling: Any) -> Any:
        self.asked.append(prompts)
        one = encode(tokenizer, "1")[0]
        texts = [["3>7<eos>", "43>8<eos>"] if p[0] == one else ["3>8<eos>", "543>8<eos>"] for p in prompts]
        return [[completion(tokenizer, text) for text in pair] for pair in texts]


def pool(tokenizer: Any, signal: str) -> list[Question]:
    """A question for each letter: s has a signal, any other none."""
    texts = [f"{1 if letter == 's' else 2}{i:02d}=" for i, letter in enumerate(signal)]
    return [Question(i, "s", text, encode(tokenizer, text), "7", [2, 1]) for i, text in enumerate(texts)]


def sampler(tokenizer: Any, limit: int, **settings: Any) -> Reinforcement:
    rules = PolicyLoss(dynamic_sampling=limit, **settings)
    return reinforcement(tokenizer, engine=Scripted(), settings=rules, group_size=2)


def roll_out(
    rl: Reinforcement, loader: PhaseLoader, policy: Any = Mock(device=torch.device("cpu"))
) -> tuple[Graded, Chosen, Any]:
    """All that was drawn for the next RL step, which of it trains, and the work item."""
    work = next(loader)
    drawn, chosen = rl.roll_out(policy, work, loader.more, lambda _: nullcontext())
    return drawn, chosen, work


def ids(graded: Graded) -> list[int]:
    return [q.id for q in graded.questions]


# letters by question; the loader shuffles them, so that batches differ
MIXED = "s...s.s.....s..s"


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_further_questions_are_drawn_until_there_are_enough_or_the_limit_is_reached(tokenizer: Any, limit: int) -> None:
    qs = pool(tokenizer, MIXED)
    rl, loader = sampler(tokenizer, limit), PhaseLoader(qs, Schedule(prompts_per_step=4, rl_steps=9))
    drawn, chosen, _ = roll_out(rl, loader)
    with_signal = [i for i, q in enumerate(drawn.questions) if q.text[0] == "1"]
    batches = len(drawn.questions) // 4
    assert len(rl.responder.engine.asked) == batches  # type: ignore[attr-defined]
    order = [q.id for work in PhaseLoader(qs, Schedule(prompts_per_step=4, rl_steps=4)) for q in work["questions"]]
    enough = next(n for n in (1, 2, 3, 4) if sum(qs[i].text[0] == "1" for i in order[: 4 * n]) >= 4)
    assert enough > 2
    assert batches == min(limit, enough)
    assert ids(drawn) == order[: 4 * batches]
    assert chosen.picked == with_signal[:4]


def test_more_than_enough_is_cut_to_the_first(tokenizer: Any) -> None:
    rl = sampler(tokenizer, 3)
    qs = pool(tokenizer, "s.sss.ss")
    loader = PhaseLoader(qs, Schedule(prompts_per_step=4, rl_steps=9), seed=1)
    drawn, chosen, _ = roll_out(rl, loader)
    flags = [q.text[0] == "1" for q in drawn.questions]
    assert len(drawn.questions) == 8
    assert sum(flags) == 6
    assert chosen == ([i for i, flag in enumerate(flags) if flag][:4], [0, 1, 2, 3], 4)


def test_without_it_every_question_trains_and_none_is_asked_for(tokenizer: Any) -> None:
    rl, loader = sampler(tokenizer, 0), PhaseLoader(pool(tokenizer, "." * 8), Schedule(prompts_per_step=4, rl_steps=2))
    drawn, chosen, _ = roll_out(rl, loader)
    assert (len(drawn.questions), chosen.picked, loader.position["more"]) == (4, [0, 1, 2, 3], 0)


def test_no_question_comes_twice_within_an_epoch(tokenizer: Any) -> None:
    rl, loader = (
        sampler(tokenizer, 3),
        PhaseLoader(pool(tokenizer, "s.." * 16), Schedule(prompts_per_step=4, rl_steps=30)),
    )
    seen: list[int] = []
    while len(seen) < 96:
        seen += ids(roll_out(rl, loader)[0])
    assert sorted(seen[:48]) == sorted(seen[48:96]) == list(range(48))


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_dropped_groups_count_nowhere(policy: Policy, tokenizer: Any, aggregation: Any) -> None:
    settings: dict[str, Any] = {"aggregation": aggregation, "kl_coefficient": 0.1, "entropy_bonus": 0.1}
    rl = sampler(tokenizer, 2, **settings)
    rl.set_reference(load_policy("embedded"))
    loader = PhaseLoader(pool(tokenizer, MIXED), Schedule(prompts_per_step=4, rl_steps=9))
    drawn, chosen, work = roll_out(rl, loader, policy)
    plain = reinforcement(tokenizer, settings=PolicyLoss(**settings), group_size=2)
    plain.set_reference(load_policy("embedded"))
    kept, found = drawn.select(chosen.picked), []
    assert 0 < len(kept.questions) < len(drawn.questions)
    for one, graded in ((rl, kept), (plain, kept), (rl, drawn)):  # the last: groups without a signal left in
        rollout = prepare(one, policy, work, graded)
        new = moved(load_policy("embedded"))
        found.append(gradient(new, step_loss(one, new, rollout)))
    assert relative(found[0], found[1]) < 1e-5
    assert relative(found[2], found[1]) < 1e-5


def test_a_step_without_any_signal_changes_nothing(policy: Policy, tokenizer: Any) -> None:
    rl = sampler(tokenizer, 2, kl_coefficient=0.1, entropy_bonus=0.1)
    rl.set_reference(load_policy("embedded"))
    drawn, chosen, work = roll_out(rl, PhaseLoader(pool(tokenizer, "." * 16), Schedule(prompts_per_step=4, rl_steps=9)))
    assert len(drawn.questions) == 8
    rollout = rl.prepare(policy, work, drawn, chosen)
    found = gradient(policy, step_loss(rl, moved(policy), rollout))
    assert all((g == 0).all() for g in found.values())


def choices(rl: Reinforcement, graded: Graded, ranks: int, attempts: int, monkeypatch: Any) -> list[Any]:
    """What each of several ranks draws, and which of it trains, if every rank has its share of the questions."""
    parts = [graded.select(list(range(r, len(graded.questions), ranks))) for r in range(ranks)]
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(rl_module, "gather_ranks", lambda _: [part.differ.tolist() for part in parts])
        patch.setattr(rl_module, "ranks", lambda: ranks)
        for r, part in enumerate(parts):
            patch.setattr(rl_module, "rank", lambda r=r: r)
            found.append((part, rl.choose(part, attempts, 4)))
    return found


@pytest.mark.parametrize("signal", [MIXED, "s.ss.s.sssssssss", "s" * 16, "." * 16, ".s" * 8])
def test_neither_choice_nor_optimizer_step_depends_on_the_number_of_ranks(
    policy: Policy, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, signal: str
) -> None:
    qs, rl = pool(tokenizer, signal), sampler(tokenizer, 4)
    graded = rl.grade(qs, Scripted().generate(None, tokenizer, [q.prompt for q in qs], [], 2, None))
    for attempts in (1, 2, 3, 4):
        drawn, steps = graded.select(list(range(4 * attempts))), []
        for ranks in (1, 2, 4):
            step_of: dict[int, int] = {}
            for part, chosen in choices(rl, drawn, ranks, attempts, monkeypatch):
                if chosen is None:
                    step_of[-1] = 0
                    continue
                # a rank without any group trains on one that weighs nothing
                rollout = rl.prepare(policy, item(qs, minibatches=2, updates=2), part, chosen)
                assert rollout.question.tolist() == [i for i in ids(part.select(chosen.picked)) for _ in range(2)]
                pairs = zip(rollout.question.tolist(), rollout.minibatch.tolist(), strict=True)
                step_of |= {i: step for i, step in pairs if signal[i] == "s"}
            steps.append(step_of)
        assert steps[0] == steps[1] == steps[2]
        assert -1 in steps[0] or len(steps[0]) == min(4, signal[: 4 * attempts].count("s"))


def test_all_groups_reach_the_buffer_and_the_account_of_decoding(make_trainer: Any, tokenizer: Any) -> None:
    class Heard(Callback):
        def __init__(self) -> None:
            self.groups: list[list[dict[str, Any]]] = []
            self.work: list[int] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.groups.append(outputs["groups"])
            self.work.append(outputs["work"]["generated"])

    class Half(Scripted):
        """Right and wrong in turn for every third question or so; otherwise all wrong."""

        def generate(self, policy: Any, tokenizer: Any, prompts: Any, *rest: Any) -> list[list[Completion]]:
            self.asked.append(prompts)
            ends = ["7<eos>", "8<eos>"]
            return [[completion(tokenizer, ends[k % 2 if sum(p) % 3 == 0 else 1]) for k in range(4)] for p in prompts]

    class Seven(Reward):
        isolate = False

        def __call__(self, responses: list[str], truths: list[str]) -> list[float]:
            return [float(text.startswith("7")) for text in responses]

    heard, engine = Heard(), Half()
    switch = BufferPhaseSwitch(size=64, max_accuracy=0.25)
    module = make_module(engine=engine, reward=Seven(), loss=PolicyLoss(dynamic_sampling=3))
    schedule = Schedule(rl_steps=3, prompts_per_step=4, sft_batch=4)
    make_trainer([switch, heard]).fit(module, datamodule=make_data(schedule=schedule))
    assert len(engine.asked) > 3
    assert sum(map(len, heard.groups)) == sum(map(len, engine.asked))
    hopeless = [p for prompts in engine.asked for p in prompts if sum(p) % 3]
    assert len(switch.buffer) == len(hopeless)
    entered = {g["id"] for groups in heard.groups for g in groups if g["n_correct"] == 0}
    assert {e["id"] for e in switch.buffer.entries} == entered
    # each prompt once, and four responses of two tokens
    assert sum(heard.work) == sum(len(p) + 8 for prompts in engine.asked for p in prompts)


def test_a_negative_limit_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="dynamic_sampling: -1"):
        sampler(tokenizer, -1)


def test_it_would_drop_the_groups_that_need_demonstrations(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"dynamic_sampling: 3 is not allowed with model.mixing"):
        reinforcement(tokenizer, settings=PolicyLoss(dynamic_sampling=3), mixing=Chord())
