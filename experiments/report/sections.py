"""Which arm is best, what do its models answer, and how was it found out? The sections about results."""

import json

import numpy as np

from experiments.report import figures
from experiments.report.document import Figure, Section, Table, bracketed, difference, intervals, mean, probability
from experiments.report.results import Ablation, samples
from experiments.report.statistics import Comparison, Interval, compare

MARKS = "Small marks are runs (their shape is the base), the diamond is the mean, the bar its 95 % interval."
FEW_BASES = 10
RESPONSES = 4
"""Shown of each arm."""
CHARACTERS = 1200
"""Shown of a response; a longer one is cut in its middle."""


def verdict(ablation: Ablation) -> list[str]:
    """Paragraphs: which arm is highest on the primary metric; what else is significant; how far to trust it."""
    scores, reference = ablation.scores(ablation.primary), ablation.reference
    means = intervals(ablation, scores)
    if not np.isfinite(means[reference].mean):
        return [f"Nothing can be compared: the reference {reference} has no run with {ablation.primary}."]
    comparisons = compare(scores, reference, ablation.design)
    return [*_headline(ablation.primary, reference, means, comparisons), _caveats(ablation, comparisons)]


def _headline(primary: str, reference: str, means: dict[str, Interval], others: dict[str, Comparison]) -> list[str]:
    if not any(c.cells for c in others.values()):
        return [f"Nothing can be compared: no arm but the reference {reference} has a run with {primary}."]
    order = _order(means)
    top, significant = order[0], [arm for arm in order if arm in others and others[arm].significant]
    text = f"{top} has the highest {primary}, {bracketed(means[top])}, and "
    if top == reference:
        text += "is the reference."
    elif top in significant:
        text += f"is significantly ahead of {reference}, by {difference(others[top])}."
    else:
        text += f"is not significantly ahead of {reference}: {difference(others[top])}."
    if not significant:
        return [f"{text} No arm differs significantly from {reference}."]
    rest = []
    for word, sign in (("ahead of", 1), ("behind", -1)):
        named = [arm for arm in significant if arm != top and others[arm].difference.mean * sign > 0]
        listed = "; ".join(f"{arm} by {difference(others[arm])}" for arm in named)
        if named:
            also = "Also significantly" if top in significant and sign > 0 else "Significantly"
            rest.append(f"{also} {word} {reference}: {listed}.")
    if len(significant) < len(others):
        rest.append("No other difference is significant.")
    return [text, " ".join(rest)] if rest else [text]


def _caveats(ablation: Ablation, comparisons: dict[str, Comparison]) -> str:
    text = (
        f"Every arm is compared with {ablation.reference} only, run by run. A difference is called significant if its "
        "95 % interval excludes 0 and its probability under chance, corrected for the number of comparisons, is below "
        "0.05."
    )
    cells = max((c.cells for c in comparisons.values()), default=0)
    if cells and len(comparisons) * 2.0 ** (1 - cells) >= 0.05:
        text += (
            f" With {cells} runs in {len(comparisons)} comparisons no difference can be significant, however large "
            f"(the smallest possible corrected probability is {min(1.0, len(comparisons) * 2.0 ** (1 - cells)):.2f})."
        )
    if len(ablation.bases) == 1:
        text += " There is one base: nothing is known about other bases."
    elif len(ablation.bases) < FEW_BASES:
        text += (
            f" There are {len(ablation.bases)} bases: read the intervals as too narrow, and the probabilities as being "
            "about these bases."
        )
    missing = sum(cell.status != "done" for cell in ablation.cells)
    return text + (f" {missing} of {len(ablation.cells)} runs have no result, see below." if missing else "")


def best(ablation: Ablation) -> Section:
    """Final scores and differences to the reference."""
    primary, reference = ablation.primary, ablation.reference
    scores = ablation.scores(primary)
    means = intervals(ablation, scores)
    order, comparisons = _order(means), compare(scores, reference, ablation.design)
    strips = {arm: [figures.Strip(scores[arm], means[arm])] for arm in order}
    differences = {
        arm: [figures.Strip(scores[arm] - scores[reference], c.difference, hollow=not c.significant)]
        for arm in order
        if (c := comparisons.get(arm))
    }
    drawn = [
        Figure(figures.dots(primary, strips, primary, line=means[reference].mean, bold=reference), MARKS),
    ]
    if differences:
        label = f"{primary}: difference to {reference}"
        drawn.append(
            Figure(
                figures.dots(label, differences, label, line=0.0),
                "The same run by run: an arm minus the reference on the same base with the same seed. "
                "A filled diamond is a significant difference.",
            )
        )
    for metric in ablation.metrics:
        values = ablation.scores(metric)
        found = intervals(ablation, values)
        rows = {arm: [figures.Strip(values[arm], found[arm])] for arm in order}
        drawn.append(Figure(figures.dots(metric, rows, metric, line=found[reference].mean, bold=reference)))
    legend = figures.keys(ablation.bases) if len(ablation.bases) > 1 else []
    folded = []
    if len(ablation.bases) > 1:
        rows_by_base = [[_name(arm, reference), *(mean(base) for base in scores[arm])] for arm in order]
        folded.append(Table(f"{primary} by base, mean over seeds", ["arm", *ablation.bases], rows_by_base))
    table = _scores_table(ablation, order, comparisons)
    return Section("Which arm is best?", [], [table], legend, drawn, folded=folded)


def _scores_table(ablation: Ablation, order: list[str], comparisons: dict[str, Comparison]) -> Table:
    metrics = [ablation.primary, *(m for m in ablation.metrics if m != ablation.primary)]
    found = {metric: intervals(ablation, ablation.scores(metric)) for metric in metrics}
    rows = []
    for arm in order:
        row = [_name(arm, ablation.reference), bracketed(found[ablation.primary][arm])]
        c = comparisons.get(arm)
        row += [difference(c), f"{c.ahead} of {c.cells}", probability(c.p)] if c else ["", "", ""]
        row += [bracketed(found[metric][arm]) for metric in metrics[1:]]
        rows.append([*row, f"{len(ablation.done(arm))} of {len(ablation.bases) * len(ablation.seeds)}"])
    before = [mean(np.array(list(ablation.scores(metric, "before").values()))) for metric in metrics]
    rows.append(["before training", before[0], "", "", "", *before[1:], ""])
    header = ["arm", metrics[0], f"difference to {ablation.reference}", "ahead in", "p (Holm)", *metrics[1:], "runs"]
    return Table("Mean over runs [95 % interval] after training, highest first", header, rows)


def responses(ablation: Ablation) -> Section:
    """A few graded responses of each arm, written by models: folded."""
    folded = []
    for arm in ablation.names:
        for cell in ablation.done(arm)[:1]:
            rows = [
                [
                    *(str(row[key]) for key in ("source", "prompt")),
                    _cut(str(row["response"])),
                    str(row["truth"]),
                    str(row["reward"]),
                ]
                for row in samples(cell, RESPONSES)
            ]
            if rows:
                title = f"{arm}, base {cell.base}, seed {cell.seed}"
                folded.append(Table(title, ["source", "prompt", "response", "truth", "reward"], rows))
    question = "What do the trained models answer?"
    if not folded:
        return Section(question, ["Not recorded: the monitor samples would show it."])
    return Section(
        question, ["The last recorded response of each source, from one run of each arm."], folded=folded, prose=True
    )


def unfinished(ablation: Ablation) -> Section:
    """Failed and missing runs."""
    question = "Which runs are not in these numbers?"
    rows = [
        [cell.arm, cell.base, str(cell.seed), cell.status, cell.error or ""]
        for cell in ablation.cells
        if cell.status != "done"
    ]
    if not rows:
        return Section(question, [f"None: all {len(ablation.cells)} runs are done."])
    text = f"{len(rows)} of {len(ablation.cells)} runs are not done. Means are over the runs that are."
    return Section(
        question, [text], [Table("Runs without a result", ["arm", "base", "seed", "status", "error"], rows)], prose=True
    )


def made(ablation: Ablation) -> Section:
    """The arms, the command, and what an interval means."""
    how = (
        "bases and seeds were resampled independently, as every base has the same seeds"
        if ablation.design == "crossed"
        else "bases were resampled, then seeds within each base"
    )
    text = [
        f"Made by: {ablation.command}, at commit {ablation.commit}. Bases: {', '.join(ablation.bases)}. Seeds: "
        f"{', '.join(map(str, ablation.seeds))}. The primary metric, {ablation.primary}, was set in the configuration.",
        f"An interval is a 95 % percentile bootstrap interval of the mean over runs, from 10,000 resamples: {how}. "
        "With 3 bases that differ as much as runs do, such intervals cover the truth in about 81 % of cases instead of "
        "95 %; with one base they say nothing about other bases.",
        "p is the two-sided probability of a mean difference at least as large if each run's difference could as well "
        "have the opposite sign (all assignments of signs up to 16 runs), corrected by Holm's method for all arms "
        "compared with the reference on the primary metric. It treats runs as independent. Other metrics and pictures "
        "are descriptive.",
    ]
    rows = [
        [arm.name, ", ".join(arm.configs), ", ".join(f"{key} = {json.dumps(value)}" for key, value in arm.set.items())]
        for arm in ablation.arms
    ]
    return Section(
        "How was this made?", text, [Table("Arms", ["arm", "configuration files", "settings"], rows)], prose=True
    )


def _order(means: dict[str, Interval]) -> list[str]:
    """Arms from the highest mean to the lowest, then those without one."""
    return sorted(means, key=lambda arm: -means[arm].mean if np.isfinite(means[arm].mean) else np.inf)


def _name(arm: str, reference: str) -> str:
    return f"{arm} (reference)" if arm == reference else arm


def _cut(text: str) -> str:
    half = CHARACTERS // 2
    return text if len(text) <= CHARACTERS else f"{text[:half]} […] {text[-half:]}"
