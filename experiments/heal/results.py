"""The records of a study as numbers by base, for its page."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.heal.edit_stage import EDITS
from experiments.heal.factorial import controls, moves_matrices_alone
from experiments.heal.fits import HALF_RATE, NO_UPDATE, OTHER_SEED, SWEEP, protected_runs, steps_of
from experiments.heal.records import RECORDS, SECONDS
from experiments.heal.restoration import Fall, Read, Share, at_equal, fall_over_bases, units
from experiments.heal.settings import END, Start, Study
from experiments.heal.spectra import AFTER_RL, REFERENCES, SPECTRA
from experiments.heal.sweep import NOISE, RL
from experiments.heal.tries import TRIES
from mifo_lightning.common.errors import InputError
from mifo_lightning.lab.reading import build
from mifo_lightning.lab.report.statistics import Scores


class AtEqual(NamedTuple):
    """A metric where a run has a given accuracy, the mean of several such points; else of its nearest point.

    Both [bases, 1]: the metric, and the accuracy of the point minus the given one, which is 0 where it was met.
    """

    values: Scores
    gaps: Scores

    @property
    def missed(self) -> int:
        """Bases where it was not met."""
        return int((self.gaps != 0).sum())


@dataclass(frozen=True)
class Results:
    """What was measured.

    Attributes:
        study: What was run; its places mean nothing here.
        bases: Of each base its records, as `study.collect` writes them.
        commit: The commit that ran it.
    """

    study: Study
    bases: dict[str, dict[str, Any]]
    commit: str | None

    @cached_property
    def edited(self) -> list[dict[str, Any]]:
        """The bases that have edits: where the peak is not the end."""
        return [base for base in self.bases.values() if base[EDITS]]

    @property
    def edits(self) -> list[str]:
        """Their names, in the order in which they were made; those that every edited base has."""
        found = [base[EDITS] for base in self.edited]
        return [name for name in (found[0] if found else []) if all(name in each for each in found)]

    def family(self, edit: str) -> str:
        """The family of an edit."""
        return str(self.edited[0][EDITS][edit]["family"])

    @property
    def hours(self) -> float:
        """Wall time of all fits and measurements, each on one thread; of what was cut off, the call that ended it."""
        return sum(sum(base.get(SECONDS, {}).values()) for base in self.bases.values()) / 3600

    def step(self, base: dict[str, Any], start: Start) -> int:
        """The step of the sweep that a start means on a base."""
        (step,) = steps_of(self.study, [start], base["peak"])
        return step

    def swept(self, start: Start, metric: str, run: str = SWEEP) -> Scores:
        """A metric on test at a checkpoint: [bases, 1]."""
        return self.at_steps([self.step(base, start) for base in self.bases.values()], metric, run)

    def at_steps(self, steps: Sequence[int], metric: str, run: str = SWEEP) -> Scores:
        """A metric on test after so many steps of a run, for each base its own: [bases, 1]."""
        pairs = zip(self.bases.values(), steps, strict=True)
        return units([_of(base[run], str(step), metric) for base, step in pairs])

    def signal(self, start: Start, key: str) -> Scores:
        """What RL would have to work with at a checkpoint: [bases, 1]."""
        values = [base[SWEEP][str(self.step(base, start))]["signal"][key] for base in self.bases.values()]
        return units(values)

    def after(self, arm: str, start: Start, metric: str) -> Scores:
        """A metric on test after an arm of stage 2: [bases, 1]."""
        return units([_of(base[RL], f"{arm}/{self.step(base, start)}", metric) for base in self.bases.values()])

    @property
    def tried(self) -> bool:
        """Whether every base has been measured with several tries a question."""
        return all(base.get(TRIES) for base in self.bases.values())

    def of_tries(self, arm: str, start: Start, metric: str) -> Scores:
        """A metric on test, with several tries, of a checkpoint or of what an arm makes of it: [bases, 1]."""
        found = []
        for base in self.bases.values():
            value = base[TRIES].get(f"{arm}/{self.step(base, start)}", {}).get(metric)
            found.append(float("nan") if value is None else value)
        return units(found)

    def edit(self, name: str, metric: str) -> Scores:
        """A metric on test of an edit: [edited bases, 1]."""
        return units([_of(base[EDITS], name, metric) for base in self.edited])

    def at_equal_matched(self, run: str, metric: str) -> "AtEqual":
        """A metric on test of a run of SFT where it has the end's accuracy on what is compared at equal values.

        Of the sweep itself, ahead of its end.
        """
        steps = self.study.sweep.steps[:-1] if run == SWEEP else self.study.sweep.steps
        values, gaps = [], []
        for base in self.bases.values():
            path = [(_of(base[run], str(s), self.study.matched), _of(base[run], str(s), metric)) for s in steps]
            wanted = _of(base[SWEEP], str(self.study.last), self.study.matched)
            read = at_equal(path, wanted)
            values.append(float(np.mean(read.passes)))
            gaps.append(read.at - wanted)
        return AtEqual(units(values), units(gaps))

    @property
    def slower(self) -> list[str]:
        """Runs of SFT that could forget less: the sweep before its end, half its rate, directions that stand still."""
        runs = [SWEEP, HALF_RATE, *protected_runs(self.study)]
        return [run for run in runs if all(base.get(run) for base in self.bases.values())]

    def norm(self, name: str) -> Scores:
        """Distance of the matrices from the peak over that of the end: [edited bases, 1]."""
        return units([base[EDITS][name]["norm"] / base[EDITS]["interpolation 1"]["norm"] for base in self.edited])

    def over_interpolation(self, name: str, of: Callable[[list[float]], float] = max) -> Scores:
        """OOD of an edit minus that `of` the interpolations of equal ID accuracy, the highest: [edited bases, 1]."""
        of_edit = self.edit(name, self.study.ood)[:, 0]
        return units([y - of(read.passes) for y, read in zip(of_edit, self._interpolated(name), strict=True)])

    def unequal(self, name: str) -> int:
        """Bases where no interpolation has an edit's ID accuracy, and the nearest is better in one and worse in one."""
        x, y = (self.edit(name, metric)[:, 0] for metric in (self.study.matched, self.study.ood))
        return sum(not read.fair(*each) for read, *each in zip(self._interpolated(name), x, y, strict=True))

    def _interpolated(self, name: str) -> list[Read]:
        """OOD of the interpolation of an edit's ID accuracy, on each edited base."""
        found = []
        for base in self.edited:
            path = [
                (_test(each, self.study.matched), _test(each, self.study.ood)) for _, each in self._path(base, name)
            ]
            found.append(at_equal(path, _of(base[EDITS], name, self.study.matched)))
        return found

    def _path(self, base: dict[str, Any], name: str) -> list[tuple[float, dict[str, Any]]]:
        """Share of the change that is kept, and the record, on the line from the peak that moves what an edit moves."""
        edits = base[EDITS]
        if moves_matrices_alone(name, edits[name]["family"]):
            return [(a, edits[each]) for a, each in interpolations(base)]
        between = [(a, edits[each]) for a, each in interpolations(base, "interpolation of all weights")]
        return [(0.0, base[SWEEP][str(base["peak"])]), *between, (1.0, edits["interpolation 1"])]

    def over_equal_norm(self, name: str, metric: str) -> Scores:
        """A metric of an edit minus that of the interpolation as far from the peak: [edited bases, 1]; NaN beyond."""
        found = []
        for base, norm in zip(self.edited, self.norm(name)[:, 0], strict=True):
            path = [(a, _of(base[EDITS], each, metric)) for a, each in interpolations(base)]
            far = norm > 1 + 1e-6
            found.append(np.nan if far else _of(base[EDITS], name, metric) - at_equal(path, min(norm, 1.0)).value)
        return units(found)

    def over_parts_of_rl(self, name: str, metric: str) -> Scores:
        """A metric of an edit minus that of as much of RL's change of the matrices: [edited bases, 1]; NaN beyond."""
        found = []
        for base in self.edited:
            edits = base[EDITS]
            whole = edits["rl matrices"]["from end"]
            parts = [(float(name.rpartition(" x ")[2]), name) for name in edits if name.startswith("rl matrices x ")]
            path = [(0.0, "interpolation 1"), *sorted(parts), (1.0, "rl matrices")]
            share = edits[name]["from end"] / whole if whole else 0.0
            points = [(a, _of(edits, each, metric)) for a, each in path]
            far = share > 1 + 1e-6
            found.append(np.nan if far else _of(edits, name, metric) - at_equal(points, min(share, 1.0)).value)
        return units(found)

    def turned_back(self) -> Scores:
        """Cosine of SFT's change since the peak and RL's, of the matrices; -1 is straight back: [edited bases, 1]."""
        found = []
        for base in self.edited:
            sft, rl = base[EDITS]["interpolation 1"]["norm"], base[EDITS].get("rl matrices", {})
            both = rl.get("norm", np.nan) ** 2 - sft**2 - rl.get("from end", np.nan) ** 2
            found.append(both / (2 * sft * rl["from end"]) if rl and sft * rl["from end"] else np.nan)
        return units(found)

    def lost(self) -> Scores:
        """OOD of the peak minus that of the end: [edited bases, 1]."""
        ends = self.edit("interpolation 1", self.study.ood)
        return units([_of(base[SWEEP], str(base["peak"]), self.study.ood) for base in self.edited]) - ends

    def fallen(self, start: Start = END) -> bool:
        """Whether OOD falls from peak to a checkpoint by more than its noise over bases; of one: over questions."""
        falls = list(self.falls(start).values())
        if len(self.bases) == 1:
            return bool(falls) and falls[0].real
        return len(falls) > 1 and fall_over_bases(falls)[1]

    @property
    def wants_edits(self) -> bool:
        """Whether edits are to be made: where nothing is judged, or there is a fall to restore."""
        return not self.study.verdict or self.fallen()

    def falls(self, start: Start = END) -> dict[str, Fall]:
        """What was lost of OOD from the peak to a checkpoint after it, by base; not of bases where it comes before."""
        found = {}
        for name, base in self.bases.items():
            questions = base["questions"][self.study.ood.rpartition("/")[0]]
            steps = (base["peak"], self.step(base, start))
            if steps[0] < steps[1] or start == END:
                found[name] = Fall(*(Share(_of(base[SWEEP], str(s), self.study.ood), questions) for s in steps))
        return found


def interpolations(base: dict[str, Any], kind: str = "interpolation") -> list[tuple[float, str]]:
    """Share of the change that is kept, and the name, of every interpolation of the matrices, by the share."""
    names = (re.fullmatch(rf"{kind} ([\d.]+)", name) for name in base[EDITS])
    return sorted((float(found[1]), found[0]) for found in names if found)


def read_results(directory: Path) -> Results:
    """The results in a directory; InputError if there are none, or if a control is missing."""
    path = directory / RECORDS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        plan = content["study"]
        study = build(Study, {**plan, "bases": {n: n for n in plan["bases"]}, "out": str(directory)}, str(path))
        results = Results(study, content["bases"], content["commit"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"--report {directory}: no readable {RECORDS}: {type(error).__name__}: {error}") from None
    for name, base in results.bases.items():
        if missing := missing_controls(study, base, results.wants_edits or bool(results.edited)):
            raise InputError(f"{path}: {name}: no {missing[0]}; a table without its controls is not written")
    return results


def missing_controls(study: Study, base: dict[str, Any], edits: bool) -> list[str]:
    """What is absent of the controls of every stage; of stage 4 where there are `edits`."""
    wanted = {
        "sweep at half rate": set(base.get(HALF_RATE, ())) >= set(map(str, study.sweep.steps)),
        "run of another seed": {str(base["peak"]), str(study.last)} <= set(base.get(OTHER_SEED, ())),
        "other draws": len(base.get(NOISE, {})) >= study.draws,
        "RL from the base": f"{study.main}/0" in base.get(RL, {}),
        "RL without updates": f"{NO_UPDATE}/{study.last}" in base.get(RL, {}),
    }
    steps = set(map(str, study.sweep.steps))
    wanted |= {f"run of SFT {run}": set(base.get(run, ())) >= steps for run in protected_runs(study)}
    wanted |= {f"{arm} from step {step}": f"{arm}/{step}" in base.get(RL, {}) for arm, step in _arms(study, base)}
    wanted["spectra of base -> end"] = "base -> end" in base.get(SPECTRA, {})
    for pair, rows in base.get(SPECTRA, {}).items():
        needed = set(REFERENCES) - ({"other seed"} if pair.endswith(f"-> {AFTER_RL}") else set())
        wanted[f"reference rows of {pair}"] = needed <= set(rows)
    if edits and base["peak"] != study.last:
        made = set(base.get(EDITS, {}))
        wanted |= {f"control edit {name}": name in made for name in controls(study.edits)}
        wanted["edit named in edits.primary"] = study.edits.primary in made
    return [name for name, there in wanted.items() if not there]


def _arms(study: Study, base: dict[str, Any]) -> list[tuple[str, int]]:
    return [(name, step) for name, arm in study.rl.items() for step in steps_of(study, arm.start, base["peak"])]


def _of(stage: dict[str, Any], name: str, metric: str) -> float:
    return _test(stage.get(name, {}), metric)


def _test(record: dict[str, Any], metric: str) -> float:
    value = record.get("test", {}).get(metric)
    return float("nan") if value is None else float(value)
