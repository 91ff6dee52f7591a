"""The tables of a study: means over bases with intervals, every claim beside its controls."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from experiments.heal.fits import HALF_RATE, NO_UPDATE, OTHER_SEED
from experiments.heal.restoration import at_equal, units
from experiments.heal.results import Results
from experiments.heal.settings import END, PEAK, Start
from experiments.heal.verdict import NO_FALL, is_fallen, restored, told
from mifo_lightning.lab.report.document import bracketed, number, probability
from mifo_lightning.lab.report.statistics import Scores, interval, judge

Rows = list[list[str]]
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
    rules: dict[str, Callable[[dict[str, object]], object]] = {
        "peak: highest OOD on val": lambda base: base["peak"],
        "least loss on seen ID questions": lambda base: base["least train loss"],
        "least loss on unseen ID questions": lambda base: base["least test loss"],
        "end": lambda _: results.study.last,
    }
    rows = []
    for rule, choose in rules.items():
        steps = [choose(base) for base in results.bases.values()]
        if None in steps:
            continue
        pairs = list(zip(results.bases.values(), steps, strict=True))
        cells = [
            bracketed(interval(units([base["sweep"][str(s)]["test"][key] for base, s in pairs])))
            for key in accuracies(results)
        ]
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
    """R of an arm, and of how many bases; or why there is none."""
    shares = restored(results, arm, start)
    if not is_fallen(results) or not len(shares):
        return NO_FALL
    return f"{told(interval(shares))} ({len(shares)})"


def floor_table(results: Results) -> str:
    """How large a difference is without any cause: other draws, another seed; and half the rate at equal ID."""
    study, rows = results.study, []
    for key in accuracies(results):
        end = results.swept(END, key)
        draws = units([np.std([d["test"][key] for d in base["noise"].values()], ddof=1) if len(base["noise"]) > 1
                       else np.nan for base in results.bases.values()])  # fmt: skip
        other = np.abs(results.swept(END, key, OTHER_SEED) - end)
        half = [
            at_equal(
                [tuple(base[HALF_RATE][str(s)]["test"][k] for k in (study.matched, key)) for s in study.sweep.steps],
                base["sweep"][str(study.last)]["test"][study.matched],
            )
            for base in results.bases.values()
        ]
        rows.append([key, mean(end), mean(draws), mean(other), told(interval(units(half) - end))])
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
            each = [rows_of[row] for rows_of in having]
            first = [mean(units([one[key] for one in each])) for key in ("relative_median", "relative_max", "values")]
            for i, k in enumerate(each[0]["turns"]):
                turns = [one["turns"][k] for one in each]
                angles = [
                    " / ".join(mean(units([turn[f"{side}_{of}"] for turn in turns])) for of in ("mean", "max"))
                    for side in ("left", "right")
                ]
                distance = mean(units([(turn["left_distance"] + turn["right_distance"]) / 2 for turn in turns]))
                more = [mean(units([_number(turn[key]) for turn in turns])) for key in ("energy", "gap", "unbounded")]
                label = [pair, row, str(len(having)), *first] if i == 0 else ["", "", "", "", "", ""]
                rows.append([*label, k, *angles, distance, *more])
    header = ["pair", "row", "bases", "rel. ds median", "max", "|ds| / |dW|", "k", "left angle, mean / max",
              "right angle, mean / max", "projector distance", "energy / chance", "gap", "no bound"]  # fmt: skip
    return markdown(header, rows)


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
    cells += [mean(over_members(results.norm)), told(interval(over_members(results.over_interpolation)))]
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
            rows.append([name, *(mean(results.edit(name, key)) for key in accuracies(results)), told(interval(gain))])
    return markdown(["edit", *accuracies(results), f"OOD minus {against}"], rows)


def accuracies(results: Results) -> list[str]:
    """The accuracies of a study."""
    study = results.study
    return [key for key in (study.id_seen, study.id, study.ood) if key]


def mean(values: Scores) -> str:
    """The mean over bases; a dash if one has none."""
    return number(float(values.mean())) if np.isfinite(values).all() else "-"


def _reference(results: Results, against: str) -> Scores:
    edits = {"end": "interpolation 1", "peak": "rollback everything"}
    if against == "peak" and edits["peak"] not in results.edits:
        bases = results.edited
        return units([base["sweep"][str(base["peak"])]["test"][results.study.ood] for base in bases])
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


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
