"""Rewards inside a run: what is logged of their parts, who is correct, truncated answers, and when a run stops."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALONE, make_data, make_module
from lightning import Trainer
from monitoring import Records
from own_rewards import always_fails
from rl_steps import completion, groups_of, item, prepare, questions, reinforcement, step_loss

from mifo_callbacks import Seed
from mifo_lightning.cli import main
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.data.schedule import Schedule
from mifo_lightning.data.skills import Skills
from mifo_lightning.policy.policy import Policy
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.function import FunctionReward
from mifo_lightning.rewards.last_answer import LastAnswerReward
from mifo_lightning.rewards.scoring import score
from mifo_lightning.rewards.weighted import OverlongPenalty, WeightedRewards
from mifo_lightning.rollout.engine import Sampling
from mifo_lightning.rollout.evaluation import Evaluation, Evaluator
from mifo_lightning.rollout.respond import Responder
from mifo_lightning.steps.settings import PolicyLoss

CPU = torch.device("cpu")
TINY = str(Path(__file__).parents[1] / "configs" / "tiny.yaml")
TEXTS = ("3>7<eos>", "43>7<eos>", "3>8<eos>", "3>7")  # 4, 5, 4 and 3 tokens; the last never ends


def summed() -> WeightedRewards:
    return WeightedRewards({"right": LastAnswerReward(), "long": OverlongPenalty(6, 2)}, solved_by="right")


def test_a_penalty_pushes_but_does_not_change_who_is_correct(policy: Policy, tokenizer: Any) -> None:
    rl = reinforcement(tokenizer, reward=summed())
    qs = questions(tokenizer)[:1]
    graded = rl.grade(qs, groups_of(tokenizer, *TEXTS))
    assert graded.rewards.tolist() == [[1, 0.5, 0, 0]]
    assert graded.correct.tolist() == [[True, True, False, False]]
    assert graded.groups(own=False)[0]["n_correct"] == 2
    described = (graded + graded).select([1]).describe(CPU)
    assert described["reward/right"] == 0.75, "a part is what that reward said, also of what was cut off"
    assert described["reward/long"] == -0.125
    assert described["reward"] == 0.375


def test_a_penalty_gives_a_group_that_is_all_wrong_no_place_in_dynamic_sampling(policy: Policy, tokenizer: Any) -> None:
    rl = reinforcement(tokenizer, reward=summed(), settings=PolicyLoss(dynamic_sampling=1), group_size=2)
    qs = questions(tokenizer)[:3]
    texts = [("3>8<eos>", "543>8<eos>"), ("3>7<eos>", "543>7<eos>"), ("3>7<eos>", "3>8<eos>")]
    graded = rl.grade(qs, [group for pair in texts for group in groups_of(tokenizer, *pair)])
    assert graded.differ.tolist() == [True] * 3, "the penalty differs in all of them"
    with pytest.warns(UserWarning, match="1 of 3 groups"):
        chosen = rl.choose(graded, 1, 3)
    assert chosen is not None
    assert chosen.picked == [2]
    whole = prepare(rl, policy, item(qs), graded)
    assert whole.question[whole.active].unique().tolist() == [qs[2].id], "nor do they count where a rank lacks a group"


@pytest.mark.parametrize(
    ("aggregation", "whole", "masked"),
    [
        ("sequence", [1 / 4 / 4, 1 / 4 / 5, 1 / 4 / 4, 1 / 4 / 3], [1 / 3 / 4, 1 / 3 / 5, 1 / 3 / 4, 0]),
        ("token", [1 / 16] * 4, [1 / 13, 1 / 13, 1 / 13, 0]),
        ("constant", [1 / 4 / 14] * 4, [1 / 3 / 14, 1 / 3 / 14, 1 / 3 / 14, 0]),
    ],
)
def test_truncated_answers_push_nothing_and_count_in_no_denominator(
    policy: Policy, tokenizer: Any, aggregation: Any, whole: list[float], masked: list[float]
) -> None:
    found = {}
    for mask in (False, True):
        settings = PolicyLoss(aggregation=aggregation, mask_truncated=mask, entropy_bonus=0.1)
        rl = reinforcement(tokenizer, settings=settings)
        qs = questions(tokenizer)[:1]
        graded = rl.grade(qs, groups_of(tokenizer, *TEXTS))
        rollout = prepare(rl, policy, item(qs), graded)
        assert rollout.rl is not None
        assert rollout.rl.weight[:, 0].tolist() == pytest.approx(masked if mask else whole)
        assert rollout.active.tolist() == [True, True, True, not mask]
        assert rollout.advantages is not None
        found[mask] = rollout.advantages, graded.groups(own=False)
    assert torch.equal(found[False][0], found[True][0]), "they stay in the mean of their group"
    assert found[False][1] == found[True][1]


def test_a_step_of_nothing_but_truncated_answers_has_no_gradient(policy: Policy, tokenizer: Any) -> None:
    rl = reinforcement(tokenizer, settings=PolicyLoss(mask_truncated=True, entropy_bonus=0.1))
    qs = questions(tokenizer)[:1]
    work = item(qs)
    rollout = prepare(rl, policy, work, rl.grade(qs, groups_of(tokenizer, "3>7", "4", "5", "6>7")))
    step_loss(rl, policy, rollout).backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())


def test_an_rl_step_in_which_every_check_fails_stops_the_run(
    make_trainer: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    module = make_module(reward=FunctionReward(always_fails))
    with pytest.raises(
        InputError, match=r"every check of FunctionReward failed, 16 of .* RL step.*no server at port 80"
    ):
        make_trainer().fit(module, datamodule=make_data(schedule=Schedule(rl_steps=1, prompts_per_step=4)))
    assert len([record for record in caplog.records if record.name == "mifo_lightning.rewards.base"]) == 1


def test_the_parts_of_a_sum_are_logged_in_training(make_trainer: Callable[..., Trainer]) -> None:
    records = Records()
    data = make_data(schedule=Schedule(rl_steps=1, prompts_per_step=4))
    make_trainer(logger=records, log_every_n_steps=1).fit(make_module(reward=summed()), datamodule=data)
    (right,), (penalty,) = records.series("rollout/reward/right"), records.series("rollout/reward/long")
    assert 0 <= right <= 1
    assert -1 <= penalty < 0
    assert records.series("rollout/correct") <= [right]


def test_demonstrations_are_judged_by_a_reward_that_reads_columns() -> None:
    seen: list[list[int]] = []

    def wants(responses: list[str], extra_info: list[dict[str, Any]], lengths: list[int], sources: list[str]) -> Any:
        assert set(sources) == {"addition", "mirrored"}
        seen.append([info["index"] for info in extra_info])
        return [float(length > 0 and info["index"] % 2) for length, info in zip(lengths, extra_info, strict=True)]

    train, reward = Skills(["addition", "mirrored"], 16), FunctionReward(wants, isolate=False)
    data = make_data(**{**ALONE, "reward": reward}, train=train)
    data.setup("fit")
    assert seen == [list(range(16))]
    assert [bool(q.demonstration) for q in data._questions["train"]] == [False, True] * 8


def test_demonstrations_that_no_check_survives_stop_the_run() -> None:
    with pytest.raises(InputError, match=r"every check of FunctionReward failed, 64 of demonstrations.*port 80"):
        make_data(**{**ALONE, "reward": FunctionReward(always_fails)}).setup("fit")


def test_failed_checks_are_summed_up_when_a_stage_ends() -> None:
    reward = FunctionReward(lambda responses: [None if "7" in text else 1.0 for text in responses], isolate=False)
    data = make_data(**{**ALONE, "reward": reward})
    data.setup("validate")
    score(reward, ["7", "8", "77"], ["", "", ""])
    with pytest.warns(UserWarning, match="^fit: 2 of 3 checks of FunctionReward failed and scored 0: 2 x not a finite"):
        data.teardown("fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.teardown("validate")


# --- evaluation -----------------------------------------------------------------------------------------------------


class Book:
    """Answers with what is written down, question by question."""

    def __init__(self, tokenizer: Any, *texts: str) -> None:
        self.answers = [[completion(tokenizer, text)] for text in texts]

    def generate(self, policy: Any, tokenizer: Any, prompts: Any, *rest: Any) -> Any:
        return self.answers[: len(prompts)]


def asked(tokenizer: Any, *texts: str) -> list[Question]:
    ids = tokenizer.encode("1+1=", add_special_tokens=False)
    return [Question(i, "a", text, ids, "7") for i, text in enumerate(texts)]


def evaluator(tokenizer: Any, reward: Reward, *texts: str) -> Evaluator:
    settings = Evaluation(samples=1, greedy=False, sampling=Sampling(0.6, max_new_tokens=14))
    book: Any = Book(tokenizer, *texts)
    judge = Evaluator(Responder(book, tokenizer, reward, 1.0, Seed(0, "seed")), settings)
    judge.reset(["a"], CPU)
    return judge


@pytest.mark.parametrize("missing", ["zero", "whole"])
def test_evaluation_shows_what_a_missing_marker_costs(policy: Policy, tokenizer: Any, missing: Any) -> None:
    reward = LastAnswerReward("</think>", missing)
    judge = evaluator(tokenizer, reward, "7<eos>", "7<eos>", "8<eos>", "7")
    qs = asked(tokenizer, "1+1=", "1+1=<think>", "1+1=<think>", "1+1=<think>")
    judge.update(policy, qs, 0)
    with pytest.warns(UserWarning, match=r"75% of the responses .* 0\.250 are correct .* 0\.500 by their whole text"):
        values = judge.compute("val")
    names = ("avg@1", "strict", "whole_text", "without_marker")
    expected = [0.25 if missing == "zero" else 0.5, 0.25, 0.5, 0.75]
    assert [float(values[f"val/a/{name}"]) for name in names] == expected
    assert reward.missing_marker == missing


def test_macro_means_of_the_marker_take_the_sources_where_none_is_missing_too(policy: Policy, tokenizer: Any) -> None:
    judge = evaluator(tokenizer, LastAnswerReward("</think>"), "7<eos>", "7<eos>")
    judge.reset(["a", "b"], CPU)
    judge.update(policy, asked(tokenizer, "1+1=", "1+1="), 0)
    judge.update(policy, asked(tokenizer, "1+1=", "1+1=<think>"), 1)
    values = judge.compute("val")
    names = ("without_marker", "strict", "whole_text", "avg@1")
    assert [float(values[f"val/{name}_macro"]) for name in names] == [0.25, 0.75, 1.0, 0.75]


def test_where_no_thought_is_open_an_evaluation_is_as_before(
    policy: Policy, tokenizer: Any, recwarn: pytest.WarningsRecorder
) -> None:
    judge = evaluator(tokenizer, LastAnswerReward("</think>"), "7<eos>", "8<eos>")
    judge.update(policy, asked(tokenizer, "1+1=", "1+1="), 0)
    assert {name.removeprefix("val/") for name in judge.compute("val") if "/a/" not in name} == {
        "avg@1",
        "length",
        "truncated",
    }
    assert not [w for w in recwarn if "thought" in str(w.message)]


def test_evaluation_logs_the_parts_of_a_sum(policy: Policy, tokenizer: Any) -> None:
    judge = evaluator(tokenizer, summed(), *TEXTS)
    judge.update(policy, asked(tokenizer, *["1+1="] * 4), 0)
    values = judge.compute("val")
    assert float(values["val/a/avg@1"]) == 0.5, "a long answer is right all the same"
    assert float(values["val/reward/right"]) == 0.75
    assert float(values["val/reward/long"]) == -0.125


def test_an_evaluation_in_which_every_check_fails_stops(policy: Policy, tokenizer: Any) -> None:
    judge = evaluator(tokenizer, FunctionReward(always_fails), "7<eos>", "8<eos>")
    judge.update(policy, asked(tokenizer, "1+1=", "1+1="), 0)
    with pytest.raises(InputError, match=r"2 of the responses of `test`.*port 80"):
        judge.compute("test")


# --- the command line -----------------------------------------------------------------------------------------------


def test_a_function_and_a_sum_are_named_in_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short_rewards.py").write_text(
        "def brief(responses, truths, lengths, extra_info):\n    return [-n / 14 for n in lengths]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    over = tmp_path / "over.yaml"
    over.write_text(
        """
reward:
  class_path: mifo_lightning.rewards.weighted.WeightedRewards
  init_args:
    rewards:
      right:
        class_path: mifo_lightning.rewards.last_answer.LastAnswerReward
      brief:
        class_path: mifo_lightning.rewards.function.FunctionReward
        init_args: {function: short_rewards.brief, failed: -1.0}
    weights: {brief: 0.1}
    solved_by: right
"""
    )
    flags = "--trainer.logger false --trainer.enable_checkpointing false --data.schedule.rl_steps 1 "
    flags += "--data.schedule.prompts_per_step 8 --data.train.init_args.count 512 --data.val.init_args.count 8 "
    flags += f"--history {{}} --trainer.default_root_dir {tmp_path}"
    main(["fit", "--config", TINY, "--config", str(over), *flags.split()])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["optimizer_steps"] == 1
    assert any("reward/brief" in name for name in summary["after"])
    absent = ("--reward.init_args.rewards.brief.init_args.function", "short_rewards.absent")
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", TINY, "--config", str(over), *flags.split(), *absent])
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "short_rewards.absent" in line
