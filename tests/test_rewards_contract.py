"""What a reward may see and return: its declared parameters, any range, sums of rewards, functions, slow ones."""

import asyncio
import logging
import math
import threading
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
from own_rewards import echo_late

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.question import Question
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.function import FunctionReward
from mifo_lightning.rewards.grading import FailureWatch, check_success_threshold, grade_answers
from mifo_lightning.rewards.last_answer import LastAnswerReward
from mifo_lightning.rewards.math_reward import MathReward
from mifo_lightning.rewards.scoring import score
from mifo_lightning.rewards.weighted import FormatReward, OverlongPenalty, WeightedRewards

QUESTIONS = [
    Question(0, "sums-holdout", "1+1=", [1], "2", columns={"data_source": "sums", "level": 3}),
    Question(1, "skills", "2+2=", [1], "4", columns={"hint": "even"}),
]


here = partial(FunctionReward, isolate=False)  # functions of a test cannot be sent to a child


def grade(reward: Reward, texts: list[str], finished: list[bool] | None = None) -> list[float]:
    return grade_answers(reward, QUESTIONS, texts, [5, 7], finished).rewards


def test_a_reward_gets_what_it_declares_and_nothing_else() -> None:
    seen: dict[str, Any] = {}

    class Curious(Reward):
        isolate = False

        def __call__(
            self,
            responses: list[str],
            truths: list[str],
            prompts: list[str],
            sources: list[str],
            lengths: list[int],
            finished: list[bool],
            columns: list[dict[str, Any]],
            level: list[Any],
            absent: str = "default",
        ) -> list[float]:
            seen.update(locals())
            return [1.0] * len(responses)

    assert grade(Curious(), ["a", "b"], [True, False]) == [1, 0]
    expected = {
        "responses": ["a", "b"],
        "truths": ["2", "4"],
        "prompts": ["1+1=", "2+2="],
        "sources": ["sums", "skills"],
        "lengths": [5, 7],
        "finished": [True, False],
        "columns": [QUESTIONS[0].columns, QUESTIONS[1].columns],
        "level": [3, None],
        "absent": "default",
    }
    assert {name: seen[name] for name in expected} == expected
    assert grade(LastAnswerReward(), ["2", "5"]) == [1, 0], "a reward of two parameters works as before"


def test_what_a_reward_declares_stays_with_its_response_after_an_exception() -> None:
    def fussy(responses: list[str], lengths: list[int]) -> list[int]:
        if "bad" in responses:
            raise ValueError("bad")
        return lengths

    reward = here(fussy)
    assert grade(reward, ["bad", "good"]) == [0, 7]
    assert reward.errors == 1


def test_a_parameter_that_no_row_has_stops_the_run() -> None:
    def picky(responses: list[str], unicorn: list[str]) -> list[float]:
        return [1.0] * len(responses)

    with pytest.raises(InputError, match=r"picky wants `unicorn`.*there are responses, truths,.*level.*hint.*prompts"):
        grade(here(picky), ["a", "b"])


def test_any_finite_score_is_legal_and_a_cut_off_response_never_gets_more_than_nothing() -> None:
    values = [-3, 1e6]
    reward = here(lambda responses: values[: len(responses)])
    assert grade(reward, ["a", "b"]) == [-3, 1e6]
    assert grade(reward, ["a", "b"], [False, False]) == [-3, 0]
    low = here(lambda responses: [-0.5, None], failed=-10)
    assert grade(low, ["a", "b"]) == [-0.5, -10]
    assert grade(low, ["a", "b"], [False, True]) == [-10, -10]
    assert low.errors == 2


@pytest.mark.parametrize(
    ("failed", "best", "success_threshold", "good"),
    [(0, 1, 1, 1), (0, 1, 1.5, 0), (0, 1, 0, 0), (-10, 0, -0.5, 1), (-10, 0, -10, 0), (0, math.inf, math.inf, 0)],
)
def test_solved_at_lies_in_the_range_of_the_reward(
    failed: float, best: float, success_threshold: float, good: bool
) -> None:
    reward = here(lambda responses: [], failed=failed)
    reward.best = best
    if good:
        check_success_threshold(success_threshold, reward)
        return
    with pytest.raises(InputError, match=r"model.rollout.success_threshold: .* is not allowed; for FunctionReward"):
        check_success_threshold(success_threshold, reward)


@pytest.mark.parametrize("result", [[np.float32(0.5), np.int64(1)], np.array([0.5, 1.0]), (0.5, True), iter([0.5, 1])])
def test_numpy_and_whole_numbers_are_scores(result: Any) -> None:
    reward = here(lambda responses: result)
    values = grade(reward, ["a", "b"])
    assert values == [0.5, 1.0]
    assert {type(value) for value in values} == {float}
    assert reward.errors == 0


@pytest.mark.parametrize(
    "bad", [None, math.nan, np.float32("nan"), math.inf, "?", [1, 2], 10**400], ids=lambda bad: f"{bad!r:.9}"
)
def test_what_is_no_number_is_counted_and_told_once(bad: Any, caplog: pytest.LogCaptureFixture) -> None:
    reward = here(lambda responses: [bad] * len(responses))
    for _ in range(3):
        assert grade(reward, ["a", "culprit"]) == [0, 0]
    assert reward.errors == 6
    assert len(caplog.records) == 1
    assert "not a finite number" in caplog.text


def test_a_grader_says_its_first_problem_once(caplog: pytest.LogCaptureFixture) -> None:
    reward = MathReward(timeout=20)
    try:
        assert reward([r"\boxed{1}"] * 3, [""] * 3) == [0] * 3
    finally:
        reward.close()
    assert (reward.errors, len(caplog.records)) == (3, 1)


def test_a_reward_whose_every_check_fails_stops_the_run() -> None:
    reward = here(lambda responses: 1 / 0)
    watch = FailureWatch(reward)
    grade(reward, ["a", "b"])
    with pytest.raises(InputError, match=r"every check of FunctionReward failed, 2 of responses.*ZeroDivisionError"):
        watch.end(2, "responses")
    watch.begin()
    score(reward, ["a"], [""])
    watch.end(2, "responses")  # one of two


def test_a_sum_is_watched_part_by_part() -> None:
    reward = WeightedRewards({"right": LastAnswerReward(), "broken": here(lambda responses: None)})
    watch = FailureWatch(reward)
    assert grade(reward, ["2", "4"]) == [1, 1]
    assert reward.errors == 2
    with pytest.raises(InputError, match="FunctionReward failed"):
        watch.end(2, "responses")


def test_a_judge_that_is_no_component_is_named() -> None:
    reward = LastAnswerReward()
    reward.solved_by = "x"
    with pytest.raises(InputError, match=r"judged by 'x' .solved_by., which is none of its components: it has none"):
        grade(reward, ["2", "4"])


def test_weighted_rewards_keep_their_parts_and_say_who_judges() -> None:
    parts = {"right": LastAnswerReward(), "format": FormatReward(r"\d+"), "long": OverlongPenalty(8, 4)}
    reward = WeightedRewards(parts, {"format": 0.5, "long": 2.0}, solved_by="right")
    scores = grade_answers(reward, QUESTIONS, ["2", "x>4"], [5, 7], [True, True])
    assert scores.components == {"right": [1, 1], "format": [1, 0], "long": [-0.25, -0.75]}
    assert scores.rewards == [1 + 0.5 - 0.5, 1 - 1.5]
    assert scores.judged == [1, 1], "a long answer is right all the same"
    cut = grade_answers(reward, QUESTIONS, ["2", "x>4"], [5, 7], [False, False])
    assert cut.rewards == [0, -0.5]
    assert cut.judged == [0, 0]
    check_success_threshold(1.0, reward)
    assert grade_answers(reward, [], [], []).components == {"right": [], "format": [], "long": []}
    with pytest.raises(InputError, match=r"\['rihgt'\] given, allowed are right"):
        WeightedRewards({"right": LastAnswerReward()}, {"rihgt": 1.0})


@pytest.mark.parametrize(("length", "penalty"), [(0, 0), (60, 0), (80, -0.5), (100, -1), (300, -1)])
def test_the_overlong_penalty_of_dapo(length: int, penalty: float) -> None:
    assert score(OverlongPenalty(100, 40), ["x"], [""], lengths=[length]) == [penalty]


def test_the_format_reward_matches_the_whole_response() -> None:
    reward = FormatReward(r".*</think>.*\\boxed\{.+\}\s*")
    assert reward(["a\nb</think>\n\\boxed{1}\n", "</think>\\boxed{}", "\\boxed{1}"], [""] * 3) == [1, 0, 0]
    with pytest.raises(InputError, match="no regular expression"):
        FormatReward("(")


def test_coroutines_run_side_by_side_and_lose_only_what_is_late_or_wrong() -> None:
    reward = FunctionReward(echo_late, timeout=0.6)
    score(reward, ["0"], ["1"])  # its child starts
    responses, truths = ["30", "x", "500", *["30"] * 20], list(map(str, range(23)))
    values: list[float] = []
    begin = time.monotonic()
    thread = threading.Thread(target=lambda: values.extend(score(reward, responses, truths)))
    thread.start()
    thread.join()
    assert time.monotonic() - begin < 3
    assert values == [0, 0, 0, *range(3, 23)]
    assert (reward.errors, reward.timeouts) == (1, 1)

    async def inside() -> list[float]:
        return score(reward, ["0"], ["5"])

    assert asyncio.run(inside()) == [5]
    reward.isolate = False
    assert asyncio.run(inside()) == [5], "works inside a running event loop, as in a notebook"


def test_at_most_so_many_coroutines_at_a_time() -> None:
    now, most = 0, 0

    async def count(responses: list[str]) -> float:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return 1.0

    assert score(here(count, concurrency=3), ["a"] * 10, [""] * 10) == [1.0] * 10
    assert most == 3


def test_an_exception_in_time_is_one_of_its_response() -> None:
    quick = here(lambda responses: [1.0 / len(r) for r in responses], timeout=5)
    assert score(quick, ["ab", ""], ["", ""]) == [0.5, 0]
    assert (quick.timeouts, quick.errors) == (0, 1)


@pytest.mark.parametrize("changes", [{"timeout": 0}, {"timeout": math.nan}, {"concurrency": 0}])
def test_senseless_limits_of_a_function_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        FunctionReward(len, **changes)


def test_logging_of_rewards_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    score(here(lambda responses: [None]), ["a"], [""])
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_sum_cannot_judge_by_a_sum_that_judges_by_one_of_its_own() -> None:
    inner = WeightedRewards({"right": LastAnswerReward()}, solved_by="right")
    with pytest.raises(InputError, match="solved_by: inner is a sum with a solved_by of its own"):
        WeightedRewards({"inner": inner}, solved_by="inner")


def test_a_threshold_that_no_sum_reaches_is_refused_and_a_sum_of_tenths_reaches_one() -> None:
    parts = {"right": LastAnswerReward(), "form": FormatReward(".*"), "long": FormatReward(".+")}
    with pytest.raises(InputError, match=r"success_threshold: 1\.0 is not allowed; .* must be in \(0, 0\.9\]"):
        check_success_threshold(1.0, WeightedRewards(parts, {"right": 0.7, "form": 0.1, "long": 0.1}))
    tenths = WeightedRewards(parts, {"right": 0.7, "form": 0.2, "long": 0.1})
    check_success_threshold(1.0, tenths)
    check_success_threshold(0.8, WeightedRewards(parts, {"right": 0.7, "form": 0.1, "long": 0.0}))
    assert score(tenths, [">7"], ["7"]) == [1.0]
    check_success_threshold(1.0, WeightedRewards(parts, {"right": 1.0, "form": -0.5}))  # may be more than is known
