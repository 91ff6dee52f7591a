"""What did the runs of an ablation record? Reads its directory, and reduces the records to arrays [bases, seeds]."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import yaml
from yaml import YAMLError

from mifo_lightning.common.errors import InputError, require
from mifo_lightning.lab.report.statistics import Design, Scores

Record = dict[str, Any]
Kind = Literal["rl", "sft"]
KINDS: tuple[Kind, ...] = ("rl", "sft")
PLAN, RUNS = "ablation.json", "runs.csv"
KIND_OF: dict[str, Callable[[str], str | int]] = {"ends_on": str, "sft_phases": int}
"""Columns of `runs.csv` that are no float."""
When = Literal["before", "after"]


@dataclass(frozen=True)
class Arm:
    """One method of the ablation: its name, its configuration files, and the settings laid over them."""

    name: str
    configs: list[str]
    set: dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """The setting that all arms ran at several values of, and the level of learning at which they are compared."""

    key: str
    values: list[float]
    level: float


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

    def cost(self, kind: Kind, key: str) -> float:
        """An account of the costs monitor, of all phases of a kind; NaN if it was off."""
        return float(self.summary["costs"][kind][key]) if "costs" in self.summary else float("nan")


@dataclass(frozen=True)
class Ablation:
    """Everything `ablation.json`, `cells.json` and the runs' own files say, or `runs.csv` in the place of these two."""

    name: str
    question: str
    primary: str
    metrics: list[str]
    reference: str
    design: Design
    command: str | None
    commit: str | None
    arms: list[Arm]
    bases: list[str]
    seeds: dict[str, list[int]]
    """Of every arm, by base."""
    cells: list[Cell]
    setting: str = ""
    trade_off: dict[str, list[str]] = field(default_factory=dict)
    primary_contrast: list[str] | list[list[str]] = field(default_factory=list)
    margin: float | None = None
    contrasts: list[list[str]] = field(default_factory=list)
    sweep: Sweep | None = None
    swept: dict[str, list[str]] = field(default_factory=dict)
    """The arms as the configuration names them -> those that ran, one a value of the sweep; each itself without one."""
    note: str = ""
    """What a reader must know before all else, such as that a fault was found in what was run."""
    scores_only: bool = False
    """Whether final scores are all there is, from `runs.csv`."""

    @property
    def names(self) -> list[str]:
        """The arms in the order of the configuration."""
        return [arm.name for arm in self.arms]

    @property
    def the_sweep(self) -> Sweep:
        """The sweep of an ablation that has one."""
        assert self.sweep is not None, "asked for where there is one"
        return self.sweep

    @property
    def compared(self) -> str:
        """What comparisons are of: the primary metric, or what is kept at equal learning."""
        if self.sweep is None:
            return self.primary
        learned, kept = self.trade_off
        return f"{kept} at {learned} = {self.sweep.level:g}"

    @property
    def base_names(self) -> list[str]:
        """The bases as a reader sees them, not to be taken for seeds."""
        return [f"base {base}" for base in self.bases]

    @property
    def of_retention(self) -> list[str]:
        """Those of `metrics` that the monitor of that name found; a section of its own tells of them."""
        return [metric for metric in self.metrics if metric.startswith("retention/")]

    @property
    def runs(self) -> int:
        """Of every arm, finished or not."""
        return sum(map(len, self.seeds.values()))

    def complete(self, arm: str) -> bool:
        """Whether every run of the arm is done; else it has no mean, as what is missing would have changed it."""
        return len(self.done(arm)) == self.runs

    def done(self, arm: str) -> list[Cell]:
        """The finished cells of an arm."""
        return [cell for cell in self.cells if cell.arm == arm and cell.status == "done"]

    def recorded(self, monitor: str) -> bool:
        """Whether this monitor recorded a phase of any run."""
        return any(cell.phases(monitor) for cell in self.cells)

    def grid(self, arm: str, value: Callable[[Cell], float | None]) -> Scores:
        """`value` of every cell of an arm, float64 [bases, seeds]; NaN where it is not done or has no finite value."""
        scores = np.full((len(self.bases), max(map(len, self.seeds.values()))), np.nan)
        for cell in self.done(arm):
            found = value(cell)
            if found is not None and np.isfinite(found):
                scores[self.bases.index(cell.base), self.seeds[cell.base].index(cell.seed)] = found
        return scores

    def scores(self, metric: str, when: When = "after") -> dict[str, Scores]:
        """A metric of the evaluation before or after training, by arm."""
        return {arm: self.grid(arm, lambda cell: cell.summary.get(when, {}).get(metric)) for arm in self.names}

    def traded(self, name: str, when: When = "after") -> dict[str, Scores]:
        """The mean of the metrics of one side of the trade-off, by arm."""
        parts = [self.scores(metric, when) for metric in self.trade_off[name]]
        return {arm: np.mean([part[arm] for part in parts], axis=0) for arm in self.names}


def load(directory: Path, bases: Sequence[str] = ()) -> Ablation:
    """Read an ablation's directory, as the runner leaves it or as a page is committed: `ablation.json` and `runs.csv`.

    A cell that is not named is missing; one without a finite primary metric has failed. `bases` takes these alone.

    Raises:
        InputError: A file is missing or is not what the runner writes, or a base is none of it; the message names it.
    """
    plan = read_plan(directory, bases)
    scores_only = (directory / RUNS).is_file() and not (directory / "cells.json").is_file()
    try:
        plan["arms"] = [Arm(arm["name"], arm["configs"], arm["set"]) for arm in plan["arms"]]
        if isinstance(plan["seeds"], list):  # every base has the same
            plan["seeds"] = dict.fromkeys(plan["bases"], plan["seeds"])
        plan["swept"] = plan.get("swept") or {arm.name: [arm.name] for arm in plan["arms"]}
        plan["sweep"] = Sweep(**plan["sweep"]) if plan.get("sweep") else None
        known = {key: value for key, value in plan.items() if key in {f.name for f in fields(Ablation)}}
        ablation = Ablation(**known, cells=[], scores_only=scores_only)
        found = _read_runs(ablation, directory / RUNS) if scores_only else _read_cells(directory)
        named = {(cell.arm, cell.base, cell.seed): cell for cell in found}
        grid = [(a, base, seed) for a in ablation.names for base, seeds in ablation.seeds.items() for seed in seeds]
        cells = [named.get(at) or Cell(*at, directory, "missing", None, 0.0) for at in grid]
        ablation = replace(ablation, cells=[_checked(cell, ablation.primary) for cell in cells])
    except (KeyError, TypeError, AttributeError) as error:
        read = RUNS if scores_only else "cells.json"
        raise InputError(f"{directory}: {PLAN} or {read} is not what the runner writes: {error!r}") from None
    if ablation.reference not in ablation.swept:
        raise InputError(
            f"{directory}/ablation.json: reference {ablation.reference!r} is none of {list(ablation.swept)}"
        )
    if ablation.design not in get_args(Design):
        raise InputError(f"{directory}/ablation.json: design {ablation.design!r} is none of {get_args(Design)}")
    return ablation


def read_plan(directory: Path, bases: Sequence[str] = ()) -> Record:
    """The `ablation.json` of a directory; of these bases alone, if any are named, with a note that says so."""
    plan = _json(directory / PLAN)
    every = plan.get("bases", []) if isinstance(plan, dict) else []
    for base in bases:
        require("--bases", base, base in every, f"some of {', '.join(every)}")
    if not bases:
        return plan
    taken = [base for base in every if base in bases]
    note = f"Of the {len(every)} bases of this study {len(taken)} are in these numbers: {', '.join(taken)}."
    if isinstance(plan.get("seeds"), dict):
        plan["seeds"] = {base: plan["seeds"][base] for base in taken}
    return {**plan, "bases": taken, "note": f"{note} {plan.get('note', '')}".strip()}


def evaluation(ablation: Ablation) -> tuple[str, str]:
    """How final responses were drawn (`T = 1`) and from what (`4096 test questions`); empty where not recorded."""
    for cell in (cell for arm in ablation.names for cell in ablation.done(arm)):
        with suppress(YAMLError, KeyError, TypeError):
            config = yaml.safe_load(_text(cell.directory / "config.yaml"))
            drawn = f"T = {config['model']['evaluation']['sampling']['temperature']:g}"
            source = config["data"]["val"]["init_args"]
            return drawn, f"{source['count']} {source['split']} questions"
    return "", ""


def probe(ablation: Ablation) -> str:
    """What greedy accuracies and retention are measured by."""
    _, questions = evaluation(ablation)
    runs = [cell.summary["forgetting"]["run"] for cell in ablation.cells if "forgetting" in cell.summary]
    counts = sorted({source["questions"] for run in runs for source in run.values()})
    number = f"the first {counts[0]} questions" if len(counts) == 1 else "a fixed set of questions"
    return f"greedy responses to {number} of each source{f' among the {questions}' if questions else ''}"


def samples(cell: Cell, count: int) -> list[Record]:
    """The last graded response of each source in the evaluations of a run, at most `count`."""
    last: dict[str, Record] = {}
    for line in _text(cell.directory / "samples.jsonl").split("\n"):
        with suppress(ValueError):  # a run that was killed while it wrote leaves half a line
            row = json.loads(line)
            if row["stage"] == "val":
                last[row["source"]] = row
    return [last[source] for source in sorted(last)][:count]


def write_runs(ablation: Ablation, path: Path) -> None:
    """Write `runs.csv`, a line per run with its final scores in full precision: what a page's statistics rest on."""
    columns = {
        name: keys
        for name, keys in _columns(ablation).items()
        if any(_at(c.summary, keys) != "" for c in ablation.cells)
    }
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arm", "base", "seed", "status", "error", *columns])
        for cell in ablation.cells:
            values = [_at(cell.summary, keys) for keys in columns.values()]
            writer.writerow([cell.arm, cell.base, cell.seed, cell.status, cell.error or "", *values])


def _read_runs(ablation: Ablation, path: Path) -> list[Cell]:
    """The runs that `write_runs` wrote."""
    cells, columns = [], _columns(ablation)
    try:
        for row in csv.DictReader(io.StringIO(_text(path), newline="")):
            summary: Record = {}
            for name, keys in columns.items():
                if row.get(name):
                    inner = summary
                    for key in keys[:-1]:
                        inner = inner.setdefault(key, {})
                    inner[keys[-1]] = KIND_OF.get(name, float)(row[name])
            place = (row["arm"], row["base"], int(row["seed"]), path.parent)
            cells.append(Cell(*place, row["status"], row["error"] or None, float("nan"), summary))
    except ValueError as error:
        raise InputError(
            f"{path} has a line that `python -m mifo_lightning.lab report` did not write: {error}"
        ) from None
    return cells


def _columns(ablation: Ablation) -> dict[str, tuple[str, ...]]:
    """Columns of `runs.csv` with where they stand in the summary of a run."""
    sides = [metric for metrics in ablation.trade_off.values() for metric in metrics]
    metrics = dict.fromkeys([ablation.primary, *ablation.metrics, *sides])
    return {
        **{metric: ("after", metric) for metric in metrics},
        **{f"before: {metric}": ("before", metric) for metric in metrics},
        **{f"FLOPs {kind}": ("costs", kind, "flops") for kind in KINDS},
        "sft_phases": ("sft_phases",),
        "ends_on": ("ends_on",),
    }


def _at(record: Record, keys: tuple[str, ...]) -> Any:
    """What stands there in a nested record; empty without it."""
    for key in keys:
        record = record.get(key, {})
    return "" if record in ({}, None) else record


def _checked(cell: Cell, primary: str) -> Cell:
    """The cell, failed if it is done without a finite score: it must not be averaged, nor the others without it."""
    score = cell.summary.get("after", {}).get(primary)
    if cell.status != "done" or (isinstance(score, int | float) and np.isfinite(score)):
        return cell
    return replace(cell, status="failed", error=f"its final {primary} is {score}", summary={}, history=[])


def _read_cells(directory: Path) -> list[Cell]:
    """The cells that the runner wrote."""
    return [_cell(directory, row) for row in _json(directory / "cells.json")]


def _cell(directory: Path, row: Record) -> Cell:
    place = (row["arm"], row["base"], row["seed"], directory / row["directory"])
    cell = Cell(*place, row["status"], row["error"], row["seconds"])
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
