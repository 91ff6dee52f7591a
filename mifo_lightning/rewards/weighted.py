"""Several rewards as one sum, each logged by name; and two that make sense in such a sum."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mifo_lightning.common.errors import InputError
from mifo_lightning.rewards.base import Reward, checked_timeout
from mifo_lightning.rewards.isolation import release
from mifo_lightning.rewards.scoring import score


class WeightedRewards(Reward):
    """The weighted sum of several rewards; each is logged as `rollout/reward/<name>`, in evaluation too.

    Args:
        rewards: By name.
        weights: By the same names; 1 where none is given.
        solved_by: The name of the reward that `success_threshold` judges, so that a penalty or a bonus does not change
            which answers are correct; null judges the sum.
    """

    isolate = False  # its parts are, one by one

    def __init__(
        self, rewards: dict[str, Reward], weights: dict[str, float] | None = None, solved_by: str | None = None
    ) -> None:
        weights = weights or {}
        named = [*weights, *([] if solved_by is None else [solved_by])]
        unknown = [name for name in named if name not in rewards]
        if not rewards or unknown:
            raise InputError(f"WeightedRewards: {unknown or rewards} given, allowed are {', '.join(rewards) or 'some'}")
        if not all(math.isfinite(weight) for weight in weights.values()):
            raise InputError(f"WeightedRewards: weights are {weights}, allowed are finite numbers")
        if solved_by is not None and rewards[solved_by].solved_by is not None:
            raise InputError(
                f"WeightedRewards: solved_by: {solved_by} is a sum with a solved_by of its own; put its rewards into "
                "this sum"
            )
        self.rewards, self.weights = rewards, {name: weights.get(name, 1.0) for name in rewards}
        self.solved_by = solved_by
        self.failed = sum(self.weights[name] * reward.failed for name, reward in rewards.items())
        weighed = [(weight, rewards[name]) for name, weight in self.weights.items() if weight]
        # of a negative weight the highest score is that of the lowest, which nobody says
        best = math.inf if min(self.weights.values()) < 0 else math.fsum(w * part.best for w, part in weighed)
        self.best = round(best, 9)  # 0.7 + 0.1 is a little less than 0.8
        self.components = {name: [] for name in rewards}

    def __call__(self, responses: list[str], truths: list[str], **context: Sequence[Any]) -> list[float]:
        self.components = {name: score(reward, responses, truths, **context) for name, reward in self.rewards.items()}
        self.errors = sum(part.errors for part in self.parts)
        self.timeouts = sum(part.timeouts for part in self.parts)
        return [
            math.fsum(weight * value for weight, value in zip(self.weights.values(), values, strict=True))
            for values in zip(*self.components.values(), strict=True)
        ]

    def check_truth(self, truth: str, columns: Mapping[str, Any]) -> None:
        """As each of the rewards does."""
        for reward in self.rewards.values():
            reward.check_truth(truth, columns)

    @property
    def parts(self) -> list[Reward]:
        """All that count failures of their own."""
        return [part for reward in self.rewards.values() for part in reward.parts]

    @property
    def judge(self) -> Reward:
        """The reward that `solved_by` names."""
        return self if self.solved_by is None else self.rewards[self.solved_by].judge

    def close(self) -> None:
        """Close all."""
        for reward in self.rewards.values():
            release(reward)


class FormatReward(Reward):
    """1 if the whole response matches a regular expression, else 0; a dot matches line ends too.

    Args:
        pattern: For example `.*</think>.*\\boxed{.+}.*`.
        timeout: Seconds for all responses of a call, since nested repetitions can take for ever; null has no limit.
    """

    best = 1.0

    def __init__(self, pattern: str, timeout: float | None = 10.0) -> None:
        self.call_timeout = checked_timeout(timeout, "FormatReward")
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise InputError(f"FormatReward: pattern is {pattern!r}, no regular expression: {error}") from error

    def __call__(self, responses: list[str], truths: list[str]) -> list[float]:
        return [float(self.pattern.fullmatch(response) is not None) for response in responses]


class OverlongPenalty(Reward):
    """0 to a length of `longest - cache` tokens, from there falling to -1 at `longest` (DAPO's soft overlong penalty).

    Args:
        longest: Tokens from which on the penalty is -1; usually `model.rollout.sampling.max_new_tokens`.
        cache: Tokens before it in which the penalty grows.
    """

    best = 0.0
    isolate = False

    def __init__(self, longest: int, cache: int) -> None:
        if not 0 < cache <= longest:
            raise InputError(f"OverlongPenalty: cache is {cache}, allowed is 1 to longest, which is {longest}")
        self.longest, self.cache = longest, cache

    def __call__(self, responses: list[str], truths: list[str], lengths: list[int]) -> list[float]:
        return [-min(max((length - self.longest + self.cache) / self.cache, 0.0), 1.0) for length in lengths]
