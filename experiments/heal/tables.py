"""The tables of a study: means over bases with intervals, every claim beside its controls."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from experiments.heal.fits import HALF_RATE, NO_UPDATE, OTHER_SEED
from experiments.heal.restoration import at_equal, units
from experiments.heal.results import Results
from experiments.heal.settings import END, PEAK, Start
from experiments.heal.spectra import TURN
from experiments.heal.verdict import NO_FALL, UNCLEAR, restored, told
from mifo_lightning.lab.report.document import bracketed, number, probability
from mifo_lightning.lab.report.statistics import ALPHA, Scores, interval, judge

Rows = list[list[str]]
DISTANCES = {"peak": "norm", "end": "from end"}
"""Where a record of an edit has its distance."""
SIGNALS = ("groups with signal", "positive", "advantage entropy")


def markdown(header: Sequence[str], rows: Rows) -> str:
    """A table."""
    texts = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (header, *rows)]
    head, *body = (f"| {text} |" for text in texts)
    return "\n".join([head, "|" + "---|" * len(header), *body])


def sweep_table(results: Results) -> str:
    """Along SFT: accuracies on test, losses, what RL would have to work with, and half the rate beside it."""
    study, rows = results.study, []
    losses = [key for key in study.metrics[len(accuracies(results)) :] if np.isfinite(results.swept(0, key)).all()]
    for step in study.sweep.steps:
        cells = [mean(results.swept(step, key)) for key in (*accuracies(results), *losses)]
        cells += [mean(results.signal(step, key)) for key in SIGNALS]
        rows.append([f"{step}", *cells, *(mean(results.swept(step, key, HALF_RATE)) for key in accuracies(results))])
    halves = [f"half rate: {key}" for key in accuracies(results)]
    return markdown(["SFT steps", *accuracies(results), *losses, *SIGNALS, *halves], rows)


def checkpoint_table(results: Results) -> str:
    """The checkpoints that four rules choose, on test."""
    bases = list(results.bases.values())
    rules = {
        "peak: highest OOD on val": [base["peak"] for base in bases],
        "least loss on seen ID questions": [base["least train loss"] for base in bases],
        "least loss on unseen ID questions": [base["least test loss"] for base in bases],
        "end": [results.study.last for _ in bases],
    }
    rows = []
    for rule, steps in rules.items():
        if None not in steps:
            cells = [bracketed(interval(results.at_steps(steps, key))) for key in accuracies(results)]
            rows.append([rule, ", ".join(map(str, steps)), *cells])
    return markdown(["checkpoint", "SFT steps by base", *accuracies(results)], rows)


def rl_table(results: Results) -> str:
    """Every arm from every start, before and after, and its share of what was lost."""
    study, rows = results.study, []
    arms = {name: arm.start for name, arm in study.rl.items()} | {NO_UPDATE: [END]}
    for arm, starts in arms.items():
        for start in starts:
            cells = [arm, _named(start)]
            for key in accuracies(results):
                before, after = results.swept(start, key), results.after(arm, start, key)
                cells += [mean(after), told(interval(after - before))]
            rows.append([*cells, share_restored(results, arm, start), _mean_steps(results, arm, start)])
    header = [text for key in accuracies(results) for text in (key, "minus its start")]
    return markdown(["arm", "from", *header, "R", "optimizer steps"], rows)


def share_restored(results: Results, arm: str, start: Start) -> str:
    """R of an arm, and of how many bases; or that there is none."""
    found = restored(results, arm, start)
    if found:
        return f"{told(found[0])} ({found[1]})"
    return UNCLEAR if results.fallen(start) else NO_FALL


def floor_table(results: Results) -> str:
    """How large a difference is without any cause: other draws, another seed; and half the rate at equal ID."""
    study, rows = results.study, []
    for key in accuracies(results):
        end = results.swept(END, key)
        draws = units([_deviation([each["test"][key] for each in base["noise"].values()])
                       for base in results.bases.values()])  # fmt: skip
        other = np.abs(results.swept(END, key, OTHER_SEED) - end)
        half = [
            at_equal(
                [tuple(base[HALF_RATE][str(s)]["test"][k] for k in (study.matched, key)) for s in study.sweep.steps],
                base["sweep"][str(study.last)]["test"][study.matched],
            )
            for base in results.bases.values()
        ]
        difference = told(interval(units([float(np.mean(read.passes)) for read in half]) - end))
        missed = sum(not read.met for read in half)
        rows.append([key, mean(end), mean(draws), mean(other), difference + _missed(missed)])
    header = [
        "at the end",
        "sd over draws",
        "other seed, abs. difference",
        f"half rate at equal {study.matched}, minus",
    ]
    return markdown(["", *header], rows)


def spectra_table(results: Results) -> str:
    """Each pair and its reference rows at every k, means over matrices, then over bases."""
    pairs = dict.fromkeys(pair for base in results.bases.values() for pair in base["spectra"])
    rows = []
    for pair in pairs:
        having = [base["spectra"][pair] for base in results.bases.values() if pair in base["spectra"]]
        for row in having[0]:
            each = [records[row] for records in having]
            values = [_mean_of(each, key) for key in ("relative_median", "relative_max", "values")]
            label = [pair, row, str(len(having)), *values]
            for k in each[0]["turns"]:
                turns = [dict(zip(TURN, one["turns"][k], strict=True)) for one in each]
                rows.append([*label, k, *_turn(turns)])
                label = [""] * len(label)
    header = ["pair", "row", "bases", "rel. ds median", "max", "|ds| / |dW|", "k", "left angle, mean / max",
              "right angle, mean / max", "distance, left / right", "energy / chance", "gap", "no bound"]  # fmt: skip
    return markdown(header, rows)


def _turn(turns: list[dict[str, Any]]) -> list[str]:
    """Angles, distances and bounds of one k, means over bases."""
    sides = ("left", "right")
    angles = [f"{_mean_of(turns, f'{side}_mean')} / {_mean_of(turns, f'{side}_max')}" for side in sides]
    distances = " / ".join(_mean_of(turns, f"{side}_distance") for side in sides)
    return [*angles, distances, *(_mean_of(turns, key) for key in ("energy", "gap", "unbounded"))]


def _mean_of(records: list[dict[str, Any]], key: str) -> str:
    """The mean over bases of a value of their records; a dash where one has none."""
    return mean(units([float("nan") if one[key] is None else one[key] for one in records]))


def edit_table(results: Results) -> str:
    """What is put back, against interpolation; the exploratory family is corrected by Holm's method."""
    study = results.study
    tried = [n for n in results.edits if results.family(n) == "restoration" and n != study.edits.primary]
    judged = judge({name: results.over_interpolation(name) for name in tried})
    rows = []
    for name, members in _rows_of(results):
        family, label = results.family(members[0]), name + (" (primary)" if name == study.edits.primary else "")
        p = probability(judged[name].p) if name in judged else ""
        if family not in ("reverse", "random change"):
            rows.append([label, family, *_edit_cells(results, members), p, _published(results, members[0])])
    equal = ("distance", f"OOD at equal {study.matched}", "OOD at equal norm", f"{study.matched} at equal norm")
    return markdown(["edit", "family", *accuracies(results), *equal, "p (Holm)", "|U'U - I|, early"], rows)


def _edit_cells(results: Results, members: list[str]) -> list[str]:
    """Accuracies, distance and differences to interpolation; of a random subspace the means over its seeds."""
    study = results.study

    def over_members(of: Callable[[str], Scores]) -> Scores:
        return np.mean([of(member) for member in members], axis=0)

    cells = [_spread(results, members, key) for key in accuracies(results)]
    missed = _missed(max(map(results.unequal, members)))
    cells += [mean(over_members(results.norm)), told(interval(over_members(results.over_interpolation))) + missed]
    if results.family(members[0]) not in ("restoration", "random subspace"):
        return [*cells, "", ""]
    for key in (study.ood, study.matched):
        cells.append(told(interval(over_members(partial(results.over_equal_norm, metric=key)))))
    return cells


def other_edits(results: Results, family: str, against: str) -> str:
    """Edits of a family against another one of the records in OOD, such as the end (`interpolation 1`)."""
    study, rows = results.study, []
    for name in results.edits:
        if results.family(name) == family:
            gain = results.edit(name, study.ood) - _reference(results, against)
            distance = units([base["edits"][name].get(DISTANCES[against], np.nan) for base in results.edited])
            cells = [mean(results.edit(name, key)) for key in accuracies(results)]
            rows.append([name, mean(distance), *cells, told(interval(gain))])
    return markdown(["edit", f"|W - {against}|", *accuracies(results), f"OOD minus {against}"], rows)


def family_note(results: Results) -> str:
    """What Holm's correction leaves of the exploratory rows."""
    tried = sum(results.family(name) == "restoration" for name in results.edits) - 1
    least = min(1.0, tried * 2.0 ** (1 - len(results.edited)))
    text = f"p is corrected for {tried} exploratory rows; on {len(results.edited)} bases none can be below {least:.3f}"
    return f"{text}{'; no single row can be significant' if least >= ALPHA else ''}."


def _missed(bases: int) -> str:
    """How many bases had no point of equal accuracy."""
    return f" ({bases} not equal)" if bases else ""


def accuracies(results: Results) -> list[str]:
    """The accuracies of a study."""
    study = results.study
    return [key for key in (study.id_seen, study.id, study.ood) if key]


def _deviation(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def mean(values: Scores) -> str:
    """The mean over bases; a dash if one has none."""
    return number(float(values.mean())) if np.isfinite(values).all() else "-"


def _reference(results: Results, against: str) -> Scores:
    edits = {"end": "interpolation 1", "peak": "rollback everything"}
    if against == "peak" and edits["peak"] not in results.edits:
        return units([base["sweep"][str(base["peak"])]["test"][results.study.ood] for base in results.edited])
    return results.edit(edits[against], results.study.ood)


def _rows_of(results: Results) -> list[tuple[str, list[str]]]:
    """Edits, those that differ by a seed as one row."""
    rows: dict[str, list[str]] = {}
    for name in results.edits:
        random = results.family(name) == "random subspace"
        rows.setdefault(name.rpartition(", ")[0] if random else name, []).append(name)
    return list(rows.items())


def _spread(results: Results, members: list[str], metric: str) -> str:
    """The mean over bases and members, and the range of the members' means where there are several."""
    means = [float(results.edit(m, metric).mean()) for m in members]
    text = number(float(np.mean(means)))
    return text if len(means) == 1 else f"{text} ({number(min(means))} to {number(max(means))})"


def _published(results: Results, name: str) -> str:
    found = [base["edits"][name] for base in results.edited]
    if "orthonormality" not in found[0]:
        return ""
    return ", ".join(mean(units([record[key] for record in found])) for key in ("orthonormality", "early"))


def _mean_steps(results: Results, arm: str, start: Start) -> str:
    found = [base["rl"][f"{arm}/{results.step(base, start)}"]["optimizer steps"] for base in results.bases.values()]
    return f"{np.mean(found):.0f}"


def _named(start: Start) -> str:
    return {0: "base", PEAK: PEAK, END: END}.get(start, f"step {start}")
