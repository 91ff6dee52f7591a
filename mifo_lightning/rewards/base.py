"""The contract of a reward; the one place that calls it is `rewards.scoring`.

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

Code of the user's, in a subclass of `Reward` or a function, runs in a child process (`rewards.isolation`), so that it
can hang, exit and crash without harm.
"""

import inspect
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from mifo_lightning.common.errors import InputError

log = logging.getLogger(__name__)

Context = Mapping[str, Sequence[Any]]

KINDS = 8  # of failures that are printed and counted apart


class Reward(ABC):
    """Scores responses against ground truths; subclass it and give the `class_path` to use your own.

    A subclass may raise and may return illegal values: training calls it through `scoring.score`, which counts either
    as failed.

    Attributes:
        failed: What a check that failed scores, and the most that a response that did not end by itself gets. Set it
            below every legal score if those are negative.
        best: The highest legal score, for the check of `success_threshold`.
        errors: Checks so far that failed (an exception or an illegal value) and therefore scored `failed`.
        timeouts: Checks so far that took longer than allowed and therefore scored `failed`.
        first_problem: What the first of these was; the only one that is printed.
        components: Scores of the last call by name, where the reward is a sum; they are logged one by one.
        solved_by: The component that `success_threshold` judges; None: the reward itself.
        isolate: Whether calls run in a child process, which is killed when one takes too long. A subclass does unless
            it says `isolate = False` itself: no time limit holds then, and its `os._exit` ends the run.
        call_timeout: Seconds that one call may take in its child process, with all responses of an RL step on this
            rank; None waits for ever. After a call that failed the responses are scored one by one, in as much time
            again, each in a tenth of it or a second.
        checks: Responses so far that were checked.
        causes: How often each kind of failure came since it was last summed up.
    """

    failed: float = 0.0
    best: float = math.inf
    errors: int = 0
    timeouts: int = 0
    first_problem: str | None = None
    components: Mapping[str, list[float]] = {}
    solved_by: str | None = None
    isolate: bool = True
    call_timeout: float | None = 600.0
    checks: int = 0
    causes: Mapping[str, int] = {}

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Trust is not inherited."""
        super().__init_subclass__(**keywords)
        cls.isolate = vars(cls).get("isolate", True)

    @abstractmethod
    def __call__(self, responses: list[str], truths: list[str], *args: Any, **context: Any) -> list[float]:
        """One finite score for each response, in order; a subclass declares what it wants of this module's table."""

    def check_truth(self, truth: str, columns: Mapping[str, Any]) -> None:  # noqa: B027  # most refuse none
        """Raise an InputError for a truth that no response can meet, or that every one does.

        Asked of every row as it is read, on all ranks alike, in the training process.

        Args:
            truth: The right answer.
            columns: Further columns of the row.
        """

    @property
    def parts(self) -> list["Reward"]:
        """The rewards that count their own failures: this one, unless it is a sum."""
        return [self]

    @property
    def judge(self) -> "Reward":
        """The reward that `success_threshold` judges: this one, unless `solved_by` names a component."""
        return self

    def fail(self, problem: str, response: str, timeout: bool = False) -> float:
        """Count one failed check; the first of a kind (what stands before a colon) is printed."""
        self.timeouts += timeout
        self.errors += not timeout
        problem = f"{problem:.200}"
        self.first_problem = self.first_problem or problem
        kind = problem.partition(":")[0]
        if kind not in self.causes and len(self.causes) >= KINDS:
            kind = "others"
        elif kind not in self.causes:
            log.warning(
                "%s: %s; scored %g: %.80r. Further failures of this kind are only counted: rollout/reward_errors, "
                "reward_timeouts",
                type(self).__name__,
                problem,
                self.failed,
                response[-80:],
            )
        self.causes = {**self.causes, kind: self.causes.get(kind, 0) + 1}
        return self.failed

    def close(self) -> None:
        """Release processes and files; may be called twice, and a later check may acquire them again.

        Where calls run in a child process, so does this when it ends.
        """
        if "isolation" in vars(self):
            vars(self)["isolation"].child.close()


def checked_timeout(seconds: float | None, name: str) -> float | None:
    """A time limit as a configuration gives it; an InputError where there is no such limit."""
    if seconds is not None and not seconds > 0:
        raise InputError(f"{name}: timeout is {seconds}, allowed is a number of seconds above 0, or null")
    return seconds


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
