"""What a report is made of: questions with the sentences, tables and pictures that answer them; how numbers read."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from experiments.report.figures import Key
from experiments.report.results import Ablation
from experiments.report.statistics import Comparison, Interval, Scores, interval


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first column names the row."""

    caption: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Figure:
    """An SVG element and the sentence under it."""

    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A question and what answers it.

    `panels` are small pictures, one per arm, to which the legend belongs if there are any; `folded` tables are shown on
    demand; tables are of numbers or of running `prose`.
    """

    question: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    legend: list[Key] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    panels: list[Figure] = field(default_factory=list)
    folded: list[Table] = field(default_factory=list)
    prose: bool = False


def absent(question: str, monitor: str) -> Section:
    """The section of a question that no run recorded anything about."""
    return Section(question, [f"Not recorded: the monitor {monitor} would show it."])


def intervals(ablation: Ablation, scores: Mapping[str, Scores]) -> dict[str, Interval]:
    """The interval of every arm."""
    return {arm: interval(values, ablation.design) for arm, values in scores.items()}


def mean(values: Scores) -> str:
    """The mean of what is there."""
    found = values[np.isfinite(values)]
    return number(float(found.mean()) if found.size else np.nan)


def number(value: float) -> str:
    """Three decimals, more for small numbers; a dash where there is none."""
    if not np.isfinite(value):
        return "-"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.2g}"


def large(value: float) -> str:
    """Three digits and a unit: 1.23 M."""
    if not np.isfinite(value):
        return "-"
    power = min(4, max(0, int(np.floor(np.log10(max(abs(value), 1)) / 3 + 1e-9))))
    return f"{value / 1000**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}".rstrip()


def bracketed(found: Interval, sign: str = "") -> str:
    """Mean [low, high], or the mean alone where one run has no interval."""
    if not np.isfinite(found.mean):
        return "-"
    if not np.isfinite(found.low):
        return f"{found.mean:{sign}.3f} [-]"
    return f"{found.mean:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def difference(comparison: Comparison) -> str:
    """A signed difference and its interval."""
    return bracketed(comparison.difference, "+")


def probability(p: float) -> str:
    """Three decimals."""
    return "-" if not np.isfinite(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
