"""Is an arm ahead of another, or is it chance? Student t over bases and exact sign flips of bases, Holm's correction.

Scores of an arm are float64 [..., bases, seeds]. The unit is the base: what two methods differ by varies more from base
to base than from run to run, so that runs on one base are one observation of it. All functions are pure and draw no
random numbers up to `EXACT` bases: an arm's numbers do not depend on which other arms there are, or on their order.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

Scores = NDArray[np.float64]
Design = Literal["crossed", "nested"]
Name = TypeVar("Name", bound=Hashable)

LEVEL = 0.95
ALPHA = 1 - LEVEL
POWER = 0.8
EXACT = 16
"""Up to this many bases every assignment of signs is enumerated (65,536), above it as many are drawn."""


@dataclass(frozen=True)
class Interval:
    """A mean, its standard error and the error's degrees of freedom, in the unit of the scores; NaN where undefined."""

    mean: float
    error: float = float("nan")
    df: float = float("nan")

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval, by Student's t; 0 where nothing varies."""
        return float(student.ppf((1 + LEVEL) / 2, self.df) * self.error)

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.mean + self.half

    def within(self, margin: float) -> bool:
        """Whether the whole interval is nearer to 0 than `margin`; never for an undefined one."""
        return -margin < self.low and self.high < margin

    def detectable(self, comparisons: int = 1) -> float:
        """The true difference that would be found in four of five such grids, where the first of Holm's steps is this.

        That of Student's t; sign flips of few bases find a little less.
        """
        sizes = student.ppf([1 - ALPHA / comparisons / 2, POWER], self.df)
        return float(sizes.sum() * self.error)


@dataclass(frozen=True)
class Comparison:
    """Differences of an arm to another on the same base.

    `ahead` of `bases` mean differences are positive; `p` is the two-sided probability under chance, the larger one of
    Student's t and of sign flips of bases, corrected for the other comparisons of its family by Holm's method.
    """

    difference: Interval
    ahead: int
    bases: int
    p: float

    @property
    def significant(self) -> bool:
        """Whether the difference is called one; its interval then excludes 0."""
        return self.p < ALPHA


def interval(scores: Scores, design: Design = "crossed") -> Interval:
    """Mean over all cells and its error, see `mean_error`; a single cell has a mean alone.

    All NaN if a cell has no result: what a failed run would have scored is unknown.
    """
    if not scores.size or not np.isfinite(scores).all():
        return Interval(np.nan)
    return Interval(*(float(part) for part in mean_error(scores, design)))


def mean_error(scores: Scores, design: Design = "crossed") -> tuple[Scores, Scores, Scores]:
    """Means of finite scores [..., bases, seeds], their standard errors and the errors' degrees of freedom, each [...].

    `nested`: every base has seeds of its own, so that the means of the bases are independent. `crossed`: every base has
    the same seeds, and what a seed does may be common to all bases: the variance of the mean in a model with random
    effects of base and seed, (MS_base + MS_seed - MS_error) / N, with Satterthwaite's degrees of freedom, at least 1;
    where that is not positive, the larger one of MS_base and MS_seed takes its place. With one base the seeds are the
    units: the error then says nothing about other bases.
    """
    bases, seeds = scores.shape[-2:]
    mean = scores.mean((-2, -1))
    if design == "crossed" and bases > 1 and seeds > 1:
        return mean, *_random_effects(scores)
    units = scores[..., 0, :] if bases == 1 else scores.mean(-1)
    count = units.shape[-1]
    if count < 2:
        return mean, np.full(mean.shape, np.nan), np.full(mean.shape, np.nan)
    return mean, units.std(-1, ddof=1) / np.sqrt(count), np.full(mean.shape, count - 1.0)


def _random_effects(scores: Scores) -> tuple[Scores, Scores]:
    """Standard error of the mean of scores [..., bases, seeds], both more than one, and its degrees of freedom."""
    bases, seeds = scores.shape[-2:]
    by_base, by_seed = scores.mean(-1, keepdims=True), scores.mean(-2, keepdims=True)
    rest = scores - by_base - by_seed + scores.mean((-2, -1), keepdims=True)
    ms_base = seeds * by_base[..., 0].var(-1, ddof=1)
    ms_seed = bases * by_seed[..., 0, :].var(-1, ddof=1)
    free = np.array([bases - 1, seeds - 1, (bases - 1) * (seeds - 1)])
    ms_error = (rest**2).sum((-2, -1)) / free[2]
    squares = np.stack([ms_base, ms_seed, ms_error], -1)
    total = squares @ [1, 1, -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        df = np.fmax(1.0, total**2 / (squares**2 / free).sum(-1))  # where nothing varies at all: 1
    larger = squares[..., :2].argmax(-1)
    instead = total <= 0
    total = np.where(instead, squares[..., :2].max(-1), total)
    return np.sqrt(total / (bases * seeds)), np.where(instead, free[larger], df)


def t_probability(mean: Scores, error: Scores, df: Scores) -> Scores:
    """Two-sided probability of a mean this far from 0 by Student's t; 1 for 0 however sure, NaN without an error."""
    with np.errstate(divide="ignore", invalid="ignore"):
        size = np.where(mean == 0, np.where(np.isfinite(error), 0.0, np.nan), np.abs(mean) / error)
    return np.asarray(2 * student.sf(size, df))


def sign_flip(units: Scores) -> Scores:
    """Two-sided probability, [...], that the mean of units [..., n] is this far from 0 if signs were chance.

    Exact where two methods that are alike could as well have been exchanged on each base, whatever the scores'
    distribution. With n units no value below 2 / 2^n is possible.
    """
    count = units.shape[-1]
    if count <= EXACT:  # a sign may be fixed, since the opposite signs are as far from 0
        signs = np.array([(1.0, *rest) for rest in product((1.0, -1.0), repeat=count - 1)])
    else:
        drawn = np.random.default_rng(0).choice([1.0, -1.0], size=(2**EXACT, count))
        signs = np.concatenate([np.ones((1, count)), drawn])  # the observed signs are one of the possible ones
    sums = np.abs(units @ signs.T)
    return (sums >= sums[..., :1] - 1e-9 * np.abs(units).sum(-1, keepdims=True)).mean(-1)


def probability(differences: Scores, design: Design = "crossed") -> Scores:
    """The larger one of the two probabilities of differences [..., bases, seeds]: [...].

    Flips keep their level where scores are skewed, t where seeds are common to the bases.
    """
    return np.fmax(t_probability(*mean_error(differences, design)), sign_flip(differences.mean(-1)))


def holm(p: Sequence[float] | Scores) -> Scores:
    """Holm's step-down correction of probabilities [..., m] for their number; NaN stays NaN and counts as no test."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, -1, kind="stable")  # NaN sorts last
    tested = np.isfinite(values).sum(-1, keepdims=True)
    factors = np.maximum(tested - np.arange(values.shape[-1]), 1)
    stepped = np.maximum.accumulate(factors * np.take_along_axis(values, order, -1), -1).clip(max=1.0)
    corrected = np.empty_like(values)
    np.put_along_axis(corrected, order, stepped, -1)
    return corrected


def judge(differences: Mapping[Name, Scores], design: Design = "crossed") -> dict[Name, Comparison]:
    """What differences [bases, seeds] show, by name, as one family; a name with a missing cell has no comparison."""
    whole = {name: values for name, values in differences.items() if values.size and np.isfinite(values).all()}
    corrected = holm([float(probability(values, design)) for values in whole.values()])
    return {
        name: Comparison(interval(values, design), int((values.mean(-1) > 0).sum()), len(values), float(p))
        for (name, values), p in zip(whole.items(), corrected, strict=True)
    }


def bases_needed(comparisons: int) -> int:
    """With how many bases sign flips, corrected for so many comparisons, can call a difference significant at all."""
    needed = 1
    while comparisons * 2.0 ** (1 - needed) >= ALPHA:
        needed += 1
    return needed


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's correlation, ties sharing their mean rank; NaN with fewer than three pairs or one side constant."""
    pairs = np.array([(a, b) for a, b in zip(x, y, strict=True) if np.isfinite(a) and np.isfinite(b)])
    if len(pairs) < 3 or (pairs == pairs[0]).all(0).any():
        return np.nan
    x_ranks, y_ranks = (_ranks(column) - (len(pairs) + 1) / 2 for column in pairs.T)
    return float(x_ranks @ y_ranks / np.sqrt((x_ranks @ x_ranks) * (y_ranks @ y_ranks)))


def _ranks(values: Scores) -> Scores:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
