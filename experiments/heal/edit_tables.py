"""What is put back: every edit beside the line from peak to end, random changes, and parts of RL's change."""

from collections.abc import Callable
from functools import partial

import numpy as np

from experiments.heal.factorial import moves_matrices_alone
from experiments.heal.restoration import share_of, units
from experiments.heal.results import Results
from experiments.heal.tables import accuracies, markdown, mean
from experiments.heal.verdict import is_clear, told
from mifo_lightning.lab.report.document import number, probability
from mifo_lightning.lab.report.statistics import ALPHA, Scores, interval, judge


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
    equal = (
        "distance",
        "share of the fall",
        f"OOD at equal {study.matched}",
        "OOD at equal norm",
        f"{study.matched} at equal norm",
    )
    return markdown(["edit", "family", *accuracies(results), *equal, "p (Holm)", "|U'U - I|, early"], rows)


def _edit_cells(results: Results, members: list[str]) -> list[str]:
    """Accuracies, distance and differences to interpolation; of a random subspace the means over its seeds."""
    study = results.study

    def over_members(of: Callable[[str], Scores]) -> Scores:
        return np.mean([of(member) for member in members], axis=0)

    cells = [_spread(results, members, key) for key in accuracies(results)]
    missed = _missed(max(map(results.unequal, members)))
    ends = results.edit("interpolation 1", study.ood)
    back = over_members(partial(results.edit, metric=study.ood)) - ends
    cells += [mean(over_members(results.norm)), _share(results, back)]
    family = results.family(members[0])
    if members[0].startswith("interpolation of all weights"):  # the very line that edits of all weights are read off
        return [*cells, "", "", ""]
    cells.append(told(interval(over_members(results.over_interpolation))) + missed)
    if family == "interpolation" or not moves_matrices_alone(members[0], family):  # its distance says too little
        return [*cells, "", ""]
    for key in (study.ood, study.matched):
        cells.append(told(interval(over_members(partial(results.over_equal_norm, metric=key)))))
    return cells


def _share(results: Results, back: Scores) -> str:
    """Of what was lost from peak to end, how much is back."""
    return told(share_of(back, results.lost())) if results.fallen() and is_clear(results) else ""


def random_changes(results: Results) -> str:
    """The peak changed at random by as much as by SFT, against the peak, in OOD."""
    study = results.study
    peaks = results.lost() + results.edit("interpolation 1", study.ood)
    rows = [
        [*_edit(results, name, "norm"), told(interval(results.edit(name, study.ood) - peaks))]
        for name in results.edits
        if results.family(name) == "random change"
    ]
    return markdown(["edit", "|W - peak|", *accuracies(results), "OOD minus peak"], rows)


def reverse_table(results: Results) -> str:
    """Parts of RL's change against the end, and against as much of the whole of it."""
    study, rows = results.study, []
    ends = results.edit("interpolation 1", study.ood)
    for name in results.edits:
        if results.family(name) == "reverse":
            gain, cells = results.edit(name, study.ood) - ends, ["", ""]
            if name.startswith(("rl inside", "rl outside")):
                cells = [told(interval(results.over_parts_of_rl(name, key))) for key in (study.ood, study.matched)]
            rows.append([*_edit(results, name, "from end"), told(interval(gain)), *cells, _published(results, name)])
    equal = (f"{what} minus as much of RL's change" for what in ("OOD", study.matched))
    header = ["edit", "|W - end|", *accuracies(results), "OOD minus end", *equal, "|U'U - I|, early"]
    return markdown(header, rows)


def _edit(results: Results, name: str, distance: str) -> list[str]:
    """Its name, a distance of its matrices, and its accuracies."""
    far = units([base["edits"][name].get(distance, np.nan) for base in results.edited])
    return [name, mean(far), *(mean(results.edit(name, key)) for key in accuracies(results))]


def family_note(results: Results) -> str:
    """What Holm's correction leaves of the exploratory rows."""
    tried = sum(results.family(name) == "restoration" for name in results.edits) - 1
    least = min(1.0, tried * 2.0 ** (1 - len(results.edited)))
    text = f"p is corrected for {tried} exploratory rows; on {len(results.edited)} bases none can be below {least:.3f}"
    return f"{text}{'; no single row can be significant' if least >= ALPHA else ''}."


def _missed(bases: int) -> str:
    """How many bases had no point of equal accuracy."""
    return f" ({bases} not equal)" if bases else ""


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
