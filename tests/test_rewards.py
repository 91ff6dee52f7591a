"""Rewards in this process: the last answer compared, and the guard around any reward."""

import math
import random
import signal
from collections.abc import Callable

import numpy as np
import pytest

from mifo_lightning.common.errors import InputError
from mifo_lightning.rewards.base import Reward
from mifo_lightning.rewards.last_answer import LastAnswerReward
from mifo_lightning.rewards.scoring import score


@pytest.mark.parametrize(
    ("response", "truth", "expected"),
    [
        ("907050>0579", "0579", 1),
        ("907050>579", "0579", 0),
        ("0579", "0579", 1),
        ("0579>1111", "0579", 0),
        ("1>2> 0579 \n", " 0579", 1),
        ("0579>", "0579", 0),
        ("", "0579", 0),
    ],
)
def test_last_answer_compares_characters(response: str, truth: str, expected: float) -> None:
    assert LastAnswerReward()([response, truth], [truth, truth]) == [expected, 1]


class Fixed(Reward):
    """Returns the values it was made with, one for each response, or what a function of the batch says."""

    isolate = False

    def __init__(self, answer: Callable[[list[str]], object]) -> None:
        self.answer = answer
        self.calls: list[list[str]] = []

    def __call__(self, responses: list[str], truths: list[str]) -> list[float]:
        self.calls.append(responses)
        return self.answer(responses)  # type: ignore[return-value]


def test_legal_values_pass_unchanged_in_one_call() -> None:
    reward = Fixed(lambda batch: [0, 1, True, 0.25, np.float32(0.5), np.array(0.75)])
    scores = score(reward, list("abcdef"), list("abcdef"))
    assert scores == [0.0, 1.0, 1.0, 0.25, 0.5, 0.75]
    assert all(type(value) is float for value in scores)
    assert (reward.errors, len(reward.calls)) == (0, 1)
    assert score(Fixed(lambda batch: np.array([0.5, 1.0])), ["a", "b"], ["a", "b"]) == [0.5, 1.0]


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, np.float32("nan"), None, "right", [1.0, 1.0], ValueError("x")]
)
def test_illegal_values_are_wrong_and_counted(bad: object, caplog: pytest.LogCaptureFixture) -> None:
    reward = Fixed(lambda batch: [1.0, bad, 0.5])
    assert score(reward, ["a", "culprit", "c"], ["", "", ""]) == [1.0, 0.0, 0.5]
    assert reward.errors == 1
    assert "culprit" in caplog.text


def test_an_exception_costs_only_the_culprit_its_score() -> None:
    draw = random.Random(1)
    for _ in range(20):
        batch = [draw.choice(["12", "-3", "no number"]) for _ in range(draw.randrange(1, 9))]
        reward = Fixed(lambda responses: [float(int(text) > 0) for text in responses])
        assert score(reward, batch, batch) == [float(text == "12") for text in batch]
        assert reward.errors == batch.count("no number")


@pytest.mark.parametrize("length", [0, 1, 4])
def test_a_wrong_number_of_values_never_shifts_scores(length: int) -> None:
    reward = Fixed(lambda batch: [1.0] * (length if len(batch) == 3 else len(batch)))
    assert score(reward, ["a", "b", "c"], ["", "", ""]) == [1.0, 1.0, 1.0]
    always = Fixed(lambda batch: [1.0] * (len(batch) + 1))
    assert score(always, ["a", "b"], ["", ""]) == [0.0, 0.0]
    assert always.errors == 2


def test_no_responses_no_call() -> None:
    reward = Fixed(lambda batch: 1 / 0)
    assert score(reward, [], []) == []
    assert reward.calls == []


@pytest.mark.parametrize("kind", [InputError, KeyboardInterrupt])
def test_what_must_stop_the_run_is_let_through(kind: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda signum: signal.default_int_handler)  # whatever runs the tests

    def stop(batch: list[str]) -> object:
        raise kind("stop")

    with pytest.raises(kind):
        score(Fixed(stop), ["a", "b"], ["", ""])
