"""How does a picture take colour and font from the page around it? Style, keys and axes, and SVG text.

Text stays text, nothing is rasterised, and the same data give the same characters.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

matplotlib.use("svg")

# Told apart with any kind of colour vision, and of middle lightness: readable on white and on near-black.
PALETTE = ("#2f86d1", "#d9730d", "#12936f", "#c4559f", "#8a8f1e", "#8b6fd6", "#c9433f")
SHAPES = {
    "o": "M5 1A4 4 0 0 1 5 9A4 4 0 0 1 5 1z",
    "s": "M1 1H9V9H1z",
    "D": "M5 0L10 5L5 10L0 5z",
    "^": "M5 1L9.5 9H.5z",
    "v": "M5 9L9.5 1H.5z",
    "P": "M3.5 0h3v3.5H10v3H6.5V10h-3V6.5H0v-3h3.5z",
    "*": "M5 0L6.2 3.6H10L7 6L8.1 9.6L5 7.4L1.9 9.6L3 6L0 3.6H3.8z",
}
"""Marks of the bases: matplotlib's name -> the same as an SVG path in a box of 10."""
MARKERS = tuple(SHAPES)
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


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a line, `dashes` being a CSS border style, or a mark or a number in its place."""

    name: str
    color: str
    dashes: str = "solid"
    marker: str = ""
    number: str = ""

    @property
    def ink(self) -> str:
        """Its colour as CSS."""
        return "currentColor" if self.color == INK else self.color

    @property
    def path(self) -> str:
        """Its mark as an SVG path; empty without one."""
        return SHAPES.get(self.marker, "")


def keys(names: Sequence[str]) -> list[Key]:
    """A colour for each name, and dashes where colours run out."""
    styles = list(DASHES)
    return [
        Key(name, PALETTE[i % len(PALETTE)], styles[i // len(PALETTE) % len(styles)]) for i, name in enumerate(names)
    ]


def base_keys(names: Sequence[str]) -> list[Key]:
    """A colour and a mark for each base, the pair of its own for up to 49."""
    marks = map(base_mark, range(len(names)))
    return [Key(name, color, marker=marker) for name, (color, marker) in zip(names, marks, strict=True)]


def base_mark(index: int) -> tuple[str, str]:
    """Colour and mark of a base by its place."""
    return PALETTE[index % len(PALETTE)], MARKERS[(index + index // len(PALETTE)) % len(MARKERS)]


def blank(width: float, height: float) -> Figure:
    """A transparent figure; one unit of its SVG is one pixel of a page that shows it at full size."""
    return Figure(figsize=(width / 72, height / 72), facecolor="none", layout="constrained")


def one_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one set of axes."""
    figure = blank(width, height)
    return figure, figure.add_subplot(facecolor="none")


def unit_axis(axes: Axes) -> None:
    """A vertical axis of shares."""
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.5, 1])
    axes.grid(axis="y", color=INK, alpha=0.12, lw=0.6)


def log_axis(axes: Axes, dense: float = 100) -> None:
    """A logarithmic x-axis with plain numbers, 1-2-5 where its ends are less than a factor `dense` apart."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high < 4 * low:
        middle = (low * high) ** 0.5
        low, high = middle / 2, middle * 2
        axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < dense * low else (1,), numticks=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def short(label: str) -> str:
    """A label that leaves room for the picture."""
    return label if len(label) <= LABEL else label[: LABEL - 1] + "…"


GREY = "#7a828c"
"""Text and axes of a picture that stands alone: readable on white and on near-black."""


def alone(svg: str) -> str:
    """An SVG element of a page as a file of its own."""
    text = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return text.replace("currentColor", GREY) + "\n"


def as_svg(figure: Figure, title: str) -> str:
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
