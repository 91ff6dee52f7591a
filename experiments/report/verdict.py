"""Which arm is best, and how far is that to be trusted? The sentences before the first question."""

import numpy as np

from experiments.report.document import bracketed, difference, intervals, number, size
from experiments.report.results import Ablation
from experiments.report.scores import ranked
from experiments.report.statistics import Comparison, Interval, compare

FEW_BASES = 10


def verdict(ablation: Ablation) -> list[str]:
    """Paragraphs: which arm is highest on the primary metric; what else is significant; how far to trust it."""
    scores, reference = ablation.scores(ablation.primary), ablation.reference
    means = intervals(ablation, scores)
    if not np.isfinite(means[reference].mean):
        return [f"Nothing can be compared: the reference {reference!r} has no run with {ablation.primary}."]
    comparisons = compare(scores, reference, ablation.design)
    text = _headline(ablation.primary, reference, means, comparisons)
    text += [" ".join(found) for found in [[*_by_base(ablation, means), *_below(ablation, means)]] if found]
    return [*text, _caveats(ablation, comparisons)]


def _headline(primary: str, reference: str, means: dict[str, Interval], others: dict[str, Comparison]) -> list[str]:
    if not any(c.cells for c in others.values()):
        return [f"Nothing can be compared: no arm but the reference {reference!r} has a run with {primary}."]
    order = ranked(means)
    top, significant = order[0], [arm for arm in order if arm in others and others[arm].significant]
    text = f"{top!r} has the highest {primary}, {bracketed(means[top])}, and "
    if top == reference:
        text += "is the reference."
    elif top in significant:
        text += f"is significantly ahead of {reference!r}, by {size(others[top].difference)}."
    else:
        text += f"is not significantly ahead of {reference!r}: {difference(others[top])}."
    if not significant:
        return [f"{text} No arm differs significantly from {reference!r}."]
    rest = []
    for word, sign in (("ahead of", 1), ("worse than", -1)):
        named = [arm for arm in significant if arm != top and others[arm].difference.mean * sign > 0]
        listed = "; ".join(f"{arm!r} by {size(others[arm].difference)}" for arm in named)
        if named:
            also = "Also significantly" if top in significant and sign > 0 else "Significantly"
            rest.append(f"{also} {word} {reference!r}: {listed}.")
    if len(significant) < len(others):
        rest.append("No other difference to it is significant.")
    return [text, " ".join(rest)] if rest else [text]


def _by_base(ablation: Ablation, means: dict[str, Interval]) -> list[str]:
    """How much the lead of the highest arm depends on the base."""
    top, scores = ranked(means)[0], ablation.scores(ablation.primary)
    lead = scores[top] - scores[ablation.reference]
    if top == ablation.reference or not 1 < len(ablation.bases) < FEW_BASES or not np.isfinite(lead).any(1).all():
        return []
    by_base = ", ".join(
        f"{np.nanmean(row):+.3f} on {name}" for name, row in zip(ablation.base_names, lead, strict=True)
    )
    return [f"By base, {top!r} minus {ablation.reference!r} is {by_base}."]


def _below(ablation: Ablation, means: dict[str, Interval]) -> list[str]:
    """Arms that training has left with less than they began with."""
    before = np.array(list(ablation.scores(ablation.primary, "before").values()))
    if not np.isfinite(before).any():
        return []
    start = float(np.nanmean(before))
    below = [arm for arm in ranked(means) if means[arm].mean < start]
    listed = "; ".join(f"{arm!r}, {number(means[arm].mean)}" for arm in below)
    return [f"Below the untrained base models ({number(start)}) end: {listed}."] if below else []


def _caveats(ablation: Ablation, comparisons: dict[str, Comparison]) -> str:
    text = (
        f"Every arm is compared with {ablation.reference!r}, run by run. A difference is called significant if its "
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
