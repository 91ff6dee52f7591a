"""What did the runs of an ablation record? Reads its directory, and reduces the records to arrays [bases, seeds]."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from experiments.report.statistics import Design, Scores
from mifo_lightning.errors import InputError

Record = dict[str, Any]
Kind = Literal["rl", "sft"]
KINDS: tuple[Kind, ...] = ("rl", "sft")
Axis = Literal["rl_step", "step"]
REWARD = "rollout/reward"


@dataclass(frozen=True)
class Arm:
    """One method of the ablation: its name, its configuration files, and the settings laid over them."""

    name: str
    configs: list[str]
    set: dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run: an arm on a base with a seed; `summary` and `history` are empty unless `status` is done."""

    arm: str
    base: str
    seed: int
    directory: Path
    status: str
    error: str | None
    seconds: float
    summary: Record = field(default_factory=dict)
    history: list[Record] = field(default_factory=list)

    def phases(self, monitor: str, kind: Kind | None = None) -> list[Record]:
        """The records that a monitor made at the end of each phase, of one kind of phase or of all; may be empty."""
        records = self.summary.get(monitor, {}).get("phases", [])
        return [record for record in records if kind is None or record["phase"] == kind]


@dataclass(frozen=True)
class Ablation:
    """Everything `ablation.json`, `cells.json` and the runs' own files say."""

    name: str
    question: str
    primary: str
    metrics: list[str]
    reference: str
    design: Design
    command: str
    commit: str
    arms: list[Arm]
    bases: list[str]
    seeds: list[int]
    cells: list[Cell]

    @property
    def names(self) -> list[str]:
        """The arms in the order of the configuration."""
        return [arm.name for arm in self.arms]

    def done(self, arm: str) -> list[Cell]:
        """The finished cells of an arm."""
        return [cell for cell in self.cells if cell.arm == arm and cell.status == "done"]

    def recorded(self, monitor: str) -> bool:
        """Whether this monitor recorded a phase of any run."""
        return any(cell.phases(monitor) for cell in self.cells)

    def grid(self, arm: str, value: Callable[[Cell], float | None]) -> Scores:
        """`value` of every cell of an arm, float64 [bases, seeds]; NaN where it is not done or has no finite value."""
        scores = np.full((len(self.bases), len(self.seeds)), np.nan)
        for cell in self.done(arm):
            found = value(cell)
            if found is not None and np.isfinite(found):
                scores[self.bases.index(cell.base), self.seeds.index(cell.seed)] = found
        return scores

    def scores(self, metric: str, when: Literal["before", "after"] = "after") -> dict[str, Scores]:
        """A metric of the evaluation before or after training, by arm."""
        return {arm: self.grid(arm, lambda cell: cell.summary.get(when, {}).get(metric)) for arm in self.names}


@dataclass(frozen=True)
class Curves:
    """Means over the runs of an arm at `edges` of equal bins of RL steps (or optimizer steps: `axis`), float64 [edges].

    `edges[0]` is one bin before the start; `accuracy` is by source, of greedy responses to held-out questions; `sft` is
    the share of runs with an SFT phase in the bin that ends there.
    """

    axis: Axis
    edges: Scores
    reward: Scores
    accuracy: dict[str, Scores]
    sft: Scores


@dataclass(frozen=True)
class PhaseChange:
    """What one phase did: forward KL in nats per token, share of solved questions it lost, L2 norm of its update."""

    kind: Kind
    kl: float
    lost: float
    l2: float


def load(directory: Path) -> Ablation:
    """Read an ablation's directory; a cell that `cells.json` does not name is missing.

    Raises:
        InputError: A file is missing or is not what the runner writes; the message names it.
    """
    plan = _json(directory / "ablation.json")
    rows = _json(directory / "cells.json")
    try:
        plan["arms"] = [Arm(arm["name"], arm["configs"], arm["set"]) for arm in plan["arms"]]
        grid = {(a.name, base, seed): None for a in plan["arms"] for base in plan["bases"] for seed in plan["seeds"]}
        named = {(row["arm"], row["base"], row["seed"]): row for row in rows}
        cells = [_cell(directory, *place, named.get(place)) for place in grid]
        ablation = Ablation(**{key: plan[key] for key in Ablation.__annotations__ if key != "cells"}, cells=cells)
    except (KeyError, TypeError) as error:
        raise InputError(f"{directory}: ablation.json or cells.json is not what the runner writes: {error!r}") from None
    if ablation.reference not in ablation.names:
        raise InputError(f"{directory}/ablation.json: reference {ablation.reference!r} is none of {ablation.names}")
    if ablation.design not in get_args(Design):
        raise InputError(f"{directory}/ablation.json: design {ablation.design!r} is none of {get_args(Design)}")
    return ablation


def samples(cell: Cell, count: int) -> list[Record]:
    """The last graded response of each source in the evaluations of a run, at most `count`."""
    last: dict[str, Record] = {}
    for line in _text(cell.directory / "samples.jsonl").split("\n"):
        with suppress(ValueError):  # a run that was killed while it wrote leaves half a line
            row = json.loads(line)
            if row["stage"] == "val":
                last[row["source"]] = row
    return [last[source] for source in sorted(last)][:count]


def mean_of(records: list[Record], key: str) -> float | None:
    """Mean of a number over records; None without any."""
    return float(np.mean([record[key] for record in records])) if records else None


def retention(records: list[dict[str, Record]], source: str | None = None) -> float | None:
    """Share of the questions solved before that are solved after, over records {source: CELL}; None if none was."""
    counts = [c for record in records for name, c in record.items() if source in (None, name)]
    solved = sum(c["solved"] for c in counts)
    return sum(c["retained"] for c in counts) / solved if solved else None


def retention_by_phase(cells: list[Cell], source: str) -> list[float | None]:
    """Retention in the first, second, ... SFT phase, counts summed over the runs; as far as half of the runs came."""
    by_run = [cell.phases("forgetting", "sft") for cell in cells]
    lengths = sorted((len(phases) for phases in by_run if phases), reverse=True)
    reached = lengths[(len(lengths) - 1) // 2] if lengths else 0
    return [retention([phases[i]["sources"] for phases in by_run if i < len(phases)], source) for i in range(reached)]


def learning_curves(cells: list[Cell], bins: int = 40) -> Curves | None:
    """Reward and accuracies of the runs of an arm over RL steps; None if no run kept a history.

    A reward is the mean of its bin; an accuracy is the last one measured. An arm without RL steps goes by optimizer
    steps.
    """
    histories = [cell.history for cell in cells if cell.history]
    if not histories:
        return None
    axis: Axis = "rl_step" if any(line["rl_step"] for history in histories for line in history) else "step"
    last = max(line[axis] for history in histories for line in history)
    bins = max(1, min(bins, int(last)))
    edges = np.linspace(-last / bins, last, bins + 2)
    names = sorted({key for history in histories for line in history for key in line if _source(key)})
    reward = _mean([_binned(history, axis, edges, REWARD) for history in histories])
    accuracy = {_source(key): _mean([_measured(history, axis, edges, key) for history in histories]) for key in names}
    in_sft = [np.isfinite(_binned([x for x in h if x.get("phase/is_sft")], axis, edges, axis)) for h in histories]
    return Curves(axis, edges, reward, accuracy, np.mean(in_sft, 0))


def phase_changes(cells: list[Cell]) -> list[PhaseChange]:
    """Every phase of which forward KL and forgetting were measured, and where it was, the size of its update."""
    changes = []
    for cell in cells:
        kl, layers = (
            {(p["phase"], p["number"]): p for p in cell.phases(name)} for name in ("phase_kl", "layer_updates")
        )
        for phase in cell.phases("forgetting"):
            key = (phase["phase"], phase["number"])
            kept = retention([phase["sources"]])
            if key in kl and kept is not None:
                l2 = update_norm(layers[key]) if key in layers else np.nan
                changes.append(PhaseChange(phase["phase"], kl[key]["kl"], 1 - kept, l2))
    return changes


def update_norm(phase: Record) -> float:
    """L2 norm of a phase's update of all weights, from a record of `layer_updates`."""
    return float(np.sqrt(sum(layer["l2"] ** 2 for layer in phase["layers"].values())))


def layer_means(cells: list[Cell], kind: Kind) -> dict[str, tuple[float, float]]:
    """By layer group: mean L2 norm and mean changed share of a phase's update, over phases and runs; may be empty."""
    phases = [phase["layers"] for cell in cells for phase in cell.phases("layer_updates", kind)]
    return {
        group: (float(np.mean([p[group]["l2"] for p in phases])), float(np.mean([p[group]["changed"] for p in phases])))
        for group in (phases[0] if phases else {})
    }


def _source(key: str) -> str:
    """The source of `forgetting/<source>/accuracy`, else nothing."""
    inner = key.removeprefix("forgetting/").removesuffix("/accuracy")
    return inner if key == f"forgetting/{inner}/accuracy" else ""


def _points(history: list[Record], axis: str, key: str) -> tuple[Scores, Scores]:
    points = [(line[axis], line[key]) for line in history if key in line and np.isfinite(line[key])]
    x, y = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return x, y


def _binned(history: list[Record], axis: str, edges: Scores, key: str) -> Scores:
    """Mean of the values in (edges[i-1], edges[i]]; NaN where there are none."""
    x, y = _points(history, axis, key)
    where = np.searchsorted(edges + 1e-9 * edges[-1], x, side="left").clip(max=len(edges) - 1)
    counts = np.bincount(where, minlength=len(edges))
    sums = np.bincount(where, weights=y, minlength=len(edges))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _measured(history: list[Record], axis: str, edges: Scores, key: str) -> Scores:
    """Straight lines between measurements; where there are two at once, before and after SFT, the later one counts."""
    x, y = _points(history, axis, key)
    if not x.size:
        return np.full(len(edges), np.nan)
    last = np.searchsorted(x, edges + 1e-9 * edges[-1], side="right").clip(min=1) - 1
    following = np.minimum(last + 1, len(x) - 1)
    span = x[following] - x[last]
    share = ((edges - x[last]) / np.where(span > 0, span, 1.0)).clip(0.0, 1.0) * (span > 0)
    return y[last] + share * (y[following] - y[last])


def _mean(rows: list[Scores]) -> Scores:
    """Mean over runs, without those that have no value there."""
    values = np.array(rows)
    counts = np.isfinite(values).sum(0)
    return np.where(counts > 0, np.nansum(values, 0) / np.maximum(counts, 1), np.nan)


def _cell(directory: Path, arm: str, base: str, seed: int, row: Record | None) -> Cell:
    if row is None:
        return Cell(arm, base, seed, directory, "missing", None, 0.0)
    cell = Cell(arm, base, seed, directory / row["directory"], row["status"], row["error"], row["seconds"])
    if cell.status != "done":
        return cell
    path = cell.directory / "summary.json"
    summary = _json(path)
    if not isinstance(summary, dict):
        raise InputError(f"{path} is a {type(summary).__name__}, not the object that a run writes")
    return replace(cell, summary=summary, history=_history(cell.directory))


def _history(directory: Path) -> list[Record]:
    path = directory / "history.jsonl"
    try:
        return [json.loads(line) for line in _text(path).split("\n") if line]
    except ValueError as error:
        raise InputError(f"{path} has a line that is not JSON: {error}") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{path} cannot be read; an ablation's directory has it") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def _text(path: Path) -> str:
    """What is in a file; nothing if there is none, as the monitor that writes it may be off."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""
