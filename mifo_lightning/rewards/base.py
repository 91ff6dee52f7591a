"""The contract of a reward, and the one place that calls it: `score`.

A reward takes `responses` and `truths` and, by keyword, whatever else it declares as a parameter; each is a list with
one entry for each response:

| parameter | entry |
|---|---|
| `prompts` | the prompt as the model saw it, a text |
| `sources` | name of the data source |
| `lengths` | tokens of the response, end of sequence included |
| `finished` | whether the response ended by itself |
| `columns` | all further columns of the row, by name |
| any other name | the row's column of that name, None where it has none |

A parameter `**context` takes all of these.
"""

import inspect
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from mifo_lightning.errors import InputError

log = logging.getLogger(__name__)

Context = Mapping[str, Sequence[Any]]


class Reward(ABC):
    """Scores responses against ground truths; subclass it and give the `class_path` to use your own.

    A subclass may raise and may return illegal values: training calls it through `score`, which counts either
    as failed.

    Attributes:
        failed: What a check that failed scores, and the most that a response that did not end by itself gets. Set it
            below every legal score if those are negative.
        best: The highest legal score, for the check of `solved_at`.
        errors: Checks so far that failed (an exception or an illegal value) and therefore scored `failed`.
        timeouts: Checks so far that took longer than allowed and therefore scored `failed`.
        first_problem: What the first of these was; the only one that is printed.
        components: Scores of the last call by name, where the reward is a sum; they are logged one by one.
        solved_by: The component that `solved_at` judges; None: the reward itself.
    """

    failed: float = 0.0
    best: float = math.inf
    errors: int = 0
    timeouts: int = 0
    first_problem: str | None = None
    components: Mapping[str, list[float]] = {}
    solved_by: str | None = None

    @abstractmethod
    def __call__(self, responses: list[str], truths: list[str], *args: Any, **context: Any) -> list[float]:
        """One finite score for each response, in order; a subclass declares what it wants of this module's table."""

    @property
    def parts(self) -> list["Reward"]:
        """The rewards that count their own failures: this one, unless it is a sum."""
        return [self]

    @property
    def judge(self) -> "Reward":
        """The reward that `solved_at` judges: this one, unless `solved_by` names a component."""
        return self

    def fail(self, problem: str, response: str, timeout: bool = False) -> float:
        """Count one failed check; the first of all is printed, the rest are counted in what is logged."""
        self.timeouts += timeout
        self.errors += not timeout
        if self.first_problem is None:
            self.first_problem = f"{problem:.200}"
            log.warning(
                "%s: %s; scored %g: %.80r. Further failures are only counted: rollout/reward_errors, reward_timeouts",
                type(self).__name__,
                self.first_problem,
                self.failed,
                response[-80:],
            )
        return self.failed

    def close(self) -> None:  # noqa: B027 - most rewards hold nothing to release
        """Release processes and files; may be called twice, and a later check may acquire them again."""


def score(reward: Reward, responses: list[str], truths: list[str], **context: Sequence[Any]) -> list[float]:
    """Finite scores, one for each response, whatever `reward` does.

    After an exception or a result of the wrong length the responses are scored one by one, so that only the
    culprit loses its score. What still fails, and every value that is not a finite number (None, NaN, an exception
    in the place of a number), scores `reward.failed` and is counted.

    Args:
        reward: Scores.
        responses: N texts.
        truths: N ground truths.
        context: What else is known, N entries each; the reward gets what it declares.

    Raises:
        InputError: The reward itself raised it, or declares what there is not: it cannot work at all, and a run with
            zeros would hide that.
    """
    if not responses:
        return []
    wanted = pick(type(reward).__call__, context, type(reward).__name__, given=3)
    try:
        values = list(reward(responses, truths, **wanted))
        if len(values) != len(responses):
            raise ValueError(f"returned {len(values)} values for {len(responses)} responses")
    except InputError:
        raise
    except Exception as error:
        if len(responses) == 1:
            return [reward.fail(f"{type(error).__name__}: {error}", responses[0])]
        singles = zip(responses, truths, *wanted.values(), strict=True)
        return [score(reward, [one], [truth], **_alone(wanted, rest))[0] for one, truth, *rest in singles]
    return [_legal(reward, value, response) for value, response in zip(values, responses, strict=True)]


def pick(function: Callable[..., Any], context: Context, name: str, given: int = 0) -> dict[str, Sequence[Any]]:
    """What of `context` the function declares.

    Args:
        function: Its signature decides.
        context: What there is, by name.
        name: What to call the function in a message.
        given: Parameters in front that are filled already, `self` among them.

    Raises:
        InputError: A parameter without a default is not in `context`.
    """
    named, everything = _parameters(function, given)
    lacking = [parameter for parameter, needed in named.items() if needed and parameter not in context]
    if lacking:
        raise InputError(f"{name} wants `{lacking[0]}`, which the rows do not have; there are {', '.join(context)}")
    return {key: value for key, value in context.items() if everything or key in named}


@lru_cache(maxsize=256)
def _parameters(function: Callable[..., Any], given: int) -> tuple[dict[str, bool], bool]:
    """Names of the parameters after the first `given`, each with whether it needs a value; and if it takes any name."""
    parameters = list(inspect.signature(function).parameters.values())
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters[given:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: p.default is p.empty for p in named}, everything


def _alone(names: Context, values: list[Any]) -> dict[str, list[Any]]:
    return {name: [value] for name, value in zip(names, values, strict=True)}


def _legal(reward: Reward, value: Any, response: str) -> float:
    if isinstance(value, Exception):
        return reward.fail(f"{type(value).__name__}: {value}", response, timeout=isinstance(value, TimeoutError))
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    return number if math.isfinite(number) else reward.fail(f"returned {value!r:.80}, not a finite number", response)
