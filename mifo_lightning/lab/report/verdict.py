"""Which arm is best, and how far is that to be trusted? The sentences before the first question."""

import numpy as np

from mifo_lightning.lab.report import front
from mifo_lightning.lab.report.comparisons import Comparisons, Pair, compare, pairs, primary
from mifo_lightning.lab.report.document import bracketed, difference, intervals, number, p_value, size
from mifo_lightning.lab.report.results import Ablation
from mifo_lightning.lab.report.scores import FEW_BASES, ranked
from mifo_lightning.lab.report.statistics import ALPHA, POWER, Comparison, Interval, bases_needed


def verdict(ablation: Ablation) -> list[str]:
    """Paragraphs: the primary contrast; which arm is highest on the primary metric; how far to trust it."""
    if ablation.sweep:
        return _at_equal_learning(ablation)
    scores, reference = ablation.scores(ablation.primary), ablation.reference
    means, found = intervals(ablation, scores), compare(ablation, scores)
    text = _primary(ablation, found, ablation.primary)
    if not np.isfinite(means[reference].mean):
        return [*text, _without_reference(ablation), *_ends(ablation), _caveats(ablation, found)]
    text += _headline(ablation, means, found)
    text += [" ".join(said) for said in [[*_by_base(ablation, means), *_below(ablation, means)]] if said]
    return [*text, *_ends(ablation), _caveats(ablation, found)]


def _without_reference(ablation: Ablation) -> str:
    done = f"{len(ablation.done(ablation.reference))} of {ablation.runs}"
    return f"Nothing else is compared: the reference {ablation.reference!r} has {done} runs, and so no mean."


def _at_equal_learning(ablation: Ablation) -> list[str]:
    """The same of an ablation whose arms ran at several values of one setting."""
    scores, found = front.equal(ablation), front.at_equal(ablation)
    learned, kept = ablation.trade_off
    what = f"{kept} at {learned} = {ablation.the_sweep.level:g}"
    text = _primary(ablation, found, what)
    reference = ablation.reference
    beside = [(arm, c) for arm in front.ranked(ablation, scores) if (c := found.get((arm, reference)))]
    if beside:
        (top, c), bases = beside[0], len(ablation.bases)
        of = f"on the {c.bases} of {bases} bases where both reach it"
        text.append(f"Beside {reference!r}, {top!r} has most {what}: {difference(c)} {of}. {_significant(found)}")
    else:
        text.append(f"No arm and {reference!r} reach {learned} = {ablation.the_sweep.level:g} on the same base.")
    return [*text, *_ends(ablation), _caveats(ablation, found)]


def _primary(ablation: Ablation, found: Comparisons, what: str) -> list[str]:
    """What was named before the run shows: one contrast, or whether several hold together; nothing if none was."""
    pairs = primary(ablation)
    if len(pairs) < 2:
        return [_contrast(ablation, found, pair, what) for pair in pairs]
    listed = " and ".join(f"{first!r} minus {second!r}" for first, second in pairs)
    holds = "Both hold" if len(pairs) == 2 else "All hold"
    said = f"{holds}." if all(found.beyond.get(pair) for pair in pairs) else "That is not shown."
    together = (
        f"Named before the run: {listed} in {what}, each above the margin of {ablation.margin:g} with a one-sided p "
        f"below {ALPHA / 2:g}. {said}"
    )
    return [together, *(_contrast(ablation, found, pair, what) for pair in pairs)]


def _contrast(ablation: Ablation, found: Comparisons, pair: Pair, what: str) -> str:
    """What one primary contrast shows."""
    first, second = pair
    text = f"Primary contrast, named before the run: {first!r} minus {second!r} in {what}"
    if (c := found.primary.get(pair)) is None:
        return f"{text} has no result: a run of these arms has none."
    where = f", on the {c.bases} of {len(ablation.bases)} bases that have both" if c.bases < len(ablation.bases) else ""
    text += f" is {difference(c)}, {p_value(c.p)}{where}."
    margin = ablation.margin
    close = margin is not None and c.difference.within(margin)
    if c.significant:
        by = ", by less than the margin" if close else ", by more than the margin" if found.beyond.get(pair) else ""
        return f"{text} {first!r} is significantly {'ahead' if c.difference.mean > 0 else 'worse'}{by}."
    if close:
        return f"{text} No difference: its interval lies inside the margin of {margin:g} named beforehand."
    few = " With so few no difference can be significant." if where and c.bases < bases_needed(1) else ""
    return f"{text} Undecided: neither a difference nor that there is none is shown.{few}"


def _headline(ablation: Ablation, means: dict[str, Interval], found: Comparisons) -> list[str]:
    order, reference = ranked(means), ablation.reference
    top = order[0]
    text = f"{top!r} has the highest {ablation.primary}, {bracketed(means[top])}, and "
    c = found.get((top, reference))
    if c is None:
        text += "is the reference." if top == reference else f"is not compared with {reference!r} here."
    elif c.significant:
        text += f"is significantly ahead of {reference!r}, by {size(c.difference)}."
    else:
        text += f"is not significantly ahead of {reference!r}: {difference(c)}."
    return [text, _significant(found)] if found.significant else [f"{text} {_significant(found)}"]


def _significant(found: Comparisons) -> str:
    """Which exploratory differences are."""
    if not found.significant:
        return "No exploratory difference is significant."
    listed = "; ".join(told(pair, c) for pair, c in found.significant.items())
    others = "" if len(found.significant) == len(found.exploratory) else " No other one is."
    return f"Significant among {_exploratory(len(found.exploratory))}: {listed}.{others}"


def _exploratory(count: int) -> str:
    return f"the {count} exploratory comparison{'s' if count > 1 else ''}"


def told(pair: Pair, c: Comparison) -> str:
    """A difference in words."""
    return f"{pair[0]!r} is {'ahead of' if c.difference.mean > 0 else 'worse than'} {pair[1]!r} by {size(c.difference)}"


def _by_base(ablation: Ablation, means: dict[str, Interval]) -> list[str]:
    """How much the lead of the highest arm depends on the base."""
    top, scores = ranked(means)[0], ablation.scores(ablation.primary)
    if top == ablation.reference or not 1 < len(ablation.bases) < FEW_BASES:
        return []
    leads = (scores[top] - scores[ablation.reference]).mean(1)
    by_base = ", ".join(f"{lead:+.3f} on {name}" for name, lead in zip(ablation.base_names, leads, strict=True))
    return [f"By base, {top!r} minus {ablation.reference!r} is {by_base}."]


def _below(ablation: Ablation, means: dict[str, Interval]) -> list[str]:
    """Arms that training has left with less than they began with."""
    before = np.array(list(ablation.scores(ablation.primary, "before").values()))
    if not np.isfinite(before).any():
        return []
    start = float(np.nanmean(before))
    below = [arm for arm in ranked(means) if means[arm].mean < start]
    listed = "; ".join(f"{arm!r}, {number(means[arm].mean)}" for arm in below)
    return [f"Below the models they began from ({number(start)}) end: {listed}."] if below else []


def _ends(ablation: Ablation) -> list[str]:
    """How many runs were scored right after an SFT phase, with no RL after it."""
    told = []
    for arm, names in ablation.swept.items():
        done = [cell for name in names for cell in ablation.done(name)]
        ends = [cell.summary["ends_on"] for cell in done if "ends_on" in cell.summary]
        if "sft" in ends:
            told.append(f"{ends.count('sft')} of {len(ends)} runs of arm {arm!r}")
    return [f"Ended on an SFT phase that no RL follows: {'; '.join(told)}."] if told else []


def _caveats(ablation: Ablation, found: Comparisons) -> str:
    """What so many bases can show, and what they cannot."""
    bases, family = len(ablation.bases), len(pairs(ablation)) - len(primary(ablation))
    text = "The unit is the base. " if bases > 1 else "There is one base: nothing is known about other bases. "
    if primary(ablation):
        text += "The primary contrast is tested as it is, every other comparison is exploratory. "
    else:
        text += "No primary contrast was named before these runs: every comparison is exploratory. "
    text += (
        "A difference is called significant if p, the larger probability of Student's t over bases and of sign flips "
        f"of bases, is below {ALPHA:.2f}"
    )
    text += f"; for {_exploratory(family)} after Holm's correction." if family else "."
    if bases < bases_needed(1):
        text += (
            f" With {bases} {'base' if bases == 1 else 'bases'} no difference can be significant, however large (p is "
            f"at least {2.0 ** (1 - bases):.2g}): one comparison needs {bases_needed(1)} bases"
        )
        text += f", these {family} need {bases_needed(family)}." if family > 1 else "."
    else:
        text += _detectable(ablation, found, family)
    missing = sum(cell.status != "done" for cell in ablation.cells)
    without = (
        f" {missing} of {len(ablation.cells)} runs have no result, see below; their arms have no mean and no rank."
    )
    return text + (without if missing else "")


def _detectable(ablation: Ablation, found: Comparisons, family: int) -> str:
    """The smallest true differences that grids such as this would show."""
    text = ""
    chance = f"in {POWER:.0%} of such grids"
    for c in found.primary.values():
        text += f" A primary difference of {number(c.difference.detectable())} would be found {chance}"
        text += "." if ablation.margin is not None else "; no margin was named, so none can be called absent."
    if len(ablation.bases) < bases_needed(family):
        return (
            f"{text} No exploratory difference can be significant: {family} of them need {bases_needed(family)} bases."
        )
    sizes = [c.difference.detectable(len(found.exploratory)) for c in found.exploratory.values()]
    if sizes:
        ends = f"{number(min(sizes))} to {number(max(sizes))}"
        text += f" An exploratory one of {ends}, by what is compared, would be found {chance} were it the largest."
    return text
