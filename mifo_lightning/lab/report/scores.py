"""Which arm is best, and does each part of it matter? The sections about final scores."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from mifo_lightning.lab.report import figures
from mifo_lightning.lab.report.comparisons import Comparisons, compare
from mifo_lightning.lab.report.document import (
    MARKS,
    Figure,
    Gallery,
    Legend,
    Section,
    Table,
    bracketed,
    difference,
    intervals,
    mean,
    means,
    number,
    probability,
)
from mifo_lightning.lab.report.drawing import INK, PALETTE, Key, base_keys
from mifo_lightning.lab.report.results import KINDS, Ablation, evaluation
from mifo_lightning.lab.report.statistics import Interval, Scores

FEW_BASES = 10
"""Below, what happened on each base is told base by base."""


def best(ablation: Ablation) -> Section:
    """Final scores and differences to the reference."""
    scores = ablation.scores(ablation.primary)
    order, comparisons = ranked(intervals(ablation, scores)), compare(ablation, scores)
    blocks: list[Table | Gallery] = [_scores_table(ablation, order, comparisons)]
    if 1 < len(ablation.bases) < FEW_BASES:  # of more, the pictures and runs.csv tell
        blocks.append(_by_base(ablation, order, scores))
    if further := _further(ablation):
        blocks.append(metrics_table(ablation, order, {name: name for name in further}, "Further metrics"))
    blocks.append(_pictures(ablation, order, comparisons))
    drawn, questions = evaluation(ablation)
    sampled = f"avg@n is over responses sampled{f' at {drawn}' if drawn else ''}, n to a question"
    text = [f"{sampled}{f', of {questions}' if questions else ''}. None of these scores is of greedy responses."]
    if not ablation.trade_off:
        return Section("Which arm is best?", [], text, blocks)
    sides = {name: intervals(ablation, ablation.traded(name)) for name in ablation.trade_off}
    answer, *free = _traded(sides)
    return Section("Which arm is best?", [answer], [*free, *text], [_trade_off(ablation, order, sides), *blocks])


def contrasts(ablation: Ablation) -> Section | None:
    """Pairs of arms other than those with the reference, and the primary contrast; nothing if none are named."""
    sides = {name: compare(ablation, ablation.traded(name)) for name in ablation.trade_off}
    return named_pairs(ablation, ablation.primary, compare(ablation, ablation.scores(ablation.primary)), sides)


def named_pairs(
    ablation: Ablation, what: str, primary: Comparisons, sides: Mapping[str, Comparisons]
) -> Section | None:
    """The section of those pairs in `what`; `sides` are compared beside it."""
    shown = [*primary.primary, *(pair for pair in primary.exploratory if pair[1] != ablation.reference)]
    if not shown:
        return None
    rows = []
    for pair in shown:
        c = primary.get(pair)
        assert c
        name = f"{pair[0]} minus {pair[1]}" + (" (primary)" if pair in primary.primary else "")
        row = [name, difference(c), f"{c.ahead} of {c.bases}", probability(c.p)]
        rows.append([*row, *(difference(side.get(pair)) for side in sides.values())])
    header = ["contrast", what, "ahead on bases", "p", *sides]
    caption = "Mean difference on the same base [95 % interval]"
    text = (
        f"The first arm minus the second. p is for {what}: the primary contrast's as it is, each other one "
        f"corrected by Holm's method for all {len(primary.exploratory)} exploratory comparisons of this page"
        f"{'; the other columns are descriptive' if sides else ''}."
    )
    return Section("Does each part matter?", [], [text], [Table(caption, header, rows)])


def ranked(means: Mapping[str, Interval]) -> list[str]:
    """Arms from the highest mean to the lowest, then those without one."""
    return sorted(means, key=lambda arm: -means[arm].mean if np.isfinite(means[arm].mean) else np.inf)


def _traded(sides: Mapping[str, Mapping[str, Interval]]) -> list[str]:
    """Who is highest on each side, and whom no other arm exceeds on both; of means only."""
    first, second = sides
    # as printed, so that what is said can be seen
    found = {arm: (round(sides[first][arm].mean, 3), round(sides[second][arm].mean, 3)) for arm in sides[first]}
    found = {arm: place for arm, place in found.items() if np.isfinite(place).all()}
    if not found:
        return [f"No arm has runs with all metrics of {first} and {second}."]
    tops = [max(found, key=lambda arm: found[arm][side]) for side in (0, 1)]
    if tops[0] == tops[1]:
        return [f"By their means {tops[0]!r} is highest on both: {first} and {second}."]
    places = found.values()
    beaten = {a for a, (x, y) in found.items() if any(u >= x and v >= y and (u, v) != (x, y) for u, v in places)}
    free = [arm for arm in found if arm not in beaten]
    listed = (f"{arm!r} ({number(found[arm][0])}, {number(found[arm][1])})" for arm in free)
    return [
        f"No arm is highest on both: {tops[0]!r} is on {first}, {tops[1]!r} on {second}.",
        f"No other arm does as well on both as any of these, by their means ({first}, {second}): {', '.join(listed)}.",
    ]


def _trade_off(ablation: Ablation, order: list[str], sides: Mapping[str, Mapping[str, Interval]]) -> Gallery:
    places = [[side[arm] for side in sides.values()] for arm in order]
    before = [_base_means(ablation.traded(name, "before")) for name in sides]
    title = " against ".join(reversed(list(sides)))
    picture = figures.trade_off(title, list(sides), places, before)
    means = "; ".join(f"{name} is the mean of {', '.join(metrics)}" for name, metrics in ablation.trade_off.items())
    caption = f"Up and to the right is better. A point is the mean of an arm, its cross the 95 % intervals: {means}."
    arms = [Key(arm, PALETTE[i % len(PALETTE)], number=str(i + 1)) for i, arm in enumerate(order)]
    legends = [Legend(f"Arms, from the highest {ablation.primary}", arms)]
    if any(np.isfinite(values).any() for values in before):
        bases = [replace(key, color=INK) for key in base_keys(ablation.base_names)]
        legends.append(Legend("Before training", bases))
    return Gallery([Figure(picture, caption)], legends, kind="beside")


def _base_means(scores: Mapping[str, Scores]) -> Scores:
    """Mean over arms and seeds of each base, NaN without any: [bases]."""
    values = np.concatenate(list(scores.values()), axis=1)
    return np.array([np.nanmean(row) if np.isfinite(row).any() else np.nan for row in values])


def _scores_table(ablation: Ablation, order: list[str], comparisons: Comparisons) -> Table:
    primary, reference = ablation.primary, ablation.reference
    found = intervals(ablation, ablation.scores(primary))
    sides = {name: intervals(ablation, ablation.traded(name)) for name in ablation.trade_off}
    flops = _relative_flops(ablation)
    header = ["arm", primary, f"difference to {reference}", "ahead on bases", "p", *sides]
    header += [*(["FLOPs"] if flops else []), "runs"]
    rows = []
    for arm in order:
        row, c = [_name(arm, reference), bracketed(found[arm])], comparisons.get((arm, reference))
        row += [difference(c), f"{c.ahead} of {c.bases}", probability(c.p)] if c else ["", "", ""]
        row += [bracketed(side[arm]) for side in sides.values()]
        row += [flops.get(arm, "-")] if flops else []
        rows.append([*row, f"{len(ablation.done(arm))} of {ablation.runs}"])
    before = [_before(ablation.scores(primary, "before")), "", "", ""]
    before += [_before(ablation.traded(name, "before")) for name in sides]
    rows += [["before training", *before, *([""] if flops else []), ""]] if before[0] != "-" else []
    caption = "Mean [95 % interval] after training, highest first; p is Holm's, but for a primary contrast"
    return Table(caption + (f"; FLOPs are relative to {reference}" if flops else ""), header, rows)


def _by_base(ablation: Ablation, order: list[str], scores: Mapping[str, Scores]) -> Table:
    """Means of each base over seeds, and how far an arm is ahead of the reference there."""
    reference, rows = ablation.reference, []
    for arm in order:
        means, leads = scores[arm].mean(1), (scores[arm] - scores[reference]).mean(1)
        row = (
            [f"{lead:+.3f}" if np.isfinite(lead) else "-" for lead in leads] if arm != reference else [""] * len(leads)
        )
        rows.append([_name(arm, reference), *map(number, means), *row])
    before = ablation.scores(ablation.primary, "before")
    if _before(before) != "-":
        rows.append(["before training", *map(number, _base_means(before)), *([""] * len(ablation.bases))])
    header = ["arm", *ablation.base_names, *(f"difference on {name}" for name in ablation.base_names)]
    return Table(f"{ablation.primary} by base, mean over seeds, and difference to {reference} there", header, rows)


def _further(ablation: Ablation) -> list[str]:
    """The metrics that no other section tells of."""
    return [metric for metric in ablation.metrics if metric not in ablation.of_retention]


def metrics_table(ablation: Ablation, order: list[str], metrics: Mapping[str, str], caption: str) -> Table:
    """A row for each arm; `metrics` are column names by metric."""
    found = {metric: intervals(ablation, ablation.scores(metric)) for metric in metrics}
    rows = [[_name(arm, ablation.reference), *(bracketed(one[arm]) for one in found.values())] for arm in order]
    before = [_before(ablation.scores(metric, "before")) for metric in metrics]
    rows += [["before training", *before]] if set(before) != {"-"} else []
    return Table(f"{caption}, mean [95 % interval]", ["arm", *metrics.values()], rows)


def of_every_run(ablation: Ablation, metric: str, order: list[str], caption: str = "") -> Figure:
    """The picture of a metric: all runs, by arm."""
    scores = ablation.scores(metric)
    found = intervals(ablation, scores)
    strips = {arm: [figures.Strip(scores[arm], found[arm])] for arm in order}
    picture = figures.dots(metric, strips, metric, line=found[ablation.reference].mean, bold=ablation.reference)
    return Figure(picture, caption)


def _pictures(ablation: Ablation, order: list[str], comparisons: Comparisons) -> Gallery:
    """The primary metric, the differences in it, and every further metric."""
    primary, reference = ablation.primary, ablation.reference
    shown = dict.fromkeys([primary, *_further(ablation)])
    drawn = [of_every_run(ablation, metric, order, MARKS if metric == primary else "") for metric in shown]
    scores = ablation.scores(primary)
    lines = {
        arm: [figures.Strip(scores[arm] - scores[reference], c.difference, hollow=not c.significant)]
        for arm in order if (c := comparisons.get((arm, reference)))
    }  # fmt: skip
    if lines:
        label = f"{primary}: difference to {reference}"
        caption = (
            "An arm minus the reference on the same base with the same seed. "
            "A filled diamond is a significant difference."
        )
        drawn.insert(1, Figure(figures.dots(label, lines, label, line=0.0), caption))
    legends = [Legend("Bases", base_keys(ablation.base_names))] if len(ablation.bases) > 1 else []
    return Gallery(drawn, legends)


def _relative_flops(ablation: Ablation) -> dict[str, str]:
    """FLOPs of a run of each arm as a multiple of the reference's; nothing where they are not recorded."""
    flops = means(ablation, lambda cell: sum(cell.cost(kind, "flops") for kind in KINDS))
    whole = flops.get(ablation.reference)
    return {arm: f"x{value / whole:.2f}" for arm, value in flops.items()} if whole else {}


def _before(scores: Mapping[str, Scores]) -> str:
    return mean(np.array(list(scores.values())))


def _name(arm: str, reference: str) -> str:
    return f"{arm} (reference)" if arm == reference else arm
