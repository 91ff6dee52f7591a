"""The pictures of a study: both accuracies along SFT and after RL, what RL has to work with, the front of the edits."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.heal.fits import HALF_RATE
from experiments.heal.restoration import pareto
from experiments.heal.results import Results, interpolations
from experiments.heal.spectra import TURN
from experiments.heal.spectra_tables import SHOWN, having_pair, pairs
from experiments.heal.tables import SIGNALS, accuracies
from mifo_lightning.lab.report.drawing import PALETTE
from mifo_lightning.lab.report.statistics import interval

STYLE: Any = {
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "heal",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
FAMILIES = {"rollback": "v", "restoration": "o", "published": "s", "random subspace": "x"}


def draw(results: Results, directory: Path) -> dict[str, str]:
    """Write them; what each shows, by its file."""
    made = {"curve.svg": curve, "window.svg": window, "spectra.svg": spectra} | (
        {"front.svg": front} if results.edited else {}
    )
    with plt.rc_context(STYLE):
        for name, make in made.items():
            figure = make(results)
            figure.savefig(directory / name, facecolor="white", metadata={"Date": None}, bbox_inches="tight")
            plt.close(figure)
    return {name: " ".join((make.__doc__ or "").split()) for name, make in made.items()}


def curve(results: Results) -> Figure:
    """Accuracy on test along SFT, mean over bases, bands 95 % by t; dashed: at half the rate; diamonds: after RL from
    that step.
    """
    figure, axes = plt.subplots(figsize=(6, 3.4))
    study, steps = results.study, results.study.sweep.steps
    for key, color in zip(accuracies(results), PALETTE, strict=False):
        found = [interval(results.swept(step, key)) for step in steps]
        axes.plot(steps, [one.mean for one in found], color=color, marker="o", ms=3, label=key)
        axes.fill_between(steps, [one.low for one in found], [one.high for one in found], color=color, alpha=0.15, lw=0)
        half = [results.swept(step, key, HALF_RATE).mean() for step in steps]
        axes.plot(steps, half, color=color, lw=1, ls="--")
        starts = [start for start in study.rl[study.main].start if isinstance(start, int)] + [study.last]
        after = [results.after(study.main, start if start != study.last else "end", key).mean() for start in starts]
        axes.plot(starts, after, color=color, marker="D", ms=5, ls="", mfc="none")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks(steps, [f"{step}" for step in steps], rotation=45)
    axes.set_xlabel("SFT steps")
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def window(results: Results) -> Figure:
    """OOD accuracy after RL, and its change by RL, against what RL started from; a mark is a base and a start."""
    study = results.study
    figure, panels = plt.subplots(2, 1 + len(SIGNALS), figsize=(11, 4.6), sharey="row", sharex="col")
    for color, start in zip((*PALETTE, *PALETTE), study.rl[study.main].start, strict=False):
        after = results.after(study.main, start, study.ood)
        sides = [results.swept(start, study.matched), *(results.signal(start, key) for key in SIGNALS)]
        for row, values in zip(panels, (after, after - results.swept(start, study.ood)), strict=True):
            for axes, side in zip(row, sides, strict=True):
                axes.plot(side[:, 0], values[:, 0], color=color, marker="o", ms=4, ls="", alpha=0.7, label=f"{start}")
    for axes, name in zip(panels[1], (study.matched, *SIGNALS), strict=True):
        axes.axhline(0, color="black", lw=0.6, alpha=0.5)
        axes.set_xlabel(f"{name} before RL")
    panels[0, 0].set_ylabel("OOD after RL")
    panels[1, 0].set_ylabel("change of OOD by RL")
    panels[0, -1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.0), title="from")
    return figure


def spectra(results: Results) -> Figure:
    """Mean left angle, degrees, of the subspaces of the k largest singular values, means over matrices and bases: the
    change, and the rows that stand beside it.
    """
    shown = [pair for pair in ("base -> end", *SHOWN) if pair in pairs(results)]
    figure, panels = plt.subplots(1, len(shown), figsize=(2.8 * len(shown), 2.8), sharey=True, squeeze=False)
    for axes, pair in zip(panels[0], shown, strict=True):
        having = having_pair(results, pair)
        for color, row in zip((*PALETTE, *PALETTE), having[0], strict=False):
            turns = having[0][row]["turns"]
            angles = [sum(one[row]["turns"][k][TURN.index("left_mean")] for one in having) / len(having) for k in turns]
            own = row == "change"
            style = {"color": "black" if own else color, "lw": 1.8 if own else 1.0, "ls": "-" if own else "--"}
            axes.plot(range(len(turns)), angles, marker="o", ms=3, label=row, **style)
        axes.set_xticks(range(len(turns)), list(turns))
        axes.set_title(pair, fontsize=9)
        axes.set_xlabel("k")
    panels[0, 0].set_ylabel("left angle")
    rows, labels = panels[0, 0].get_legend_handles_labels()  # with the other seed, which RL has not
    panels[0, -1].legend(rows, labels, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def front(results: Results) -> Figure:
    """Every edit, mean over bases; line: the matrices from peak to end by interpolation; dashed: the Pareto front."""
    study = results.study
    figure, axes = plt.subplots(figsize=(6, 4))

    def place(name: str) -> tuple[float, float]:
        return float(results.edit(name, study.matched).mean()), float(results.edit(name, study.ood).mean())

    path = [place(name) for _, name in interpolations(results.edited[0])]
    axes.plot(*zip(*path, strict=True), color="black", marker=".", lw=1.2, label="interpolation")
    points = []
    for (family, marker), color in zip(FAMILIES.items(), PALETTE, strict=False):
        found = [place(name) for name in results.edits if results.family(name) == family]
        points += found
        if found:
            axes.plot(*zip(*found, strict=True), ls="", marker=marker, ms=5, alpha=0.7, color=color, label=family)
    axes.plot(*zip(*pareto([*points, *path]), strict=True), color="grey", lw=0.8, ls="--", label="Pareto front")
    if study.edits.primary in results.edits:
        axes.plot(*place(study.edits.primary), marker="*", ms=13, color=PALETTE[-1], ls="", label=study.edits.primary)
    _mark(axes, path[0], "matrices of the peak")
    _mark(axes, path[-1], "end")
    axes.set_xlabel(study.matched)
    axes.set_ylabel(study.ood)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _mark(axes: Axes, place: tuple[float, float], text: str) -> None:
    axes.annotate(text, place, (4, 5), textcoords="offset points", fontsize=8)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
