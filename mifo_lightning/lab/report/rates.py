"""How often do the report's intervals and tests err? What `simulation` measured, for the page."""

from typing import NamedTuple

from mifo_lightning.lab.report.statistics import Design

VARIANCES = (0, 1, 4)
"""Of what base, seed and run do to an arm, each."""
FAILED, DEPTH = 1 / 7, 5.0
"""Where runs fail: the share that does, and how much lower it ends."""
ARMS = 13
"""Beside the reference, as on the largest page."""
DESIGNS: tuple[tuple[Design, int, int], ...] = (("crossed", 3, 5), ("crossed", 10, 3), ("nested", 12, 1))
"""Bases and seeds of the grids that stand for a design."""


class Range(NamedTuple):
    """The lowest and the highest rate over cases."""

    low: float
    high: float


MEASURED: dict[tuple[Design, int, bool], dict[str, Range]] = {
    ("crossed", 3, False): {"differences": Range(0.944, 0.988), "means": Range(0.935, 0.986), "alarms": Range(0, 0)},
    ("crossed", 3, True): {"differences": Range(0.977, 0.990), "means": Range(0.972, 0.988), "alarms": Range(0, 0)},
    ("crossed", 10, False): {
        "differences": Range(0.927, 0.988),
        "means": Range(0.929, 0.989),
        "alarms": Range(0.003, 0.168),
    },
    ("crossed", 10, True): {
        "differences": Range(0.943, 0.992),
        "means": Range(0.943, 0.984),
        "alarms": Range(0.000, 0.058),
    },
    ("nested", 12, False): {
        "differences": Range(0.941, 0.957),
        "means": Range(0.947, 0.956),
        "alarms": Range(0.015, 0.040),
    },
    ("nested", 12, True): {
        "differences": Range(0.944, 0.957),
        "means": Range(0.894, 0.953),
        "alarms": Range(0.015, 0.045),
    },
}
"""What the simulation printed, by design, its number of bases and whether runs fail; `test_simulated_rates` holds it.

Many bases that share few seeds keep no level where seeds matter: a grid of that kind is refused, a page of one says it.
"""
