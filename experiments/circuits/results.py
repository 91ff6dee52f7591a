"""The records of a study of circuits, read again, and what is compared in them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.circuits.measures import chance_jaccard, jaccard
from experiments.circuits.records import Record, record_path
from experiments.circuits.study import BASE
from mifo_lightning.common.errors import InputError
from mifo_lightning.lab.report.document import bracketed
from mifo_lightning.lab.report.statistics import interval, rank_correlation

Find = Callable[[Record, Record], float | None]
"""What to read from a record and from that of its base; None or NaN where it is not defined."""


class Results:
    """All records of a directory.

    Attributes:
        study: What the study says of itself.
        records: By arm and base; the base itself is the arm `base`.
        arms: Those with a record, in the study's order.

    Raises:
        InputError: There are none.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "study.json"
        if not path.is_file():
            raise InputError(f"{directory}: has no study.json; `python -m experiments.circuits --config` writes it")
        self.study: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.records: dict[tuple[str, str], Record] = {}
        for base in self.study["bases"]:
            for arm in (BASE, *self.study["arms"]):
                if (one := record_path(directory, arm, base)).is_file():
                    self.records[arm, base] = json.loads(one.read_text(encoding="utf-8"))
        self.arms = [arm for arm in self.study["arms"] if self.count(arm)]
        if not self.arms:
            raise InputError(f"{directory}: has no record of an arm and its base; is there a finished run of one?")

    def count(self, arm: str) -> int:
        """On how many bases the arm has been measured."""
        return sum({(arm, base), (BASE, base)} <= self.records.keys() for base in self.study["bases"])

    def values(self, arm: str, find: Find) -> list[float]:
        """What is defined over the bases, in their order."""
        pairs = [(self.records.get((arm, base)), self.records.get((BASE, base))) for base in self.study["bases"]]
        found = [find(record, of_base) for record, of_base in pairs if record and of_base]
        return [value for value in found if value is not None and np.isfinite(value)]

    def cell(self, arm: str, find: Find, sign: str = "") -> str:
        """Mean [95 % interval over bases]; on how many bases where it is not defined on all that the arm has."""
        values = self.values(arm, find)
        text = bracketed(interval(np.array(values)[:, None]), sign) if values else "-"
        return text if len(values) in (0, self.count(arm)) else f"{text} ({len(values)} bases)"


def own(skill: str) -> Find:
    """The accuracy of the model itself."""
    return lambda record, _: record["skills"][skill]["accuracy"]


def lost(skill: str) -> Find:
    """The accuracy that the base had and the arm's model has no longer."""
    return lambda record, of_base: of_base["skills"][skill]["accuracy"] - record["skills"][skill]["accuracy"]


def size(skill: str, which: str) -> Find:
    """How many heads the `circuit` or the `smallest` set has."""

    def find(record: Record, _: Record) -> float | None:
        heads = record["skills"][skill][which]
        return None if heads is None else len(heads)

    return find


def restored(skill: str, by: str, way: str = "into_tuned") -> Find:
    """The accuracy that outputs of the other model bring, those of `circuit`, `random` (mean over sets), `heads`, ...

    Where the circuit is all heads there are no others: random heads are then the circuit.
    """

    def find(record: Record, _: Record) -> float | None:
        there = record["transplant"].get(skill, {}).get(way)
        if there is None:
            return None
        brought = (there["random"] or there["circuit"]) if by == "random" else there[by]
        return float(np.mean(brought) - there["none"])

    return find


def circuit_minus_random(skills: list[str], way: str = "into_tuned") -> Find:
    """What the circuit restores beyond as many random heads: the mean over skills, if all of them have a circuit."""

    def find(record: Record, of_base: Record) -> float | None:
        pairs = [[restored(skill, by, way)(record, of_base) for by in ("circuit", "random")] for skill in skills]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        return float(np.mean(differences)) if len(differences) == len(skills) else None

    return find


def alike(skill: str, which: str, measure: str) -> Find:
    """How a circuit is like the base's: `jaccard`, `chance` (that of as many random heads) or `spearman`.

    The latter is the correlation of the heads' necessities by mean ablation; all where both models have a circuit.
    """

    def find(record: Record, of_base: Record) -> float | None:
        one, other = of_base["skills"][skill], record[which][skill]
        a, b = one["circuit"], other["circuit"]
        if a is None or b is None:
            return None
        heads = [part for part in one["mean"] if not part.endswith("mlp")]
        if measure == "spearman":
            return rank_correlation([one["mean"][head] for head in heads], [other["mean"][head] for head in heads])
        return chance_jaccard(len(a), len(b), len(heads)) if measure == "chance" else jaccard(a, b)

    return find


def necessity_of(skill: str, how: str, places: slice) -> Find:
    """The mean necessity of parts by their place: heads by necessity in their base, the first first, then MLPs."""

    def find(record: Record, of_base: Record) -> float:
        known = of_base["skills"][skill]["mean"]
        heads = [part for part in known if not part.endswith("mlp")]
        order = sorted(heads, key=lambda head: (-known[head], head))
        order += [part for part in known if part.endswith("mlp")]
        return float(np.mean([record["skills"][skill][how][part] for part in order[places]]))

    return find
