"""How often do the report's intervals and tests err? Simulated grids in which no arm differs from another.

    python -m mifo_lightning.lab.report.simulation

A score is the sum of what base, seed and run do to its arm, normal with variances 0, 1 or 4; with failures, one run in
seven ends 5 lower. The 13 arms are compared with one reference, as on the largest page.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np

from mifo_lightning.lab.report.rates import ARMS, DEPTH, DESIGNS, FAILED, VARIANCES, Range
from mifo_lightning.lab.report.statistics import ALPHA, Design, Scores, holm, mean_error, probability, t_probability

TRIALS = 400
CHUNK = 100
"""Grids whose flips are in memory at once."""


class Rates(NamedTuple):
    """Shares of simulated grids: intervals of differences and of means with the truth in them, and false alarms.

    `alarms` is the share of grids in which some of the 13 differences is called significant, `single` that of single
    comparisons, such as a primary contrast.
    """

    differences: float
    means: float
    alarms: float
    single: float


class Case(NamedTuple):
    """What scores vary by, and whether runs fail."""

    base: float
    seed: float
    run: float
    failures: bool


def cases(failures: bool) -> Iterator[Case]:
    """Every combination of variances but that in which nothing varies."""
    return (Case(b, s, r, failures) for b, s, r in product(VARIANCES, repeat=3) if b + s + r)


def simulate(case: Case, design: Design, bases: int, seeds: int, trials: int) -> Scores:
    """Scores [trials, 1 + ARMS, bases, seeds] of grids without a true difference; their true mean is 0."""
    rng = np.random.default_rng(0)
    shape = (trials, 1 + ARMS)
    scores = np.sqrt(case.base) * rng.normal(size=(*shape, bases, 1))
    scores = scores + np.sqrt(case.seed) * rng.normal(size=(*shape, 1 if design == "crossed" else bases, seeds))
    scores += np.sqrt(case.run) * rng.normal(size=(*shape, bases, seeds))
    if case.failures:
        scores -= DEPTH * ((rng.random(scores.shape) < FAILED) - FAILED)
    return scores


def rates(case: Case, design: Design, bases: int, seeds: int, trials: int = TRIALS) -> Rates:
    """How often the report errs on grids of this design."""
    scores = simulate(case, design, bases, seeds, trials)
    differences = scores[:, 1:] - scores[:, :1]
    differ, mean = (float((t_probability(*mean_error(x, design)) >= ALPHA).mean()) for x in (differences, scores))
    p = np.concatenate([probability(part, design) for part in np.array_split(differences, -(-trials // CHUNK))])
    return Rates(differ, mean, float((holm(p) < ALPHA).any(-1).mean()), float((p < ALPHA).mean()))


def ranges(failures: bool, design: Design, bases: int, seeds: int, trials: int = TRIALS) -> dict[str, Range]:
    """The lowest and the highest of each rate over all cases."""
    found = [rates(case, design, bases, seeds, trials)._asdict() for case in cases(failures)]
    return {name: Range(min(r[name] for r in found), max(r[name] for r in found)) for name in Rates._fields}


def main() -> None:
    """Print the rates of the designs that pages have."""
    print("design        failures  differences   means         alarms        single")
    for design, bases, seeds in DESIGNS:
        for failures in (False, True):
            found = ranges(failures, design, bases, seeds)
            shown = "   ".join(f"{r.low:.3f}-{r.high:.3f}" for r in found.values())
            print(f"{design:8}{bases:3}x{seeds}  {failures!s:8}  {shown}")


if __name__ == "__main__":
    main()
