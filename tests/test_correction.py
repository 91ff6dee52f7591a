"""Engines of other numerics than those that train: corrected for, and compared again as weights change."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import make_data, make_module
from lightning import Trainer
from rl_steps import evaluate, groups_of, item, prepare, questions, reinforcement

from mifo_callbacks import Seed
from mifo_lightning.common.errors import InputError
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.losses.corrections import Correction, TruncatedImportance
from mifo_lightning.monitors.history import History
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rewards.last_answer import LastAnswerReward
from mifo_lightning.rollout.engine import Completion, Sampling
from mifo_lightning.rollout.in_process import InProcessEngine
from mifo_lightning.rollout.respond import Responder
from mifo_lightning.rollout.self_check import SelfCheck
from mifo_lightning.steps.metrics import StepMetrics
from mifo_lightning.steps.settings import PolicyLoss

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [4, 5, 6, 7]]


class Copying(InProcessEngine):
    """Decodes with a copy of the weights, which follows the policy so many times.

    Args:
        follows: How often it takes over weights.
    """

    own_numerics = True

    def __init__(self, follows: int = 10**9) -> None:
        super().__init__()
        self.follows, self.calls = follows, 0
        self.copy: Policy | None = None
        self.version: int | None = None

    def generate(self, policy: Policy, *rest: Any) -> list[list[Completion]]:
        if self.version != policy.version and self.follows > 0:
            self.follows -= 1
            self.copy = copy.deepcopy(policy)
        self.version, self.calls = policy.version, self.calls + 1
        assert self.copy is not None
        return super().generate(self.copy, *rest)


def shift(policy: Policy) -> None:
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.1 * p.std() * torch.randn_like(p)
    policy.version += 1


@pytest.mark.parametrize(
    ("correction", "own", "mixed", "expected"),
    [
        ("auto", False, False, False),
        ("auto", True, False, True),
        ("auto", False, True, True),
        (None, True, True, False),
        (TruncatedImportance(), False, False, True),
    ],
)
def test_engines_of_other_numerics_are_corrected_for_unless_told_otherwise(
    policy: Policy, tokenizer: Any, correction: Any, own: bool, mixed: bool, expected: bool
) -> None:
    engine = Copying() if own else InProcessEngine()
    rl = reinforcement(tokenizer, engine=engine, settings=PolicyLoss(correction=correction))
    if mixed:
        policy.numerics = partial(torch.autocast, "cpu", torch.bfloat16)
    qs = questions(tokenizer)[:1]
    drawn = groups_of(tokenizer, "3>7<eos>", "3>8<eos>", "4>8<eos>", "5>7<eos>")
    batch = prepare(rl, policy, item(qs), rl.grade(qs, drawn))
    assert (batch.logp_sampler is not None) == expected


@pytest.mark.parametrize("correction", [TruncatedImportance(cap=1.5), TruncatedImportance("sequence", cap=1.5)])
@pytest.mark.parametrize("chunks", [1, 2])
def test_what_is_logged_is_of_the_tokens_that_train_however_they_are_cut(
    policy: Policy, tokenizer: Any, correction: Correction, chunks: int
) -> None:
    rl = reinforcement(tokenizer, settings=PolicyLoss(correction=correction))
    qs = questions(tokenizer)[:2]
    texts = ["3>7<eos>", "3>8<eos>", "24>8<eos>", "5>7<eos>", *["9<eos>"] * 4]  # the second group has no advantage
    drawn = groups_of(tokenizer, *texts)
    for i, c in enumerate(drawn[0] + drawn[1]):
        c.logp = [-1.0 - i - 0.5 * j for j in range(len(c.tokens))]
    batch = prepare(rl, policy, item(qs), rl.grade(qs, drawn))
    logp = torch.full((8, 5), -2.0, requires_grad=True)
    metrics = StepMetrics()
    for chunk in batch.chunks(0, chunks):
        rows, width = chunk.sequences.mask().shape
        metrics.add("rl", rl.objective(chunk, logp[:rows, :width], logp[:rows, :width])[1])
    found = metrics.take()
    gaps = [torch.tensor([-2.0 - x for x in c.logp]) for c in drawn[0]]
    if correction.level == "sequence":  # type: ignore[attr-defined]
        gaps = [gap.sum().expand(len(gap)) for gap in gaps]
    ratio = torch.cat(gaps).clamp_max(20.0).exp()
    assert found["rl/sampler_ratio"] == pytest.approx(float(ratio.mean()))
    assert found["rl/sampler_ratio_max"] == pytest.approx(float(ratio.max()))
    assert found["rl/sampler_cut"] == pytest.approx(float((ratio > 1.5).float().mean()))
    assert found["rl/sampler_gap"] == pytest.approx(float((ratio.clamp_max(1.5) - 1).abs().mean()))
    assert metrics.take() == {}, "a step begins anew"


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_what_the_engine_made_too_likely_pushes_less_and_what_it_made_unlikely_at_most_cap_times(level: Any) -> None:
    """TRL 1.16, `token_truncate` and `sequence_truncate`: the loss of each token times min(exp(old - sampler), cap)."""
    rl = reinforcement(None, settings=PolicyLoss(correction=TruncatedImportance(level, cap=1.5)))
    now, sampler = torch.full((2, 3), -1.0), torch.tensor([[-0.5, -1.2, -0.9], [-3.0, -0.7, -1.0]])
    mask, advantages = torch.tensor([[True, True, True], [True, True, False]]), torch.tensor([2.0, -1.0])
    ratio = {"token": (now - sampler).exp(), "sequence": torch.tensor([[math.exp(-0.4)], [math.exp(1.7)]])}[level]
    grad = evaluate(rl, now, now, mask, advantages, 3, logp_old=now, logp_sampler=sampler)[1]
    torch.testing.assert_close(grad, -advantages[:, None] * ratio.clamp_max(1.5) * mask / mask.sum(-1)[:, None] / 2)


def test_a_ratio_beyond_all_bounds_breaks_no_step() -> None:
    old, sampler = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-torch.inf, -1.0]])
    corrected = TruncatedImportance()(old, sampler, torch.ones(1, 2, dtype=torch.bool))
    assert corrected.factor.tolist() == [[2.0, 1.0]]
    assert corrected.ratio.isfinite().all()


def test_in_bf16_the_engine_in_process_is_corrected_for_too(make_trainer: Callable[..., Trainer]) -> None:
    lines = {}
    for precision in ("bf16-mixed", "32-true"):
        history = History(["rl/sampler*", "rollout/reward"])
        data = make_data(schedule=Schedule(rl_steps=3, prompts_per_step=4, sft_batch=4))
        make_trainer([history], precision=precision).fit(make_module(), datamodule=data)
        lines[precision] = [line for line in history.lines if "rl/sampler_ratio" in line]
    assert lines["32-true"] == []
    assert lines["bf16-mixed"]
    for line in lines["bf16-mixed"]:
        assert abs(line["rl/sampler_ratio"] - 1) < 0.05
        assert 1 < line["rl/sampler_ratio_max"] < 2
        assert line["rl/sampler_gap"] > 1e-5


def checked(engine: Copying, tokenizer: Any, every: int = 1) -> SelfCheck:
    responder = Responder(engine, tokenizer, LastAnswerReward(), 1.0, Seed(0, "seed"))
    return SelfCheck(responder, Sampling(max_new_tokens=14), every)


def test_weights_that_stay_old_are_caught_where_they_first_differ(policy: Policy, tokenizer: Any) -> None:
    check = checked(Copying(follows=1), tokenizer)
    check.run(policy, PROMPTS, "32-true")
    check.again(policy)  # nothing has changed
    shift(policy)
    with pytest.raises(InputError, match=r"rollout.engine: .* by Copying differ by .* those that train \(version 1\)"):
        check.again(policy)


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4, 5]), (3, [0, 3])])
def test_it_is_compared_again_with_every_so_many_changes(
    policy: Policy, tokenizer: Any, every: int, expected: list[int]
) -> None:
    engine = Copying()
    check = checked(engine, tokenizer, every)
    check.run(policy, PROMPTS, "32-true")
    check.take()
    compared = []
    for change in range(6):
        shift(policy)
        for _ in range(2):
            before = engine.calls
            check.again(policy)
            if engine.calls > before:
                compared.append(change)
                assert check.take()["max"] < 1e-3
    assert compared == expected


def test_an_engine_of_the_trainings_numerics_is_compared_once(policy: Policy, tokenizer: Any) -> None:
    engine = Copying()
    engine.own_numerics = False
    check = checked(engine, tokenizer)
    check.run(policy, PROMPTS, "32-true")
    calls = engine.calls
    shift(policy)
    check.again(policy)
    assert engine.calls == calls


def test_a_run_ends_before_it_trains_on_an_old_engines_responses(make_trainer: Callable[..., Trainer]) -> None:
    module = make_module(engine=Copying(follows=1), self_check=True)
    data = make_data(schedule=Schedule(rl_steps=3, prompts_per_step=4, sft_batch=4, sft_before=8))
    trainer = make_trainer()
    with pytest.raises(InputError, match=r"by Copying differ by .* \(version 8\)"):
        trainer.fit(module, datamodule=data)
    assert trainer.global_step == 8, "after the SFT phase that changed the weights"


def test_comparing_again_changes_no_bit_of_a_run(make_trainer: Callable[..., Trainer]) -> None:
    runs = []
    for self_check in (True, False):
        module = make_module(engine=Copying(), self_check=self_check)
        data = make_data(schedule=Schedule(rl_steps=3, prompts_per_step=4, sft_batch=4))
        make_trainer().fit(module, datamodule=data)
        runs.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_never_is_no_interval() -> None:
    with pytest.raises(InputError, match=r"model.rollout.check_every: 0 is not allowed; it must be at least 1"):
        make_module(check_every=0)
