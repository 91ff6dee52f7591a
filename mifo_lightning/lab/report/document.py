"""What is a report made of? Questions with the sentences, tables and pictures that answer them; how numbers read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mifo_lightning.lab.report.drawing import Key
from mifo_lightning.lab.report.figures import Strip
from mifo_lightning.lab.report.results import Ablation, Cell
from mifo_lightning.lab.report.statistics import Comparison, Interval, Scores, interval

Measure = Callable[[Cell], float | None]
MARKS = "Small marks are runs (their shape is the base), the diamond is the mean, the bar its 95 % interval."


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first column names the row.

    A `folded` table is shown on demand; cells are numbers or running `prose`.
    """

    caption: str
    header: list[str]
    rows: list[list[str]]
    folded: bool = False
    prose: bool = False


@dataclass(frozen=True)
class Figure:
    """An SVG element and the sentence under it."""

    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Legend:
    """What marks and lines stand for."""

    title: str
    keys: list[Key]


@dataclass(frozen=True)
class Gallery:
    """Pictures that share legends and sentences: wide, small, or one with its legends beside it; on the page only."""

    figures: list[Figure]
    legends: list[Legend] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    kind: Literal["wide", "small", "beside"] = "wide"


@dataclass(frozen=True)
class Section:
    """A question, the sentences that answer it at once, others that explain, and tables and pictures in order.

    Or the `monitor` that would answer it, where no run recorded anything about it.
    """

    question: str
    answer: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    blocks: list[Table | Gallery] = field(default_factory=list)
    monitor: str = ""


def intervals(ablation: Ablation, scores: Mapping[str, Scores]) -> dict[str, Interval]:
    """The interval of every arm."""
    return {arm: interval(values, ablation.design) for arm, values in scores.items()}


def strips(ablation: Ablation, measures: Mapping[str, Measure]) -> dict[str, list[Strip]]:
    """A line per arm and measure in its colour (by base if that is empty); without the arms that have no value."""
    rows: dict[str, list[Strip]] = {arm: [] for arm in ablation.names}
    for color, measure in measures.items():
        scores = {arm: ablation.grid(arm, measure) for arm in ablation.names}
        for arm, found in intervals(ablation, scores).items():
            rows[arm].append(Strip(scores[arm], found, color or None))
    return {arm: row for arm, row in rows.items() if any(np.isfinite(strip.scores).any() for strip in row)}


def means(ablation: Ablation, measure: Measure) -> dict[str, float]:
    """The mean over runs of every arm that has one: none where a run of it has no result."""
    grids = {arm: ablation.grid(arm, measure) for arm in ablation.names if ablation.complete(arm)}
    return {arm: float(np.nanmean(grid)) for arm, grid in grids.items() if np.isfinite(grid).any()}


def ends(found: Mapping[str, float]) -> str:
    """The lowest and the highest with their names: `0.1 ('a') to 0.9 ('b')`."""
    low, high = min(found, key=lambda name: found[name]), max(found, key=lambda name: found[name])
    return f"{number(found[low])} ({low!r}) to {number(found[high])} ({high!r})"


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


def size(found: Interval) -> str:
    """An interval without its sign, for a sentence that says which way."""
    return bracketed(Interval(abs(found.mean), found.error, found.df))


def difference(comparison: Comparison | None) -> str:
    """A signed difference and its interval; a dash where a run that it needs has no result."""
    return bracketed(comparison.difference, "+") if comparison else "-"


def probability(p: float) -> str:
    """Three decimals."""
    return "-" if not np.isfinite(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def p_value(p: float) -> str:
    """`p = 0.031` or `p < 0.001`, for a sentence."""
    text = probability(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"
