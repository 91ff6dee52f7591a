"""The contract of a reward, and the one place where training and evaluation call it: `score`."""

import logging
import math
from abc import ABC, abstractmethod
from typing import SupportsFloat

from mifo_lightning.errors import InputError

log = logging.getLogger(__name__)


class Reward(ABC):
    """Scores responses against ground truths; subclass it and give the `class_path` to use your own.

    A subclass may raise and may return illegal values: training calls it through `score`, which counts either
    as wrong.

    Attributes:
        errors: Checks so far that failed (an exception or an illegal value) and therefore scored 0.
        timeouts: Checks so far that took longer than allowed and therefore scored 0.
    """

    errors: int = 0
    timeouts: int = 0

    @abstractmethod
    def __call__(self, responses: list[str], truths: list[str]) -> list[float]:
        """One score in [0, 1] for each response, in order; `responses` and `truths` are of equal length."""

    def close(self) -> None:  # noqa: B027 - most rewards hold nothing to release
        """Release processes and files; may be called twice, and a later check may acquire them again."""


def answer_text(response: str, answer_after: str | None) -> str:
    """What follows the last `answer_after` in `response`; all of it if the marker is None or absent."""
    return response.rpartition(answer_after)[2] if answer_after else response


def score(reward: Reward, responses: list[str], truths: list[str]) -> list[float]:
    """Finite scores in [0, 1], one for each response, whatever `reward` does.

    After an exception or a result of the wrong length the responses are scored one by one, so that only the
    culprit loses its score. What still fails, and every value that is not a number in [0, 1], scores 0 and is
    added to `reward.errors`.

    Raises:
        InputError: The reward itself raised it: it cannot work at all, and a run with zeros would hide that.
    """
    if not responses:
        return []
    try:
        values = list(reward(responses, truths))
        if len(values) != len(responses):
            raise ValueError(f"returned {len(values)} values for {len(responses)} responses")
    except InputError:
        raise
    except Exception as error:
        if len(responses) > 1:
            return [score(reward, [one], [truth])[0] for one, truth in zip(responses, truths, strict=True)]
        return [_wrong(reward, f"{type(error).__name__}: {error}", responses[0])]
    return [_legal(reward, value, response) for value, response in zip(values, responses, strict=True)]


def _legal(reward: Reward, value: SupportsFloat, response: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if 0.0 <= number <= 1.0:
        return number
    return _wrong(reward, f"returned {value!r}, not a number in [0, 1]", response)


def _wrong(reward: Reward, problem: str, response: str) -> float:
    reward.errors += 1
    log.warning("%s: %.200s; scored 0: %.80r", type(reward).__name__, problem, response)
    return 0.0
