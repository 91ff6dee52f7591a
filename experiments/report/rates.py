"""How often do the report's intervals and tests err? What `experiments.report.simulation` measured, for the page."""

from typing import NamedTuple

from experiments.report.statistics import Design

VARIANCES = (0, 1, 4)
"""Of what base, seed and run do to an arm, each."""
FAILED, DEPTH = 1 / 7, 5.0
"""Where runs fail: the share that does, and how much lower it ends."""
ARMS = 13
"""Beside the reference, as on the largest page."""
DESIGNS: tuple[tuple[Design, int, int], ...] = (("crossed", 3, 5), ("nested", 12, 1))
"""Bases and seeds of the grids that stand for a design."""


class Range(NamedTuple):
    """The lowest and the highest rate over cases."""

    low: float
    high: float


MEASURED: dict[tuple[Design, bool], dict[str, Range]] = {
    ("crossed", False): {"differences": Range(0.941, 0.990), "means": Range(0.938, 0.988), "alarms": Range(0, 0)},
    ("crossed", True): {"differences": Range(0.975, 0.988), "means": Range(0.973, 0.989), "alarms": Range(0, 0)},
    ("nested", False): {
        "differences": Range(0.941, 0.953),
        "means": Range(0.948, 0.953),
        "alarms": Range(0.025, 0.038),
    },
    ("nested", True): {"differences": Range(0.946, 0.955), "means": Range(0.893, 0.950), "alarms": Range(0.013, 0.041)},
}
"""What the simulation printed, by design and whether runs fail; `test_simulated_rates` holds it."""
