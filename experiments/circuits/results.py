"""The records of a study of circuits, read again, and what is compared in them."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.circuits.measures import chance_jaccard, jaccard
from experiments.circuits.records import Record, record_path
from experiments.circuits.study import BASE
from mifo_lightning.common.errors import InputError
from mifo_lightning.lab.report.document import bracketed
from mifo_lightning.lab.report.statistics import interval, rank_correlation

RECORDS = "records.json"  # of a page: all that it is made of
Find = Callable[[Record, Record], float | None]
"""What to read from a record and from that of its base; None or NaN where it is not defined."""


def read_records(directory: Path) -> dict[str, Any]:
    """The `study` and its `records` by arm and base: of a directory of measurements, or of a page's `records.json`.

    Raises:
        InputError: There are none, some were measured with other settings, or the page's are damaged.
    """
    path = directory / "study.json"
    if not path.is_file():
        return _published(directory)
    study = json.loads(path.read_text(encoding="utf-8"))
    records: dict[str, dict[str, Record]] = {arm: {} for arm in (BASE, *study["arms"])}
    for base in study["bases"]:
        for arm, of_arm in records.items():
            if (one := record_path(directory, arm, base)).is_file():
                record = json.loads(one.read_text(encoding="utf-8"))
                measured = record.get("measured", {})
                if not measured or any(study.get(name) != value for name, value in measured.items()):
                    raise InputError(f"{one}: was measured with other settings than {path} says; measure it again")
                of_arm[base] = record
    return {"study": study, "records": records}


def _published(directory: Path) -> dict[str, Any]:
    path = directory / RECORDS
    if not path.is_file():
        raise InputError(
            f"{directory}: has no study.json and no {RECORDS}; `python -m experiments.circuits --config` writes them"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(content[key], dict) for key in ("study", "records")):
            raise TypeError("`study` and `records` must be mappings")
        if not all(isinstance(content["study"][key], list) for key in ("arms", "bases", "untrained", "skills")):
            raise TypeError("what `study` lists must be lists")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is damaged: {type(error).__name__}: {error}; take it from the repository") from None
    return {"study": content["study"], "records": content["records"]}


class Results:
    """All records of a directory.

    Attributes:
        content: What `read_records` gives.
        study: What the study says of itself.
        records: By arm and base; the base itself is the arm `base`.
        arms: Those with a record, in the study's order.

    Raises:
        InputError: There are none.
    """

    def __init__(self, directory: Path) -> None:
        self.content = read_records(directory)
        self.study: dict[str, Any] = self.content["study"]
        records: dict[str, dict[str, Record]] = self.content["records"]
        self.records = {(arm, base): record for arm, of in records.items() for base, record in of.items()}
        self.arms = [arm for arm in self.study["arms"] if self.count(arm)]
        if not self.arms:
            raise InputError(f"{directory}: has no record of an arm and its base; is there a finished run of one?")

    def count(self, arm: str) -> int:
        """On how many bases the arm has been measured."""
        return sum({(arm, base), (BASE, base)} <= self.records.keys() for base in self.study["bases"])

    def surviving(self, skill: str) -> list[str]:
        """Bases on which the base and every arm have a circuit of a skill."""
        return [
            base for base in self.study["bases"]
            if all((r := self.records.get((arm, base))) and r["skills"][skill]["circuit"] for arm in (BASE, *self.arms))
        ]  # fmt: skip

    def values(self, arm: str, find: Find, bases: Sequence[str] | None = None) -> list[float]:
        """What is defined over the bases, in their order; of these alone, if any are named."""
        wanted = self.study["bases"] if bases is None else bases
        pairs = [(self.records.get((arm, base)), self.records.get((BASE, base))) for base in wanted]
        found = [find(record, of_base) for record, of_base in pairs if record and of_base]
        return [value for value in found if value is not None and np.isfinite(value)]

    def cell(self, arm: str, find: Find, sign: str = "", bases: Sequence[str] | None = None) -> str:
        """Mean [95 % interval over bases]; on how many bases where it is not defined on all that are asked for."""
        values = self.values(arm, find, bases)
        text = bracketed(interval(np.array(values)[:, None]), sign) if values else "-"
        every = len(self.study["bases"]) if bases is None else len(bases)
        return text if len(values) in (0, every) else f"{text} ({len(values)} bases)"


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


def large(skill: str) -> Find:
    """Whether the circuit has all heads but one, or all, so that other sets are nearly it: 1 or 0."""

    def find(record: Record, _: Record) -> float | None:
        found = record["skills"][skill]
        heads = sum(not part.endswith("mlp") for part in found["mean"])
        return None if found["circuit"] is None else float(len(found["circuit"]) >= heads - 1)

    return find


def changed(skill: str) -> Find:
    """The accuracy of the base after a random change as large as the arm's."""
    return lambda record, _: record["random_change"][skill]["accuracy"]


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


def order_matters(skills: list[str], way: str = "into_tuned") -> Find:
    """What heads restore if the most necessary come first, minus if the least do: mean over their numbers and skills.

    None unless all skills have a circuit. At every number, from one head to all but one, both are equally many.
    """

    def find(record: Record, _: Record) -> float | None:
        there = [record["transplant"].get(skill, {}).get(way) for skill in skills]
        if None in there:
            return None
        orders = ("most_necessary_first", "least_necessary_first")
        most, least = (np.mean([one[order][:-1] for one in there]) for order in orders)
        return float(most - least)

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

    Chance has as many heads in each layer. The latter is the correlation of the heads' necessities by mean ablation;
    all where both models have a circuit.
    """

    def find(record: Record, of_base: Record) -> float | None:
        one, other = of_base["skills"][skill], record[which][skill]
        a, b = one["circuit"], other["circuit"]
        if a is None or b is None:
            return None
        heads = [part for part in one["mean"] if not part.endswith("mlp")]
        if measure == "spearman":
            return rank_correlation([one["mean"][head] for head in heads], [other["mean"][head] for head in heads])
        return chance_jaccard(_by_layer(a, b, heads)) if measure == "chance" else jaccard(a, b)

    return find


def _by_layer(a: Sequence[str], b: Sequence[str], heads: Sequence[str]) -> list[tuple[int, int, int]]:
    """How many heads two sets have in each layer, and how many there are."""
    a_in, b_in, all_in = (Counter(name.partition(".")[0] for name in names) for names in (a, b, heads))
    return [(a_in[layer], b_in[layer], all_in[layer]) for layer in all_in]


def necessity_of(skill: str, how: str, places: slice) -> Find:
    """The mean necessity of parts by their place: heads by necessity in their base, the first first, then MLPs.

    The order is that of other questions, so that the first is not the luckiest one. A base without a circuit has none.
    """

    def find(record: Record, of_base: Record) -> float | None:
        known, parts = of_base["other_sample"][skill], record["skills"][skill][how]
        heads = sorted(known["mean"], key=lambda head: (-known["mean"][head], head))
        chosen = [*heads, *(part for part in parts if part.endswith("mlp"))][places]
        if of_base["skills"][skill]["circuit"] is None and chosen[0] in heads:
            return None
        return float(np.mean([parts[part] for part in chosen]))

    return find
