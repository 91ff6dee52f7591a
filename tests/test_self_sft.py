"""Self-SFT: right responses of the initial model, or drawn anew, in the place of the data's demonstrations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_data, make_module, method_callbacks
from lightning import Trainer
from rl_steps import Coin, Noting, relative
from test_method_phases import Watch, run, sft_gradient

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.data.skills import Skills
from mifo_lightning.policy.policy import Policy
from mifo_lightning.steps.pool import Pool
from mifo_lightning.steps.settings import SFTLoss
from mifo_lightning.steps.supervision import Supervision

MakeTrainer = Callable[..., Trainer]
pytestmark = pytest.mark.filterwarnings("ignore:.*training questions have a right response.*")


def asked(tokenizer: Any, n: int = 64) -> list[Question]:
    """Questions of which the base solves a part."""
    rows = list(Skills(["addition", "mirrored"], n).rows())
    texts = [row["prompt"][0]["content"] for row in rows]
    truths = [row["reward_model"]["ground_truth"] for row in rows]
    return [Question(i, "s", t, tokenizer.encode(t), truths[i], [2, 1]) for i, t in enumerate(texts)]


def pool_of(engine: Noting, attempts: int = 4) -> Pool:
    module = make_module(engine=engine, demonstrations="initial", attempts=attempts)
    assert module.supervision.pool is not None
    return module.supervision.pool


@pytest.mark.parametrize("attempts", [1, 4])
def test_the_first_right_response_is_kept_and_no_further_one_is_drawn(
    policy: Policy, tokenizer: Any, attempts: int
) -> None:
    engine, qs = Noting(), asked(tokenizer)
    pool = pool_of(engine, attempts)
    with pytest.warns(UserWarning, match=rf"of 64 training questions have a right response .* in {attempts} attempts"):
        pool.fill(policy, qs)
    expected: dict[int, list[int]] = {}
    assert len(engine.drawn) == attempts
    for prompts, groups in engine.drawn:
        left = [q for q in qs if q.id not in expected]
        assert prompts == [q.prompt for q in left]
        for q, (completion,) in zip(left, groups, strict=True):
            text = tokenizer.decode(completion.tokens, skip_special_tokens=True)
            if completion.finished and text.rpartition(">")[2] == q.truth:
                expected[q.id] = completion.tokens
    assert 0 < len(expected) < len(qs)
    assert pool.responses == expected
    decoded = sum(len(p) + len(c.tokens) for ps, groups in engine.drawn for p, (c,) in zip(ps, groups, strict=True))
    assert (pool.take_decoded(), pool.take_decoded()) == (decoded, 0)


def test_what_is_drawn_does_not_depend_on_the_order_of_questions(policy: Policy, tokenizer: Any) -> None:
    qs, pools = asked(tokenizer), [pool_of(Noting()) for _ in range(2)]
    pools[0].fill(policy, qs)
    pools[1].fill(policy, qs[::-1])
    assert pools[0].responses == pools[1].responses


def test_a_new_response_replaces_the_old_one_which_stays_where_there_is_none(policy: Policy, tokenizer: Any) -> None:
    qs, pool = asked(tokenizer), pool_of(Noting(), attempts=1)
    pool.responses = {q.id: [9, 9, 1] for q in qs}
    share = pool.refresh(policy, qs[:32], 5)
    changed = [i for i, tokens in pool.responses.items() if tokens != [9, 9, 1]]
    assert share == len(changed) / 32
    assert 0 < len(changed) < 32
    assert max(changed) < 32
    before = dict(pool.responses)
    pool.refresh(policy, qs[:32], 5)
    assert pool.responses == before  # a step that is done anew draws the same
    pool.refresh(policy, qs[:32], 6)
    assert pool.responses != before
    shown = pool.shown(qs[:2])
    assert [q.demonstration for q in shown] == [pool.responses[q.id] for q in qs[:2]]
    assert [q.demonstration for q in qs[:2]] == [[2, 1]] * 2


def first_right(engine: Noting, calls: slice, tokenizer: Any) -> dict[tuple[int, ...], list[int]]:
    """By prompt the first response of these calls that `Coin` takes for right."""
    found: dict[tuple[int, ...], list[int]] = {}
    for prompts, groups in engine.drawn[calls]:
        for prompt, (completion,) in zip(prompts, groups, strict=True):
            text = tokenizer.decode(completion.tokens, skip_special_tokens=True)
            if completion.finished and Coin()([text], [""])[0]:
                found.setdefault(tuple(prompt), completion.tokens)
    return found


@pytest.mark.parametrize("name", ["self_sft", "self_sft_refreshed"])
def test_a_run_learns_from_them_alone(make_trainer: MakeTrainer, tokenizer: Any, name: str) -> None:
    engine = Noting()
    watch, _ = run(name, make_trainer, engine=engine)
    pool, steps = first_right(engine, slice(0, 8), tokenizer), [i for i, p in enumerate(watch.phases) if p == "s"]
    assert len(steps) >= 4
    at, moved = 8, 0  # the next call of the engine, and responses that are others than before
    for i, phase in enumerate(watch.phases):
        work = watch.items[i]
        if phase == "r":
            at += 1
            continue
        if name == "self_sft_refreshed" and work["update"] == 0:
            new = first_right(engine, slice(at, at + 8), tokenizer)
            assert {tuple(p) for p in engine.drawn[at][0]} >= {tuple(q.prompt) for q in work["questions"]}
            moved += sum(pool[prompt] != tokens for prompt, tokens in new.items())
            pool |= new
            at += 8
        for q in work["questions"]:
            q.demonstration = pool[tuple(q.prompt)]
        assert relative(watch.gradients[i], sft_gradient(watch, i, 1.0)) < 1e-3
    assert at == len(engine.drawn)
    assert (moved > 0) == (name == "self_sft_refreshed")


def test_questions_without_a_response_are_not_buffered(make_trainer: MakeTrainer) -> None:
    watch = Watch()
    module = make_module(demonstrations="initial", attempts=2)
    make_trainer([*method_callbacks(size=4), watch]).fit(module, datamodule=make_data())
    pool = module.supervision.pool
    assert pool is not None
    assert pool.responses is not None
    learned = {q.id for work in watch.items if work["phase"] == "sft" for q in work["questions"]}
    assert learned
    assert learned <= pool.responses.keys()
    assert len(pool.responses) < 64


def test_an_sft_stage_goes_over_them(make_trainer: MakeTrainer) -> None:
    watch, schedule = Watch(), Schedule(rl_steps=0, sft_before=6, sft_batch=8)
    module = make_module(demonstrations="initial")
    make_trainer([watch]).fit(module, datamodule=make_data(schedule=schedule))
    assert module.supervision.pool is not None
    assert {q.id for work in watch.items for q in work["questions"]} <= (module.supervision.pool.responses or {}).keys()
    many = make_data(schedule=Schedule(rl_steps=0, sft_before=6, sft_batch=64))
    with pytest.raises(InputError, match=r"data.schedule.sft_batch: 64 is more than the \d+ questions that have a"):
        make_trainer().fit(make_module(demonstrations="initial"), datamodule=many)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"attempts": 0}, "attempts: 0 is not allowed; it must be at least 1"),
        ({"weight": "flow"}, "weight: flow is not allowed with demonstrations initial; it weighs the data's"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=f"model.sft_loss.{line}"):
        make_module(demonstrations="initial", **changes)


def test_a_run_goes_on_with_the_responses_that_it_began_with(tokenizer: Any, policy: Policy) -> None:
    begun = make_module(demonstrations="initial").supervision
    assert begun.pool is not None
    begun.pool.responses = {3: [5, 1]}
    on = make_module(demonstrations="refreshed").supervision
    on.load_state_dict(begun.state_dict(), policy)
    assert on.pool is not None
    assert on.pool.responses == {3: [5, 1]}
    plain = Supervision(tokenizer, SFTLoss())
    for module, state in ((plain, begun.state_dict()), (on, plain.state_dict())):
        with pytest.raises(InputError, match=r"model.sft_loss.demonstrations: \w+ is not allowed here"):
            module.load_state_dict(state, policy)


def test_drawing_leaves_the_rollouts_of_a_run_as_they_are(make_trainer: MakeTrainer) -> None:
    drawn = []
    for demonstrations, first in (("data", 0), ("initial", 8)):
        engine = Noting()
        torch.manual_seed(len(drawn))
        module = make_module(engine=engine, demonstrations=demonstrations, reward=Coin())
        make_trainer().fit(module, datamodule=make_data(schedule=Schedule(rl_steps=3, prompts_per_step=4)))
        drawn.append([[c.tokens for group in groups for c in group] for _, groups in engine.drawn[first:]])
    assert drawn[0] == drawn[1]
