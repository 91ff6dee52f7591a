"""Was there a fall, how much of it came back, is an edit better than going back on a line? Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mifo_lightning.lab.report.statistics import Interval, Scores, interval

ERRORS = 2.0
"""Standard errors that a fall must exceed, over questions and over bases, for a part of it to have come back."""


@dataclass(frozen=True)
class Share:
    """A share of correct answers, in [0, 1], and of how many questions."""

    value: float
    questions: int

    @property
    def variance(self) -> float:
        """Of its sampling, binomial."""
        return self.value * (1 - self.value) / self.questions


@dataclass(frozen=True)
class Fall:
    """What was lost from `peak` to `end` on one base.

    The error takes both as independent. They answer the same questions with the same random numbers, so that the true
    one is smaller, and a fall is claimed too seldom rather than too often.
    """

    peak: Share
    end: Share

    @property
    def size(self) -> float:
        """What was lost."""
        return self.peak.value - self.end.value

    @property
    def error(self) -> float:
        """Its standard error over questions."""
        return (self.peak.variance + self.end.variance) ** 0.5

    @property
    def real(self) -> bool:
        """Whether it exceeds its noise."""
        return self.size > ERRORS * self.error

    def restored(self, after: float) -> float:
        """R = (after - end) / (peak - end); NaN where there is no fall to restore."""
        return (after - self.end.value) / self.size if self.real else float("nan")


def fall_over_bases(falls: Sequence[Fall]) -> tuple[Interval, bool]:
    """Their mean with its interval over bases, and whether it exceeds its noise; one base cannot show that."""
    found = interval(units([fall.size for fall in falls]))
    return found, bool(found.mean > ERRORS * found.error)


def at_equal(path: Sequence[tuple[float, float]], wanted: float) -> float:
    """The second value where the first is `wanted`, along a path of straight pieces through (first, second).

    Where the path passes several times the mean of all passes; where it never does, its point nearest to `wanted`.
    """
    passes = []
    for (x, y), (next_x, next_y) in pairwise(path):
        if min(x, next_x) <= wanted <= max(x, next_x):
            passes.append(y if x == next_x else y + (next_y - y) * (wanted - x) / (next_x - x))
    if passes:
        return float(np.mean(passes))
    return min(path, key=lambda point: abs(point[0] - wanted))[1]


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other point equals or beats in both values, by the first; of equal ones, one."""
    best, front = -np.inf, []
    for x, y in sorted(set(points), key=lambda point: (-point[0], -point[1])):
        if y > best:
            front.append((x, y))
            best = y
    return front[::-1]


def units(values: Sequence[float]) -> Scores:
    """One value a base as scores [bases, 1]."""
    return np.array(values, dtype=np.float64)[:, None]
