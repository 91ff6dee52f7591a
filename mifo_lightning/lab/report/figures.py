"""How do the runs of an ablation look? Pictures as SVG text, each narrow enough for a telephone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mifo_lightning.lab.report.drawing import (
    DASHES,
    INK,
    PALETTE,
    RL,
    SFT,
    STYLE,
    Key,
    as_svg,
    base_mark,
    blank,
    keys,
    log_axis,
    one_axes,
    short,
    unit_axis,
)
from mifo_lightning.lab.report.reductions import Curves, PhaseChange
from mifo_lightning.lab.report.results import Kind
from mifo_lightning.lab.report.statistics import Interval, Scores

LayerUpdates = Mapping[Kind, Mapping[str, tuple[float, float]]]
"""By kind of phase and layer group: L2 norm and changed share."""
APART = 13.0
"""Between two numbers of a scatter, pixels."""


@dataclass(frozen=True)
class Strip:
    """One line of a dot plot: the cells' values [bases, seeds], their interval, a colour or None for one per base."""

    scores: Scores
    interval: Interval
    color: str | None = None
    hollow: bool = False


@matplotlib.rc_context(STYLE)
def dots(title: str, strips: Mapping[str, Sequence[Strip]], xlabel: str, *, line: float = np.nan, log: bool = False,
         bold: str = "") -> str:  # fmt: skip
    """A row per arm: a small mark per cell (its shape is the base), a large one for the mean, a bar for the interval.

    `line` is a vertical reference, `bold` the arm whose label stands out.
    """
    series = max(len(row) for row in strips.values())
    figure, axes = one_axes(380, 44 + len(strips) * (20 + 9 * (series - 1)))
    for y, row in enumerate(strips.values()):
        for i, strip in enumerate(row):
            _strip(axes, strip, y + (i - (len(row) - 1) / 2) * 0.8 / series, 0.3 / series, log)
    if np.isfinite(line):
        axes.axvline(line, color=INK, lw=0.8, ls=(0, (3, 2)), alpha=0.7)
    if log:
        log_axis(axes)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_yticks(range(len(strips)), [short(arm) for arm in strips])
    for label, arm in zip(axes.get_yticklabels(), strips, strict=True):
        label.set_fontweight("bold" if arm == bold else "normal")
    axes.set_ylim(len(strips) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", color=INK, alpha=0.12, lw=0.6)
    axes.set_xlabel(xlabel)
    return as_svg(figure, title)


@matplotlib.rc_context(STYLE)
def trade_off(title: str, sides: Sequence[str], arms: Sequence[Sequence[Interval]], before: Sequence[Scores]) -> str:
    """A numbered cross of two intervals per arm, in the order of a key, and a hollow mark per base before training.

    `sides` names the axes; each arm has an interval on each, `before` is [bases] on each.
    """
    figure, axes = one_axes(400, 360)
    for i, (x, y) in enumerate(arms):
        color = PALETTE[i % len(PALETTE)]
        axes.plot([x.low, x.high], [y.mean, y.mean], color=color, lw=1, alpha=0.45)
        axes.plot([x.mean, x.mean], [y.low, y.high], color=color, lw=1, alpha=0.45)
        axes.plot([x.mean], [y.mean], ls="", marker="o", ms=5.5, mew=0, color=color)
    for b, place in enumerate(zip(*before, strict=True)):
        marker = base_mark(b)[1]
        axes.plot(*([value] for value in place), ls="", marker=marker, ms=7, mew=1.3, mec=INK, mfc="none")
    axes.set_xlabel(sides[0])
    axes.set_ylabel(sides[1])
    axes.grid(color=INK, alpha=0.12, lw=0.6)
    figure.draw_without_rendering()  # the axes have their place from here on
    means = np.array([[x.mean, y.mean] for x, y in arms])
    found = np.isfinite(means).all(1)
    offsets = np.full(means.shape, np.nan)
    offsets[found] = beside(axes.transData.transform(means[found]) * 72 / figure.dpi)
    for i in np.flatnonzero(found).tolist():
        axes.annotate(
            str(i + 1), means[i], offsets[i], textcoords="offset points", ha="center", va="center", fontsize=11,
            color=PALETTE[i % len(PALETTE)], fontweight="bold",
            arrowprops={"arrowstyle": "-", "lw": 0.8, "alpha": 0.7, "color": PALETTE[i % len(PALETTE)],
                        "patchA": None, "relpos": (0.5, 0.5), "shrinkA": 7, "shrinkB": 0},
        )  # fmt: skip
    return as_svg(figure, title)


@matplotlib.rc_context(STYLE)
def front(title: str, sides: Sequence[str], lines: Mapping[str, tuple[Scores, Scores]], legend: Sequence[Key],
          level: float) -> str:  # fmt: skip
    """A line per arm through its places [values] on both sides, marks growing along it; `level` of the first side."""
    figure, axes = one_axes(420, 320)
    axes.axvline(level, color=INK, lw=0.8, ls=(0, (3, 2)), alpha=0.7)
    for (x, y), key in zip(lines.values(), legend, strict=True):
        axes.plot(x, y, color=key.color, ls=DASHES[key.dashes], lw=1.5, alpha=0.8)
        for i, place in enumerate(zip(x, y, strict=True)):
            axes.plot(*([value] for value in place), ls="", marker="o", ms=3 + 1.5 * i, mew=0, color=key.color)
    axes.set_xlabel(sides[0])
    axes.set_ylabel(sides[1])
    axes.grid(color=INK, alpha=0.12, lw=0.6)
    return as_svg(figure, title)


def beside(points: Scores) -> Scores:
    """Where to write a number for each of `points` [n, 2], as offsets [n, 2] in pixels: clear of points and numbers."""
    angles, radii = np.arange(16) * np.pi / 8, np.arange(13, 60, 6)
    candidates = np.array([[r * np.cos(a), r * np.sin(a)] for r, a in product(radii, angles)])
    offsets = np.zeros_like(points)
    for i, point in enumerate(points):
        places = point + candidates
        taken = np.linalg.norm(places[:, None] - (points + offsets)[None, :i], axis=2)
        marks = np.linalg.norm(places[:, None] - points[None], axis=2)
        cost = 50 * (APART - taken).clip(0).sum(1) + 20 * (10 - marks).clip(0).sum(1)
        offsets[i] = candidates[np.argmin(cost + np.linalg.norm(candidates, axis=1))]
    return offsets


@matplotlib.rc_context(STYLE)
def curves(title: str, arm: str, data: Curves, last: float) -> str:
    """One arm's learning curves; SFT phases shaded by the share of runs in one. `last` is the end of the x-axis."""
    figure, axes = one_axes(270, 190)
    width = data.edges[1] - data.edges[0]
    for share, group in groupby(zip(data.edges, data.sft, strict=True), key=lambda pair: float(pair[1])):
        ends = [edge for edge, _ in group]
        if share > 0:
            axes.axvspan(ends[0] - width, ends[-1], color=INK, alpha=round(0.05 + 0.25 * share, 2), lw=0)
    at = np.flatnonzero(data.measured >= 0.5)
    for key in keys(sorted(data.accuracy)):
        y = data.accuracy[key.name]
        for far, segments in groupby(range(1, len(y)), key=lambda i: bool(data.far[i] >= 0.5)):
            ends = list(segments)
            part = slice(ends[0] - 1, ends[-1] + 1)
            axes.plot(data.edges[part], y[part], color=key.color, ls=(0, (3, 2)) if far else "-", lw=1.5)
        axes.plot(data.edges[at], y[at], ls="", color=key.color, marker="o", ms=3, mew=0)
    axes.plot(data.edges, data.reward, color=INK, lw=1.5, alpha=0.7)
    unit_axis(axes)
    axes.set_xlim(-width, last)
    axes.set_xlabel("RL step" if data.axis == "rl_step" else "optimizer step (no RL)")
    axes.set_ylabel("share correct; reward")
    axes.set_title(short(arm), loc="left")
    return as_svg(figure, title)


@matplotlib.rc_context(STYLE)
def retention(title: str, arm: str, by_source: Mapping[str, Sequence[float | None]]) -> str:
    """One arm's share of solved questions that stay solved, per SFT phase and source."""
    figure, axes = one_axes(270, 180)
    for key in keys(sorted(by_source)):
        y = np.array([np.nan if value is None else value for value in by_source[key.name]])
        axes.plot(np.arange(1, len(y) + 1), y, color=key.color, ls=DASHES[key.dashes], lw=1.4, marker="o", ms=3)
    unit_axis(axes)
    phases = max(map(len, by_source.values()))
    axes.set_xticks(range(1, phases + 1, -(-phases // 10)))
    axes.set_xlabel("SFT phase")
    axes.set_ylabel("share retained")
    axes.set_title(short(arm), loc="left")
    return as_svg(figure, title)


@matplotlib.rc_context(STYLE)
def layers(title: str, arm: str, updates: LayerUpdates, ends: tuple[float, float], shares: bool) -> str:
    """One arm's mean update per phase: L2 norm, between the `ends` of its axis, and, if wanted, changed share."""
    groups = list(next(iter(updates.values())))
    figure = blank(300, 62 + 13 * len(groups))
    panels = figure.subplots(1, 1 + shares, sharey=True, squeeze=False)[0]
    for index, axes in enumerate(panels):
        for phase, values in updates.items():
            x = [values[group][index] for group in groups]
            color, marker = (RL, "o") if phase == "rl" else (SFT, "s")
            axes.plot(x, range(len(groups)), color=color, marker=marker, ms=3.5, lw=0.8)
        axes.grid(axis="y", color=INK, alpha=0.12, lw=0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(("L2 norm", "changed share")[index])
    if ends[0] > 0:
        panels[0].set_xlim(ends[0] / 1.1, ends[1] * 1.1)
        log_axis(panels[0], dense=10)
    if shares:
        panels[1].set_xlim(-0.06, 1.06)
        panels[1].set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    panels[0].set_yticks(range(len(groups)), [short(group) for group in groups], fontsize=9)
    panels[0].invert_yaxis()
    panels[0].set_title(short(arm), loc="left")
    return as_svg(figure, title)


@matplotlib.rc_context(STYLE)
def scatter(title: str, changes: Sequence[PhaseChange], x: str, xlabel: str) -> str:
    """A point per phase: what it lost against `x`, a field of PhaseChange."""
    figure, axes = one_axes(380, 280)
    for kind, color, marker in (("rl", RL, "o"), ("sft", SFT, "s")):
        points = [(getattr(c, x), c.lost) for c in changes if c.kind == kind and getattr(c, x) > 0]
        if points:
            axes.plot(*zip(*points, strict=True), ls="", marker=marker, ms=3.2, mew=0, color=color, alpha=0.5)
    log_axis(axes)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("share of solved questions lost")
    return as_svg(figure, title)


def _strip(axes: Axes, strip: Strip, y: float, spread: float, log: bool) -> None:
    """Marks of one line, the bases one below the other within `spread`."""
    scores = np.where(strip.scores > 0, strip.scores, np.nan) if log else strip.scores
    bases = len(scores)
    for b, values in enumerate(scores):
        height = np.full(len(values), y + spread * (2 * b / (bases - 1) - 1 if bases > 1 else 1))
        color, marker = base_mark(b)
        color = strip.color or color
        axes.plot(values, height, ls="", marker=marker, ms=4.6, mew=0, color=color, alpha=0.6)
    ink = strip.color or INK
    low, high = strip.interval.low, strip.interval.high
    if np.isfinite(low) and not (log and low <= 0):
        axes.plot([low, high], [y, y], color=ink, lw=1.8, solid_capstyle="butt", alpha=0.9)
    if not (log and strip.interval.mean <= 0):
        face = "none" if strip.hollow else ink
        axes.plot([strip.interval.mean], [y], marker="d", ms=6.5, mew=1.2, mec=ink, mfc=face, ls="")
