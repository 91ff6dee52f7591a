"""The one place that calls a reward: whatever that does, there is one finite score for each response."""

import math
import time
from collections.abc import Sequence
from typing import Any

from mifo_lightning.rewards.attempt import Failure, Outcome
from mifo_lightning.rewards.base import Context, Reward, pick
from mifo_lightning.rewards.isolation import run

ALONE, LEAST = 0.1, 1.0  # x the time limit of a call, but not below so many seconds: the limit of a single response


def score(reward: Reward, responses: list[str], truths: list[str], **context: Sequence[Any]) -> list[float]:
    """Finite scores, one for each response, whatever `reward` does.

    After a call that failed (an exception, a result of the wrong length, a hang, the death of its process) the
    responses are scored one by one, so that only the culprit loses its score. What still fails, and every value that is
    not a finite number (None, NaN, an exception in the place of a number), scores `reward.failed` and is counted.

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
    outcome = run(reward, responses, truths, wanted, reward.call_timeout)
    if isinstance(outcome, Failure):
        outcome = _one_by_one(reward, responses, truths, wanted, outcome)
    reward.components = outcome.components
    reward.checks += len(responses)
    return [
        reward.fail(value.problem, response, value.timeout) if isinstance(value, Failure) else value
        for value, response in zip(outcome.values, responses, strict=True)
    ]


def _one_by_one(reward: Reward, responses: list[str], truths: list[str], wanted: Context, failure: Failure) -> Outcome:
    """The outcome of as many calls as there are responses, which share the time limit of one call."""
    if len(responses) == 1:
        return Outcome([failure], {name: [reward.failed] for name in reward.components})
    limit = reward.call_timeout
    end = math.inf if limit is None else time.monotonic() + limit
    outcomes: list[Outcome | Failure] = []
    for response, truth, *rest in zip(responses, truths, *wanted.values(), strict=True):
        if time.monotonic() >= end:
            outcomes.append(failure)
            continue
        alone = {name: [value] for name, value in zip(wanted, rest, strict=True)}
        each = None if limit is None else min(max(ALONE * limit, LEAST), end - time.monotonic())
        outcomes.append(run(reward, [response], [truth], alone, each))
    names = dict.fromkeys(name for o in outcomes if isinstance(o, Outcome) for name in o.components)
    return Outcome(
        [o if isinstance(o, Failure) else o.values[0] for o in outcomes],
        {
            name: [reward.failed if isinstance(o, Failure) else o.components[name][0] for o in outcomes]
            for name in names or reward.components
        },
    )
