"""The picture of a study of circuits: accuracy as the base's heads are put back one by one."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from experiments.circuits.records import Record
from experiments.circuits.results import Find, Results
from mifo_lightning.lab.report.drawing import INK, PALETTE, STYLE, alone, as_svg, blank, unit_axis
from mifo_lightning.lab.report.statistics import interval

ORDERS = {
    "most_necessary_first": ("most necessary first", "-"),
    "least_necessary_first": ("least necessary first", "--"),
}
TITLE = "Accuracy as outputs of the base's heads are put into the trained model"


def draw(results: Results) -> str:
    """An SVG file: a panel for each untrained skill and arm, a line for either order; bars are 95 % over bases."""
    arms, skills = results.arms, results.study["untrained"]
    with plt.rc_context(STYLE):
        figure = blank(max(320, 40 + 150 * len(arms)), 70 + 140 * len(skills))
        panels = figure.subplots(len(skills), len(arms), sharex=True, sharey=True, squeeze=False)
        for row, skill in zip(panels, skills, strict=True):
            for axes, arm in zip(row, arms, strict=True):
                _panel(axes, results, arm, skill)
            row[0].set_ylabel(skill)
        for axes, arm in zip(panels[0], arms, strict=True):
            axes.set_title(arm)
        figure.supxlabel("heads of the base put back; line: the base", fontsize=11)
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(ORDERS), frameon=False)
        svg = alone(as_svg(figure, TITLE))
        plt.close(figure)
    return svg


def _panel(axes: Axes, results: Results, arm: str, skill: str) -> None:
    """Both orders; the point at 0 is the trained model."""
    unit_axis(axes)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for color, (order, (label, dashes)) in zip(PALETTE, ORDERS.items(), strict=False):
        found = [interval(np.array(scores)[:, None]) for scores in _curve(results, arm, skill, order)]
        half = [np.nan_to_num(one.half) for one in found]
        axes.errorbar(
            range(len(found)), [one.mean for one in found], half,
            color=color, ls=dashes, marker="o", ms=3, lw=1.3, elinewidth=0.8, label=label,
        )  # fmt: skip
    base = results.values(arm, lambda _, of_base: of_base["skills"][skill]["accuracy"])
    axes.axhline(float(np.mean(base)), color=INK, lw=0.6)


def _curve(results: Results, arm: str, skill: str, order: str) -> list[list[float]]:
    """Scores over bases with none, one, two, ... of the heads put back."""

    def with_heads(count: int) -> Find:
        def find(record: Record, _: Record) -> float | None:
            there = record["transplant"].get(skill, {}).get("into_tuned")
            scores = [there["none"], *there[order]] if there else []
            return scores[count] if count < len(scores) else None

        return find

    curve: list[list[float]] = []
    while scores := results.values(arm, with_heads(len(curve))):
        curve.append(scores)
    return curve
