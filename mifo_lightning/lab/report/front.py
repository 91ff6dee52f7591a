"""Who keeps most at equal learning? The sections of an ablation whose arms all ran at several values of one setting.

A smaller step forgets less and learns less, so arms at one step size differ in both. Here the second side of the
trade-off is compared where the first reaches a level named beforehand: linear between neighbouring values, within each
base, never beyond what was run.
"""

import numpy as np

from mifo_lightning.lab.report import figures
from mifo_lightning.lab.report.comparisons import Comparisons, compare
from mifo_lightning.lab.report.document import (
    Figure,
    Gallery,
    Legend,
    Section,
    Table,
    bracketed,
    difference,
    large,
    means,
    number,
    probability,
)
from mifo_lightning.lab.report.drawing import keys
from mifo_lightning.lab.report.results import Ablation
from mifo_lightning.lab.report.scores import named_pairs
from mifo_lightning.lab.report.statistics import Interval, Scores, interval

Curve = tuple[Scores, Scores]
"""Learned and kept, each [values, bases], means over seeds."""


def front(ablation: Ablation) -> Section:
    """Kept at equal learning, arm by arm, and the curves that it is read off."""
    sweep, (learned, kept) = ablation.the_sweep, ablation.trade_off
    scores, found, along = equal(ablation), at_equal(ablation), curves(ablation)
    rows = []
    for arm in ranked(ablation, scores):
        c, here = found.get((arm, ablation.reference)), reached(scores[arm])
        row = [arm, bracketed(here), f"{np.isfinite(scores[arm]).sum()} of {len(ablation.bases)}"]
        row += [str(count) for count in missed(along[arm][0], sweep.level)]
        rows.append([*row, *([difference(c), f"{c.ahead} of {c.bases}", probability(c.p)] if c else ["", "", ""])])
    header = [
        "arm",
        ablation.compared,
        "bases that reach it",
        "below",
        "above at once",
        f"difference to {ablation.reference}",
    ]
    caption = f"Mean [95 % interval] over the bases that reach the level, by the difference to {ablation.reference}"
    table = Table(f"{caption}; p is Holm's, but for a primary contrast", [*header, "ahead on bases", "p"], rows)
    text = (
        f"Every arm ran with {sweep.key} at {_listed(sweep.values)}. On each base {kept} is read off where "
        f"{learned} first rises to {sweep.level:g}, on the line between neighbouring values; a base where it stays "
        "below, or lies above from the first value on, is left out and counted. A difference is taken over the bases "
        "where both arms reach it; means of different arms may be of different bases."
    )
    return Section("Who keeps most at equal learning?", [], [text], [_picture(ablation), table, _points(ablation)])


def contrasts(ablation: Ablation) -> Section | None:
    """Named pairs at equal learning."""
    return named_pairs(ablation, ablation.compared, at_equal(ablation), {})


def chosen(ablation: Ablation) -> Section | None:
    """Each arm at the one value that is best for it on half of the bases, tested on the others; nothing below four."""
    if len(ablation.bases) < 4:
        return None
    sweep, scores = ablation.the_sweep, ablation.scores(ablation.primary)
    best, tested, rows = {}, {}, []
    for arm, names in ablation.swept.items():
        means = [scores[name][::2].mean() for name in names]
        if np.isfinite(means).all():
            best[arm] = int(np.argmax(means))
            tested[arm] = scores[names[best[arm]]][1::2]
    sides = {side: ablation.traded(side) for side in ablation.trade_off}
    whole = {arm: tested.get(arm, np.full((1, 1), np.nan)) for arm in ablation.swept}
    found = compare(ablation, whole)
    for arm in sorted(tested, key=lambda arm: -tested[arm].mean()):
        name, c = ablation.swept[arm][best[arm]], found.get((arm, ablation.reference))
        row = [arm, f"{sweep.values[best[arm]]:g}", bracketed(interval(tested[arm], ablation.design))]
        row += [difference(c), f"{c.ahead} of {c.bases}", probability(c.p)] if c else ["", "", ""]
        rows.append([*row, *(number(float(side[name][1::2].mean())) for side in sides.values())])
    header = ["arm", sweep.key, ablation.primary, f"difference to {ablation.reference}", "ahead on bases", "p", *sides]
    caption = f"Mean [95 % interval] of {ablation.primary} on the other half of the bases, highest first"
    text = (
        f"The value of highest {ablation.primary} on the bases {', '.join(ablation.bases[::2])}; the numbers are of "
        f"{', '.join(ablation.bases[1::2])}, which had no part in the choice."
    )
    return Section("And if each arm may choose its own value?", [], [text], [Table(caption, header, rows)])


def curves(ablation: Ablation) -> dict[str, Curve]:
    """Learned and kept of every arm along the sweep, means over seeds."""
    sides = [ablation.traded(name) for name in ablation.trade_off]
    return {
        arm: (np.stack([sides[0][n].mean(1) for n in names]), np.stack([sides[1][n].mean(1) for n in names]))
        for arm, names in ablation.swept.items()
    }


def equal(ablation: Ablation) -> dict[str, Scores]:
    """Kept where learned reaches the level, by arm: [bases, 1], NaN where it does not."""
    level = ablation.the_sweep.level
    return {
        arm: np.array([[crossing(x, y, level)] for x, y in zip(learned.T, kept.T, strict=True)])
        for arm, (learned, kept) in curves(ablation).items()
    }


def at_equal(ablation: Ablation) -> Comparisons:
    """All comparisons of arms at equal learning, each over the bases where both reach it."""
    return compare(ablation, equal(ablation), where_both=True)


def crossing(learned: Scores, kept: Scores, level: float) -> float:
    """`kept` where `learned` first rises to the level, on the line between neighbours.

    NaN where it never does, where it lies above from the first value on (a later fall is no learning), and where a
    value is missing.

    Args:
        learned: float64 [values], in the order of the sweep.
        kept: The same.
        level: In the unit of `learned`.
    """
    if not np.isfinite([learned, kept]).all() or learned[0] > level:
        return float("nan")
    for i in range(len(learned) - 1):
        low, high = learned[i], learned[i + 1]
        if low <= level <= high:
            share = (level - low) / (high - low) if high != low else 0.5
            return float(kept[i] + share * (kept[i + 1] - kept[i]))
    return float("nan")


def missed(learned: Scores, level: float) -> tuple[int, int]:
    """On how many bases `learned` [values, bases] is below the level at every value, and above it from the first on."""
    return int((learned < level).all(0).sum()), int((learned[0] > level).sum())


def reached(scores: Scores) -> Interval:
    """Mean and interval over the bases that have a value."""
    return interval(scores[np.isfinite(scores).all(1)], "nested")


def ranked(ablation: Ablation, scores: dict[str, Scores]) -> list[str]:
    """Arms from the highest mean difference to the reference, over bases that both reach; those without one last.

    Not by their means: an arm that misses a bad base would gain by it.
    """
    of = scores[ablation.reference]
    leads = {arm: values[np.isfinite(values - of)] - of[np.isfinite(values - of)] for arm, values in scores.items()}
    return sorted(leads, key=lambda arm: (not leads[arm].size, -leads[arm].mean() if leads[arm].size else 0.0))


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _picture(ablation: Ablation) -> Gallery:
    learned, kept = ablation.trade_off
    lines = {arm: (x.mean(1), y.mean(1)) for arm, (x, y) in curves(ablation).items()}
    sweep, legend = ablation.the_sweep, keys(list(lines))
    picture = figures.front(f"{kept} against {learned}", (learned, kept), lines, legend, sweep.level)
    caption = (
        f"Up and to the right is better. A line is an arm, its points are means over bases at {sweep.key} = "
        f"{_listed(sweep.values)}, the largest mark being the largest value; the broken "
        f"line is where arms are compared, there within each base."
    )
    return Gallery([Figure(picture, caption)], [Legend("Arms", legend)])


def _points(ablation: Ablation) -> Table:
    sides, primary = [ablation.traded(name) for name in ablation.trade_off], ablation.scores(ablation.primary)
    phases = means(ablation, lambda cell: cell.summary.get("sft_phases"))
    rows = [
        [arm, f"{value:g}", *(number(float(side[name].mean())) for side in (primary, *sides)),
         *([large(phases.get(name, np.nan))] if phases else [])]
        for arm, names in ablation.swept.items()
        for name, value in zip(names, ablation.the_sweep.values, strict=True)
    ]  # fmt: skip
    counted = ["buffer-triggered SFT phases"] if phases else []
    header = ["arm", ablation.the_sweep.key, ablation.primary, *ablation.trade_off, *counted]
    return Table("All points, means over bases", header, rows)
