"""How singular values and subspaces move: every pair beside its reference rows, and by kind of matrix and depth."""

from typing import Any

import numpy as np

from experiments.heal.restoration import units
from experiments.heal.results import Results
from experiments.heal.spectra import IN_PARTS, TURN, TURN_IN_SHORT
from experiments.heal.tables import markdown, mean
from experiments.heal.verdict import told
from mifo_lightning.lab.report.statistics import interval

COMPARED = [
    text
    for what in ("rel. ds median, %", "|ds| / |dW|", "left angle", "right angle", "energy / chance")
    for text in (what, "minus gauss")
]
SHOWN = ("peak -> end", "end -> rl", "peak -> rl")
"""Pairs that are shown by part: what SFT does after the peak, what RL does, and both."""


def turn_table(results: Results) -> str:
    """Every pair against a random change of the same size, over all matrices."""
    rows = []
    for pair in pairs(results):
        having = having_pair(results, pair)
        norm = mean(units([one["change"]["norm"] for one in having]))
        both = [tuple(_in_short(one[row]) for row in IN_PARTS) for one in having]
        rows.append([pair, str(len(having)), norm, *_beside(both, at(results))])
    return markdown(["pair", "bases", "|dW|", *COMPARED], rows)


def part_table(results: Results) -> str:
    """The same by kind of matrix and by depth, for the pairs of `SHOWN`."""
    rows = []
    for pair in SHOWN:
        having = having_pair(results, pair)
        for part in having[0]["change"].get("parts", ()) if having else ():
            both = [tuple(one[row]["parts"][part] for row in IN_PARTS) for one in having]
            if at(results) in both[0][0]["turns"]:
                rows.append([pair, part, *_beside(both, at(results))])
    return markdown(["pair", "matrices", *COMPARED], rows)


def turned_back(results: Results) -> list[str]:
    """Whether RL goes back where SFT came from, in a sentence; none where RL's change is no edit of the study."""
    if not results.edited or not np.isfinite(cosine := results.turned_back()).all():
        return []
    return [
        "The cosine between what SFT changes from peak to end and what RL changes from there, over the matrices "
        f"that are edited: {told(interval(cosine))}; -1 would be straight back, 0 neither back nor on."
    ]


def pairs(results: Results) -> list[str]:
    """Names of the pairs that some base has, in the order in which they were measured."""
    return list(dict.fromkeys(pair for base in results.bases.values() for pair in base["spectra"]))


def at(results: Results) -> str:
    """The dimension at which pairs are compared: that of the primary edit, where spectra have it, else their last."""
    known = next(iter(next(iter(results.bases.values()))["spectra"].values()))["change"]["turns"]
    wanted = results.study.edits.primary.split()[2]
    return wanted if wanted in known else list(known)[-1]


def having_pair(results: Results, pair: str) -> list[dict[str, Any]]:
    """The records of a pair, of the bases that have it."""
    return [base["spectra"][pair] for base in results.bases.values() if pair in base["spectra"]]


def _in_short(row: dict[str, Any]) -> dict[str, Any]:
    """A row over all matrices as those of parts are kept."""
    places = [TURN.index(key) for key in TURN_IN_SHORT]
    return {**row, "turns": {k: [turn[place] for place in places] for k, turn in row["turns"].items()}}


def _beside(both: list[tuple[Any, ...]], k: str) -> list[str]:
    """What a change does, means over bases, and each minus what the random one does, paired by base."""
    cells = []
    for key in ("relative_median", "values", *range(len(TURN_IN_SHORT))):
        each = [[one["turns"][k][key] if isinstance(key, int) else one[key] for one in pair] for pair in both]
        values = np.array(each, dtype=np.float64) * (100 if key == "relative_median" else 1)
        cells += [mean(values[:, :1]), told(interval(values[:, :1] - values[:, 1:]))]
    return cells


def spectra_table(results: Results) -> str:
    """Each pair and its reference rows at every k, means over matrices, then over bases."""
    rows = []
    for pair in pairs(results):
        having = having_pair(results, pair)
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
