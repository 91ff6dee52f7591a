"""How do the runs of an ablation look? Pictures as SVG text that takes colour and font from the page around it.

Every picture is narrow enough for a telephone; the page lays as many side by side as fit. Text stays text, nothing is
rasterised, and the same data give the same characters.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from itertools import groupby
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from experiments.report.results import Curves, Kind, PhaseChange
from experiments.report.statistics import Interval, Scores

matplotlib.use("svg")

# Told apart with any kind of colour vision, and of middle lightness: readable on white and on near-black.
PALETTE = ("#2f86d1", "#d9730d", "#12936f", "#c4559f", "#8a8f1e", "#8b6fd6", "#c9433f")
MARKERS = "osD^vP*"
DASHES = {"solid": "-", "dashed": (0, (4, 1.5)), "dotted": (0, (1, 1.2))}
"""By the name that CSS has for them."""
RL, SFT = PALETTE[0], PALETTE[1]
INK = "#010203"
"""Stands for the text colour of the page until the SVG is written."""
LABEL = 24
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a $ in the name of an arm is a $
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.labelsize": 11,
    "axes.titlesize": 11,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


LayerUpdates = Mapping[Kind, Mapping[str, tuple[float, float]]]
"""By kind of phase and layer group: L2 norm and changed share."""


@dataclass(frozen=True)
class Strip:
    """One line of a dot plot: the cells' values [bases, seeds], their interval, a colour or None for one per base."""

    scores: Scores
    interval: Interval
    color: str | None = None
    hollow: bool = False


@dataclass(frozen=True)
class Key:
    """An entry of a legend; `dashes` is a CSS border style."""

    name: str
    color: str
    dashes: str = "solid"

    @property
    def css(self) -> str:
        """Line and colour as CSS."""
        return f"{self.dashes} {'currentColor' if self.color == INK else self.color}"


def keys(names: Sequence[str]) -> list[Key]:
    """A colour for each name, and dashes where colours run out."""
    styles = list(DASHES)
    return [
        Key(name, PALETTE[i % len(PALETTE)], styles[i // len(PALETTE) % len(styles)]) for i, name in enumerate(names)
    ]


@matplotlib.rc_context(STYLE)
def dots(title: str, strips: Mapping[str, Sequence[Strip]], xlabel: str, *, line: float = np.nan, log: bool = False,
         bold: str = "") -> str:  # fmt: skip
    """A row per arm: a small mark per cell (its shape is the base), a large one for the mean, a bar for the interval.

    `line` is a vertical reference, `bold` the arm whose label stands out.
    """
    series = max(len(row) for row in strips.values())
    figure, axes = _axes(380, 44 + len(strips) * (20 + 9 * (series - 1)))
    for y, row in enumerate(strips.values()):
        for i, strip in enumerate(row):
            _strip(axes, strip, y + (i - (len(row) - 1) / 2) * 0.8 / series, 0.3 / series, log)
    if np.isfinite(line):
        axes.axvline(line, color=INK, lw=0.8, ls=(0, (3, 2)), alpha=0.7)
    if log:
        _log_axis(axes)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_yticks(range(len(strips)), [_short(arm) for arm in strips])
    for label, arm in zip(axes.get_yticklabels(), strips, strict=True):
        label.set_fontweight("bold" if arm == bold else "normal")
    axes.set_ylim(len(strips) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", color=INK, alpha=0.12, lw=0.6)
    axes.set_xlabel(xlabel)
    return _svg(figure, title)


@matplotlib.rc_context(STYLE)
def curves(title: str, arm: str, data: Curves, last: float) -> str:
    """One arm's learning curves; SFT phases shaded by the share of runs in one. `last` is the end of the x-axis."""
    figure, axes = _axes(270, 190)
    width = data.edges[1] - data.edges[0]
    for share, group in groupby(zip(data.edges, data.sft, strict=True), key=lambda pair: float(pair[1])):
        ends = [edge for edge, _ in group]
        if share > 0:
            axes.axvspan(ends[0] - width, ends[-1], color=INK, alpha=round(0.05 + 0.25 * share, 2), lw=0)
    for key in keys(sorted(data.accuracy)):
        axes.plot(data.edges, data.accuracy[key.name], color=key.color, ls=DASHES[key.dashes], lw=1.5)
    axes.plot(data.edges, data.reward, color=INK, lw=1.5, alpha=0.7)
    _unit_axis(axes)
    axes.set_xlim(-width, last)
    axes.set_xlabel("RL step" if data.axis == "rl_step" else "optimizer step (no RL)")
    axes.set_title(_short(arm), loc="left")
    return _svg(figure, title)


@matplotlib.rc_context(STYLE)
def retention(title: str, arm: str, by_source: Mapping[str, Sequence[float | None]]) -> str:
    """One arm's share of solved questions that stay solved, per SFT phase and source."""
    figure, axes = _axes(270, 180)
    for key in keys(sorted(by_source)):
        y = np.array([np.nan if value is None else value for value in by_source[key.name]])
        axes.plot(np.arange(1, len(y) + 1), y, color=key.color, ls=DASHES[key.dashes], lw=1.4, marker="o", ms=3)
    _unit_axis(axes)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("SFT phase")
    axes.set_title(_short(arm), loc="left")
    return _svg(figure, title)


@matplotlib.rc_context(STYLE)
def layers(title: str, arm: str, updates: LayerUpdates, ends: tuple[float, float]) -> str:
    """One arm's mean update per phase: L2 norm, between the `ends` of its axis, and changed share."""
    groups = list(next(iter(updates.values())))
    figure = _figure(300, 62 + 13 * len(groups))
    panels = figure.subplots(1, 2, sharey=True)
    for index, (axes, label) in enumerate(zip(panels, ("L2 norm", "changed share"), strict=True)):
        for phase, values in updates.items():
            x = [values[group][index] for group in groups]
            color, marker = (RL, "o") if phase == "rl" else (SFT, "s")
            axes.plot(x, range(len(groups)), color=color, marker=marker, ms=3.5, lw=0.8)
        axes.grid(axis="y", color=INK, alpha=0.12, lw=0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(label)
    if ends[0] > 0:
        panels[0].set_xlim(ends[0] / 1.1, ends[1] * 1.1)
        _log_axis(panels[0], dense=10)
    panels[1].set_xlim(-0.06, 1.06)
    panels[1].set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    panels[0].set_yticks(range(len(groups)), [_short(group) for group in groups], fontsize=9)
    panels[0].invert_yaxis()
    panels[0].set_title(_short(arm), loc="left")
    return _svg(figure, title)


@matplotlib.rc_context(STYLE)
def scatter(title: str, changes: Sequence[PhaseChange], x: str, xlabel: str, limit: int = 800) -> str:
    """A point per phase: what it lost against `x`, a field of PhaseChange; at most `limit` of a kind are drawn."""
    figure, axes = _axes(380, 280)
    for kind, color, marker in (("rl", RL, "o"), ("sft", SFT, "s")):
        points = [(getattr(c, x), c.lost) for c in changes if c.kind == kind and getattr(c, x) > 0]
        points = points[:: -(-len(points) // limit) or 1]
        if points:
            axes.plot(*zip(*points, strict=True), ls="", marker=marker, ms=3.2, mew=0, color=color, alpha=0.6)
    _log_axis(axes)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("share of solved questions lost")
    return _svg(figure, title)


def _strip(axes: Axes, strip: Strip, y: float, spread: float, log: bool) -> None:
    """Marks of one line, the bases one below the other within `spread`."""
    scores = np.where(strip.scores > 0, strip.scores, np.nan) if log else strip.scores
    bases = len(scores)
    for b, values in enumerate(scores):
        offset = spread * (2 * b / (bases - 1) - 1 if bases > 1 else 1)
        color = strip.color or PALETTE[b % len(PALETTE)]
        marker = MARKERS[b % len(MARKERS)]
        axes.plot(
            values, np.full(len(values), y + offset), ls="", marker=marker, ms=3.4, mew=0, color=color, alpha=0.55
        )
    ink = strip.color or INK
    low, high = strip.interval.low, strip.interval.high
    if np.isfinite(low) and not (log and low <= 0):
        axes.plot([low, high], [y, y], color=ink, lw=1.8, solid_capstyle="butt", alpha=0.9)
    if not (log and strip.interval.mean <= 0):
        face = "none" if strip.hollow else ink
        axes.plot([strip.interval.mean], [y], marker="d", ms=6.5, mew=1.2, mec=ink, mfc=face, ls="")


def _figure(width: float, height: float) -> Figure:
    """A transparent figure; one unit of its SVG is one pixel of a page that shows it at full size."""
    return Figure(figsize=(width / 72, height / 72), facecolor="none", layout="constrained")


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = _figure(width, height)
    return figure, figure.add_subplot(facecolor="none")


def _unit_axis(axes: Axes) -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.5, 1])
    axes.grid(axis="y", color=INK, alpha=0.12, lw=0.6)


def _log_axis(axes: Axes, dense: float = 100) -> None:
    """A logarithmic x-axis with plain numbers, 1-2-5 where its ends are less than a factor `dense` apart."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high < 4 * low:
        middle = (low * high) ** 0.5
        low, high = middle / 2, middle * 2
        axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < dense * low else (1,), numticks=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _short(label: str) -> str:
    return label if len(label) <= LABEL else label[: LABEL - 1] + "…"


def _svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element without identifiers that two figures of a page could share."""
    buffer = StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata=metadata, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="0 0 ([\d.]+) [\d.]+"', head)
    assert box
    head = f'<svg {box[0]} role="img" aria-label="{escape(title)}" style="max-width:{float(box[1]):.0f}px"'
    text = f'{head} xmlns:xlink="http://www.w3.org/1999/xlink">{body}'
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"(font: [^;\"]*?[\d.]+px) [^;\"]*", r"\1 sans-serif", text)
    return re.sub(r"\n\s*", "\n", text.replace(INK, "currentColor"))
