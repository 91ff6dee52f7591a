"""Stage 3: how singular values and subspaces move from checkpoint to checkpoint, beside what any such change does."""

from collections.abc import Callable, Iterator
from functools import partial
from statistics import fmean

import torch
from torch import Generator, Tensor

from experiments.heal.anatomy import anatomy
from experiments.heal.changes import CHANGES
from experiments.heal.fits import OTHER_SEED, checkpoint, rl_cells
from experiments.heal.geometry import Movement, movement, svd
from experiments.heal.records import Record, Records, open_records
from experiments.heal.settings import Study, dimension
from experiments.heal.sweep import peak
from experiments.prune_update import Weights, read_weights

SPECTRA = "spectra"
TURN = (
    *("left_mean", "left_max", "right_mean", "right_max", "left_distance", "right_distance", "energy", "gap"),
    "unbounded",
)
"""What is kept of a `Turn`, in this order, and last the share of matrices whose `bound` exceeds 1."""
TURN_IN_SHORT = ("left_mean", "right_mean", "energy")
"""What is kept of it for a part of the matrices: those of a kind, such as q_proj, or of a third of the layers."""
IN_PARTS = ("change", "gauss")
"""Rows that are kept by part as well: the change itself, and a random one of its size."""
AFTER_RL = "rl"
"""What the main RL makes of the end."""
REFERENCES = ("rounding", *CHANGES, "other seed")
"""Rows that stand beside every pair: W against W in bf16; random changes of the norm of the pair's; the same steps of
another run."""


def measure_spectra(study: Study, base: str) -> None:
    """Compare base, peak and end pairwise, and each with what RL makes of the end; with their reference rows."""
    records = open_records(study, base)
    for name, load in _pairs(study, base, records):
        records.once(SPECTRA, name, load)


def _pairs(study: Study, base: str, records: Records) -> Iterator[tuple[str, Callable[[], Record]]]:
    """Name of each pair, and what measures it: lazily, as an SVD of all matrices takes minutes for a real model."""
    best, last = peak(study, records), study.last
    ends = {**{str(step): step for step in study.spectra.steps if step != last}, "peak": best, "end": last}
    for label, start in {"base": 0, "peak": best}.items():
        for name, step in ends.items():
            if start < step and (start or label == "base"):
                yield f"{label} -> {name}", partial(_steps, study, base, start, step)
    for label, start in {"base": 0, "peak": best, "end": last}.items():  # does RL turn back, or on?
        if start or label == "base":
            yield f"{label} -> {AFTER_RL}", partial(_rl, study, base, best, start)


def _steps(study: Study, base: str, start: int, step: int) -> Record:
    before, after = (read_weights(checkpoint(study, base, each)) for each in (start, step))
    other = read_weights(checkpoint(study, base, step, OTHER_SEED))
    if start:  # the other run from its own checkpoint of the same step
        begun = read_weights(checkpoint(study, base, start, OTHER_SEED))
        other = {name: before[name] + (w - begun[name]) for name, w in other.items()}
    return compare(study, before, after, other)


def _rl(study: Study, base: str, best: int, start: int) -> Record:
    cell = rl_cells(study, base, best)[study.main, study.last]
    before, after = read_weights(checkpoint(study, base, start)), read_weights(cell.directory / "model")
    return compare(study, before, after, None)


def compare(study: Study, before: Weights, after: Weights, other: Weights | None) -> Record:
    """Movements of all matrices for the pair itself and each reference, as means over matrices, all and `PARTS`."""
    found: dict[str, dict[str, Movement]] = {}
    parts = anatomy(before, study.spectra.matrices)
    for index, name in enumerate(parts.matrices):
        old, draw = before[name].double(), Generator().manual_seed(index)
        ranks, known = {str(k): dimension(k, min(old.shape)) for k in study.spectra.k}, svd(old)
        for row, new in variants(old, after[name].double(), draw).items():
            found.setdefault(row, {})[name] = movement(old, new, ranks, known)
        if other is not None:
            found.setdefault("other seed", {})[name] = movement(old, other[name], ranks, known)
    record: Record = {row: means(list(each.values())) for row, each in found.items()}
    for row in IN_PARTS:
        groups = {**parts.kinds, **parts.thirds}.items()
        record[row]["parts"] = {part: in_short([found[row][n] for n in names]) for part, names in groups if names}
    return record


def variants(old: Tensor, new: Tensor, draw: Generator) -> dict[str, Tensor]:
    """A matrix [m, n] fp64 as it became, rounded, and changed at random by as much as it changed."""
    change = new - old
    random = {name: old + make(change, draw) for name, make in CHANGES.items()}
    return {"change": new, "rounding": old.to(torch.bfloat16).double(), **random}


def in_short(movements: list[Movement]) -> Record:
    """Means over the matrices of a part; `turns` in the order of `TURN_IN_SHORT`."""
    whole = means(movements)
    places = [TURN.index(key) for key in TURN_IN_SHORT]
    turns = {name: [turn[i] for i in places] for name, turn in whole["turns"].items()}
    return {"relative_median": whole["relative_median"], "values": whole["values"], "turns": turns}


def means(movements: list[Movement]) -> Record:
    """Means over matrices; `turns` are by name of k, in the order of `TURN`."""
    keys = ("relative_median", "relative_max", "values", "norm")
    found: Record = {key: fmean(getattr(each, key) for each in movements) for key in keys}
    found["turns"] = {}
    for name in dict.fromkeys(name for each in movements for name in each.turns):
        turns = [each.turns[name] for each in movements if name in each.turns]
        unbounded = fmean(turn.bound > 1 for turn in turns)
        found["turns"][name] = [*(fmean(getattr(turn, key) for turn in turns) for key in TURN[:-1]), unbounded]
    return found
