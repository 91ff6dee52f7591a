"""Was there a fall, how much of it came back, is an edit better than going back on a line? Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mifo_lightning.lab.report.statistics import Interval, Scores, interval

ERRORS = 2.0
"""Standard errors that a fall must exceed, over questions and over bases, for there to be one."""
RATIO_ERRORS = 4.0
"""Standard errors over bases that a fall must exceed for a share of it to have an interval: it is a denominator."""


@dataclass(frozen=True)
class Share:
    """A share of correct answers, in [0, 1], and of how many different questions: orderings of one hand count once."""

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


def fall_over_bases(falls: Sequence[Fall]) -> tuple[Interval, bool]:
    """Their mean with its interval over bases, and whether it exceeds its noise; one base cannot show that."""
    found = interval(units([fall.size for fall in falls]))
    return found, bool(found.mean > ERRORS * found.error)


def share_of(parts: Scores, wholes: Scores) -> Interval:
    """mean(parts) / mean(wholes) over bases, each [bases, 1], with its jackknife error; of one base the ratio alone.

    Not the mean of ratios: what is noise in both part and whole of a base would make that one larger than it is.
    """
    ratio, n = float(parts.mean() / wholes.mean()), len(parts)
    if n < 2:
        return Interval(ratio)
    without = (parts.sum() - parts[:, 0]) / (wholes.sum() - wholes[:, 0])
    return Interval(ratio, float(((n - 1) / n * np.square(without - without.mean()).sum()) ** 0.5), n - 1)


class Read(NamedTuple):
    """Values read off a path where it passes, or that of its nearest point."""

    passes: list[float]
    met: bool
    """Whether the path passes there."""
    at: float
    """Where it was read: where it was wanted, or the nearest point."""

    @property
    def value(self) -> float:
        """The highest: what going back on the path can reach."""
        return max(self.passes)

    def fair(self, x: float, y: float) -> bool:
        """Whether (x, y) may be compared with it: read at x, or of a point that is better or worse in both."""
        return self.met or (x - self.at) * (y - self.value) >= 0


def at_equal(path: Sequence[tuple[float, float]], wanted: float) -> Read:
    """The second value where the first is `wanted`, along a path of straight pieces through (first, second).

    Where it never passes, its point nearest to `wanted`.
    """
    passes = [y for x, y in path if x == wanted]
    for (x, y), (next_x, next_y) in pairwise(path):
        if min(x, next_x) < wanted < max(x, next_x):
            passes.append(y + (next_y - y) * (wanted - x) / (next_x - x))
    if passes:
        return Read(passes, True, wanted)
    at, value = min(path, key=lambda point: abs(point[0] - wanted))
    return Read([value], False, at)


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
