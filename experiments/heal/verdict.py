"""What a study shows, in sentences: the fall, what RL brings back, and the edit that was named beforehand."""

from collections.abc import Callable, Sequence

import numpy as np

from experiments.heal.factorial import UNTRAINED
from experiments.heal.fits import OTHER_SEED, SWEEP, protected_runs
from experiments.heal.restoration import ERRORS, RATIO_ERRORS, fall_over_bases, share_of, units
from experiments.heal.results import Results
from experiments.heal.settings import END, PEAK, Start
from experiments.heal.tries import SAMPLES, SWEPT
from mifo_lightning.lab.report.document import bracketed, p_value
from mifo_lightning.lab.report.statistics import ALPHA, Comparison, Interval, Scores, bases_needed, interval, judge

NO_FALL = "no fall to restore"
EARLIER = "the sweep stopped earlier"
UNCLEAR = f"the fall is less than {RATIO_ERRORS:g} standard errors over bases"


def verdict(results: Results) -> list[str]:
    """Paragraphs: the fall, the peak against the least loss, RL from the end, the primary edit, what to trust."""
    return [
        _fall(results),
        *_rows(results),
        *_regret(results),
        *_slower(results),
        _healing(results),
        *_tries(results),
        *_edit(results),
        _caveats(results),
    ]


def restored(results: Results, arm: str, start: Start) -> tuple[Interval, int] | None:
    """R of an arm over the bases whose peak comes before its start, and their number; None without a clear fall."""
    if not results.fallen(start) or not is_clear(results, start):
        return None
    after = dict(zip(results.bases, results.after(arm, start, results.study.ood)[:, 0], strict=True))
    falls = results.falls(start)
    gains = units([after[base] - fall.end.value for base, fall in falls.items()])
    return share_of(gains, units([fall.size for fall in falls.values()])), len(falls)


def is_clear(results: Results, start: Start = END) -> bool:
    """Whether the fall to a checkpoint is large enough beside its error over bases to be divided by."""
    found = fall_over_bases(list(results.falls(start).values()))[0]
    return len(results.bases) == 1 or bool(found.mean > RATIO_ERRORS * found.error)


def primary(results: Results) -> Comparison | None:
    """The primary edit minus the interpolation of equal ID accuracy; None without edits."""
    name = results.study.edits.primary
    return judge({name: results.over_interpolation(name)})[name] if results.edited else None


def _fall(results: Results) -> str:
    falls = list(results.falls().values())
    (found, _), real = fall_over_bases(falls), sum(fall.real for fall in falls)
    steps = ", ".join(f"{base['peak']}" for base in results.bases.values())
    text = f"Out of distribution, peak (chosen on val, at SFT step {steps}) minus end: {told(found)}"
    text += (
        f"; on {real} of {len(results.bases)} bases by more than {ERRORS:g} standard errors over different questions."
    )
    again = results.at_steps([base["peak"] for base in results.bases.values()], results.study.ood, OTHER_SEED)
    unchosen = interval(again - results.at_steps([results.study.last] * len(again), results.study.ood, OTHER_SEED))
    text += f" In the run of another seed, which chose no step, from the same step to its end: {told(unchosen)}."
    if results.fallen():
        return text
    return f"**{NO_FALL.capitalize()}.** {text}"


def _rows(results: Results) -> list[str]:
    """What is left of the fall without rows of embedding and head that training can only push away."""
    if UNTRAINED not in results.edits:
        return []
    ood = results.study.ood
    back, end = (results.edit(name, ood) for name in (UNTRAINED, "interpolation 1"))
    text = "Put back the rows of embedding and head of tokens that training never shows, and OOD at the end changes by"
    return [f"{text} {told(interval(back - end))}: what changes so is no loss of the layers."]


def _regret(results: Results) -> list[str]:
    """What choosing by loss costs."""
    lines = []
    peak = results.swept(PEAK, results.study.ood)
    for key, what in (("least test loss", "unseen"), ("least train loss", "seen")):
        steps = [base[key] for base in results.bases.values()]
        if all(step is not None for step in steps):
            chosen = results.at_steps(steps, results.study.ood)
            lines.append(f"of least loss on {what} ID questions {told(interval(peak - chosen))}")
    return [f"OOD of the peak minus that of the checkpoint {'; '.join(lines)}."] if lines else []


def _slower(results: Results) -> list[str]:
    """How much of the fall a smaller step, or a protected one, avoids without any RL, and beyond stopping earlier."""
    study, lines = results.study, []
    found = {run: results.at_equal_matched(run, study.ood) for run in results.slower}
    for run, read in found.items():
        gain, share = read.values - results.swept(END, study.ood), ""
        if results.fallen() and is_clear(results):
            share = f", {told(share_of(gain, units([fall.size for fall in results.falls().values()])))} of the fall"
        beyond = told(interval(read.values - found[SWEEP].values))
        name, beyond = (EARLIER, "") if run == SWEEP else (run, f", {beyond} beyond {EARLIER}")
        unmet = ""
        if read.missed:
            unmet = f" ({read.missed} of {len(gain)} bases never have it, the nearest lacks {-read.gaps.mean():.3f})"
        lines.append(f"{name} {told(interval(gain))}{share}{beyond}{unmet}")
    text = f"Without RL, SFT with the end's {study.matched}, in OOD minus the end: {'; '.join(lines)}."
    protected = [found[run].values for run in protected_runs(study) if run in found]
    if len(protected) == 2:
        text += f" Main directions minus as many at random: {told(interval(protected[0] - protected[1]))}."
    return [text]


def _tries(results: Results) -> list[str]:
    """The same by the lenient measure, right at least once."""
    study = results.study
    if not results.tried:
        return []
    key = f"{study.ood.rpartition('/')[0]}/pass@{SAMPLES}"
    peak, end, healed = (
        results.of_tries(arm, start, key) for arm, start in ((SWEPT, PEAK), (SWEPT, END), (study.main, END))
    )
    return [
        f"Counted as right at least once in {SAMPLES} independent tries (the paper: in five turns with a verifier), "
        f"OOD of the peak minus the end is {told(interval(peak - end))}, and {study.main} from the end changes it by "
        f"{told(interval(healed - end))}."
    ]


def _healing(results: Results) -> str:
    """What RL from the end does, what of it other starts and arms do too, and its share of the fall."""
    study = results.study
    text = f"{study.main} from the end changes OOD by {told(interval(gain(results, study.main, END)))}"
    others = [(study.main, start) for start in (0, PEAK) if start in study.rl[study.main].start]
    others += [(arm, END) for arm, stage in study.rl.items() if arm != study.main and END in stage.start]
    beyond = [
        f"{told(interval(gain(results, study.main, END) - gain(results, arm, start)))} more than {arm} from "
        f"{'the base' if start == 0 else f'the {start}'}"
        for arm, start in others
    ]
    text += f" ({'; '.join(beyond)})" if beyond else ""
    if not results.fallen():
        return f"{text}. R = mean(RL - end) / mean(peak - end) is undefined: {NO_FALL}."
    found = restored(results, study.main, END)
    if found is None:
        return f"{text}. R = mean(RL - end) / mean(peak - end) is not given: {UNCLEAR}."
    return f"{text}; R = mean(RL - end) / mean(peak - end) is {told(found[0])} over {found[1]} bases."


def gain(results: Results, arm: str, start: Start) -> Scores:
    """What an arm of stage 2 changes OOD by, from its start: [bases, 1]."""
    return results.after(arm, start, results.study.ood) - results.swept(start, results.study.ood)


def _edit(results: Results) -> list[str]:
    study, found = results.study, primary(results)
    if found is None:
        late = all(base["peak"] == study.last for base in results.bases.values())
        return [f"No edits: {'the peak is the end on every base' if late else NO_FALL}."]
    name = study.edits.primary
    lowest = interval(results.over_interpolation(name, min))
    text = f"OOD of `{name}` minus interpolation at equal {study.matched}: delta = {told(found.difference)}"
    counted, unequal = f"{found.ahead} of {found.bases} bases ahead", results.unequal(name)
    if not study.verdict:
        lines = [f"{text}, {counted}; described, not judged."]
    elif not results.fallen():
        lines = [f"{text}, {counted}; {NO_FALL}, so that this says nothing of restoration."]
    elif unequal:
        lines = [
            f"{text}, {counted}; on {unequal} of {found.bases} bases no interpolation has its {study.matched}, and the "
            "nearest one is better in one accuracy and worse in the other, so that nothing is judged."
        ]
    else:
        fair = not any(results.unequal(each) for each in _random_names(results, name))
        over_random = [interval(gain) for gain in _over_random(results, name)] if fair else []
        what = _judged(found, lowest, over_random, study.matched)
        lines = [f"**{what}**: delta = {told(found.difference)}, {p_value(found.p)}, {counted}."]
    if lowest.mean != found.difference.mean:
        lines.append(
            f"The line from peak to end passes that {study.matched} more than once on some base: delta is against its "
            f"highest OOD there, against the lowest it is {told(lowest)}."
        )
    equal = interval(results.over_equal_norm(name, study.ood))
    lost = interval(results.over_equal_norm(name, study.matched))
    lines.append(f"At equal |W - peak| it is {told(equal)} in OOD and {told(lost)} in {study.matched}.")
    return [*lines, _against_random(results, name)]


def _judged(found: Comparison, over_lowest: Interval, over_random: Sequence[Interval], matched: str) -> str:
    """The bold line: what holds whichever of several passes of the path a random subspace is compared with.

    Without `over_random` no subspace at random has a fair comparison.
    """
    what = f"interpolation at equal {matched}"
    if not found.significant or (found.difference.mean < 0 and not over_lowest.high < 0):
        return f"Top-k restoration is not told from {what}"
    if found.difference.mean < 0:
        return f"Top-k restoration loses to {what}"
    if not over_random:
        return f"Putting back a part beats {what}; the top k is not judged against random subspaces"
    if all(gain.low > 0 for gain in over_random):
        return f"Top-k restoration beats {what}"
    than = "worse than" if all(gain.high < 0 for gain in over_random) else "not told from"
    return f"Putting back a part beats {what}; the top k is {than} random subspaces"


def _against_random(results: Results, name: str) -> str:
    study = results.study
    highest, lowest = (interval(gain) for gain in _over_random(results, name))
    unequal = sum(results.unequal(each) for each in _random_names(results, name))
    told_of = f" (against lowest passes {told(lowest)})" if lowest.mean != highest.mean else ""
    text = (
        f"Random subspaces of the same dimension, on the same measure: {told(interval(_random(results, name, max)))}; "
        f"the edit minus them {told(highest)}{told_of}"
    )
    drawn = len(results.edited) * study.edits.seeds
    text += f"; of {drawn} random ones {unequal} have a {study.matched} that no interpolation has" if unequal else ""
    near = np.mean([results.over_equal_norm(each, study.ood) for each in _random_names(results, name)], axis=0)
    equal = told(interval(results.over_equal_norm(name, study.ood) - near))
    return f"{text}. Each against the interpolation of its own |W - peak|, the edit minus them is {equal} in OOD."


def _over_random(results: Results, name: str) -> tuple[Scores, Scores]:
    """What the edit gains over interpolation minus what random subspaces do: by the highest passes, by the lowest.

    The highest alone would favour the edit: random subspaces stay near the end, where the path turns back most.
    """
    highest, lowest = (results.over_interpolation(name, of) - _random(results, name, of) for of in (max, min))
    return highest, lowest


def _random(results: Results, name: str, of: Callable[[list[float]], float]) -> Scores:
    """Mean over seeds of what random subspaces of the edit's kind and dimension gain over interpolation."""
    return np.mean([results.over_interpolation(each, of) for each in _random_names(results, name)], axis=0)


def _random_names(results: Results, name: str) -> list[str]:
    kind, _, k = name.split()[:3]
    return [f"random {kind} {k}, {seed}" for seed in range(results.study.edits.seeds)]


def _caveats(results: Results) -> str:
    bases, study = len(results.bases), results.study
    text = "Intervals are 95 %, Student's t over bases. "
    if bases == 1:
        text = "There is one base: nothing is known about other bases, and nothing has an interval. "
    elif bases < bases_needed(1):
        text += f"With {bases} bases no difference can be significant: {bases_needed(1)} are needed. "
    text += (
        "The primary edit was named before it was run and is tested as it is (p: the larger of Student's t and of "
        f"sign flips of bases, level {ALPHA:.2f}); every other row is exploratory. The peak is chosen on val and all "
        "is reported on test. R is of means over bases, its interval by the jackknife."
    )
    return text if study.verdict else f"{text} This study describes."


def told(found: Interval) -> str:
    """A signed mean and its interval."""
    return bracketed(found, "+")
