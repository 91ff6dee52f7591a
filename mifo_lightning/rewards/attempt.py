"""One call of a reward, whatever it does: finite numbers and named failures instead of results and exceptions.

This file is part of the child process of user code (`rewards.worker`), so it must not import anything heavy.
"""

import copy
import math
import reprlib
import signal
from collections.abc import Mapping, Set
from itertools import islice
from typing import Any, NamedTuple

from mifo_lightning.common.errors import InputError
from mifo_lightning.rewards.base import Context, Reward


class Failure(NamedTuple):
    """A check that failed: why, and whether it took too long. What stands before a colon is the kind."""

    problem: str
    timeout: bool = False


class Outcome(NamedTuple):
    """What a call gave for N responses: N scores or failures, and N scores of each component by name."""

    values: list[float | Failure]
    components: dict[str, list[float]]


def attempt(reward: Reward, responses: list[str], truths: list[str], wanted: Context) -> Outcome | Failure:
    """Call a reward in this process with copies of all lists, which it may change or keep.

    Args:
        reward: Scores.
        responses: N texts.
        truths: N ground truths.
        wanted: What it declares besides, N entries each.

    Returns:
        The outcome; a failure where the whole call failed.

    Raises:
        InputError: The reward itself raised it.
        KeyboardInterrupt: Ctrl-C.
    """
    responses, truths, wanted = copy.deepcopy((responses, truths, dict(wanted)))
    n = len(responses)
    try:
        result = reward(responses, truths, **wanted)
        values = _listed(result, n)
        components = {str(name): [float(v) for v in _listed(part, n)] for name, part in reward.components.items()}
        if not all(math.isfinite(v) for part in components.values() for v in part):
            raise ValueError("a component is not a finite number")
        return Outcome([_legal(value) for value in values], components)
    except InputError:
        raise
    except BaseException as error:
        # without Python's own handler no Ctrl-C raises: then this is the reward's
        handled = isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if handled or not isinstance(error, (Exception, SystemExit, KeyboardInterrupt)):
            raise
        return failure(error)


def _listed(result: Any, n: int) -> list[Any]:
    """The n values of a list, array or generator, in order."""
    if isinstance(result, (str, bytes, Mapping, Set)) or not hasattr(result, "__iter__"):
        raise TypeError(f"returned {reprlib.repr(result)}, allowed is a list of numbers")
    values = list(islice(result, n + 1))
    if len(values) != n:
        raise ValueError(f"returned {'more' if len(values) > n else len(values)} values for {n} responses")
    return values


def _legal(value: Any) -> float | Failure:
    if isinstance(value, BaseException):
        return failure(value)
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(_detached(value))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    return number if math.isfinite(number) else Failure(f"not a finite number: returned {reprlib.repr(value)}")


def _detached(value: Any) -> Any:
    """A tensor without its gradient, which torch warns of; anything else as it is."""
    return value.detach() if hasattr(value, "detach") else value


def failure(error: BaseException) -> Failure:
    """A failure named after an exception."""
    try:
        said = f": {error}"
    except Exception:  # of a reward's own class
        said = ""
    return Failure(f"{type(error).__name__}{said}", isinstance(error, TimeoutError))
