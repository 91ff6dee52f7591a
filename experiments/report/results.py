"""What did the runs of an ablation record? Reads its directory, and reduces the records to arrays [bases, seeds]."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import yaml
from yaml import YAMLError

from experiments.report.statistics import Design, Scores
from mifo_lightning.errors import InputError

Record = dict[str, Any]
Kind = Literal["rl", "sft"]
KINDS: tuple[Kind, ...] = ("rl", "sft")
When = Literal["before", "after"]


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

    def cost(self, kind: Kind, key: str) -> float:
        """An account of the costs monitor, of all phases of a kind; NaN if it was off."""
        return float(self.summary["costs"][kind][key]) if "costs" in self.summary else float("nan")


@dataclass(frozen=True)
class Ablation:
    """Everything `ablation.json`, `cells.json` and the runs' own files say."""

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
    seeds: list[int]
    cells: list[Cell]
    setting: str = ""
    trade_off: dict[str, list[str]] = field(default_factory=dict)
    contrasts: list[list[str]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The arms in the order of the configuration."""
        return [arm.name for arm in self.arms]

    @property
    def base_names(self) -> list[str]:
        """The bases as a reader sees them, not to be taken for seeds."""
        return [f"base {base}" for base in self.bases]

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

    def scores(self, metric: str, when: When = "after") -> dict[str, Scores]:
        """A metric of the evaluation before or after training, by arm."""
        return {arm: self.grid(arm, lambda cell: cell.summary.get(when, {}).get(metric)) for arm in self.names}

    def traded(self, name: str, when: When = "after") -> dict[str, Scores]:
        """The mean of the metrics of one side of the trade-off, by arm."""
        parts = [self.scores(metric, when) for metric in self.trade_off[name]]
        return {arm: np.mean([part[arm] for part in parts], axis=0) for arm in self.names}


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
        known = {f.name for f in fields(Ablation)}
        ablation = Ablation(**{key: value for key, value in plan.items() if key in known}, cells=cells)
    except (KeyError, TypeError) as error:
        raise InputError(f"{directory}: ablation.json or cells.json is not what the runner writes: {error!r}") from None
    if ablation.reference not in ablation.names:
        raise InputError(f"{directory}/ablation.json: reference {ablation.reference!r} is none of {ablation.names}")
    if ablation.design not in get_args(Design):
        raise InputError(f"{directory}/ablation.json: design {ablation.design!r} is none of {get_args(Design)}")
    return ablation


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
