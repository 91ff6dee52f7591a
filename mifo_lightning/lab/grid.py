"""The grid of an ablation: which fits it is made of. Nothing is run or written here."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import PositiveInt

from mifo_lightning.common.errors import InputError

if TYPE_CHECKING:
    Values = dict[str, Any]
else:
    Values = dict  # as they are written: of a `dict[str, Any]` jsonargparse makes an object of what has a `class_path`


@dataclass(frozen=True)
class Arm:
    """What one arm adds to the settings of all."""

    configs: list[str] = field(default_factory=list)
    """Configuration files or packaged names, laid over those of all arms in this order."""
    set: Values = field(default_factory=dict)
    """Command-line keys and values, laid over those of all arms."""


@dataclass(frozen=True)
class Wandb:
    """Where W&B runs go; a run's group is the ablation, its name the cell."""

    project: str = "mifo-lightning"
    """W&B project."""
    mode: Literal["offline", "online"] = "offline"
    """Offline needs no account; `wandb sync` uploads later."""


@dataclass(frozen=True)
class Sweep:
    """A setting that every arm runs with at the same values, so that arms are compared where they learn alike."""

    key: str
    """The command-line key, such as model.optimizer.sft.lr."""
    values: list[float]
    """Its values, in rising order; every arm runs with each."""
    level: float
    """Where on the first side of `trade_off` the second is compared, interpolated between values on each base."""


@dataclass(frozen=True)
class Ablation:
    """One ablation: which fits are compared, and by what."""

    name: str
    """Also the W&B group."""
    question: str
    """What the comparison answers, in one sentence."""
    primary: str
    """Key of the final evaluation that ranks arms; higher is better."""
    reference: str
    """The arm that paired differences refer to."""
    primary_contrast: list[str] | list[list[str]]
    """The one pair of arms, first minus second, whose difference is tested as it is; all others are exploratory. Or
    several pairs that must all hold, each by more than the margin, for what the ablation asks to be so."""
    config: list[str]
    """Configuration files or packaged names of all arms, the base first."""
    bases: dict[str, Path]
    """Name of each base model -> its directory."""
    seeds: list[int]
    """Seeds of every arm on every base, see `design`."""
    arms: dict[str, Arm]
    """Name of each arm -> what it changes."""
    out: Path
    """Where runs and results are kept."""
    metrics: list[str] = field(default_factory=list)
    """Further keys of the final evaluation, shown beside."""
    setting: str = ""
    """What was run, for readers who do not know it: free text, a paragraph a line."""
    trade_off: dict[str, list[str]] = field(default_factory=dict)
    """Two names, each of a mean of metrics: shown against each other; none if empty."""
    margin: float | None = None
    """A primary contrast whose interval lies within this of 0 is called none; null: none is ever called so."""
    contrasts: list[list[str]] = field(default_factory=list)
    """Pairs of arms to compare beside the comparisons with the reference: the first minus the second."""
    sweep: Sweep | None = None
    """Runs every arm at several values of one setting and compares arms at equal learning; null: each arm once."""
    design: Literal["crossed", "nested"] = "nested"
    """Nested: every base has seeds of its own, so that the first base runs with `seeds`, the next with those after
    them, and so on. Crossed: `seeds` on every base."""
    set: Values = field(default_factory=dict)
    """Command-line keys and values of all arms."""
    records: Path | None = None
    """A file of finished cells: they need not run again, on whatever machine, and new ones are added; null: none."""
    make_bases: str | None = None
    """The command that makes the bases; printed if one is missing."""
    jobs: PositiveInt = 1
    """Fits at once, one thread each."""
    wandb: Wandb | None = None
    """Null logs to files only."""
    slurm: Values | None = None
    """Options of `submitit.AutoExecutor.update_parameters`, and `cluster`: slurm, local or debug."""

    @property
    def swept(self) -> dict[str, list[str]]:
        """Names of the arms that run for each arm, one a value of the sweep in its order; itself without a sweep."""
        values = [] if self.sweep is None else [f" at {value:g}" for value in self.sweep.values]
        return {name: [name + value for value in values or [""]] for name in self.arms}

    @property
    def run_arms(self) -> dict[str, Arm]:
        """The arms that run, by name."""
        if self.sweep is None:
            return self.arms
        values = [{self.sweep.key: value} for value in self.sweep.values]
        return {
            name: replace(arm, set={**arm.set, **value})
            for (_, names), arm in zip(self.swept.items(), self.arms.values(), strict=True)
            for name, value in zip(names, values, strict=True)
        }

    def seeds_of(self, base: str) -> list[int]:
        """The seeds of every arm on this base."""
        place = list(self.bases).index(base) if self.design == "nested" else 0
        return [seed + place * (max(self.seeds) + 1) for seed in self.seeds]


@dataclass(frozen=True)
class Cell:
    """One fit of the grid."""

    arm: str
    base: str
    seed: int
    directory: Path
    """Its run directory."""
    settings: tuple[str, ...]
    """The arguments of the command line that decide the result."""
    places: tuple[str, ...]
    """The arguments that say where files and records go, and that nothing is fitted to small data."""
    configs: tuple[str, ...]
    """Configurations that decide the result too."""
    model: Path
    """Directory of the base model."""
    needed: tuple[str, ...]
    """Keys of the final evaluation without which the cell has no result."""

    @property
    def name(self) -> str:
        """`<arm>/<base>/seed<k>`."""
        return f"{self.arm}/{self.base}/seed{self.seed}"

    @property
    def arguments(self) -> list[str]:
        """What `python -m mifo_lightning` gets."""
        return ["fit", *self.settings, *self.places]

    @property
    def command(self) -> str:
        """The shell command that runs this cell alone."""
        return shlex.join(["python", "-m", "mifo_lightning", *self.arguments])


def cells(ablation: Ablation) -> list[Cell]:
    """All cells; seeds vary slowest, so that an unfinished grid already compares all arms on all bases."""
    return [
        _cell(ablation, arm, base, ablation.seeds_of(base)[i])
        for i in range(len(ablation.seeds))
        for base in ablation.bases
        for arm in ablation.run_arms
    ]


def choose(grid: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that `ARM`, `ARM/BASE` or `ARM/BASE/SEED` names, in the grid's order; all if nothing is named."""
    chosen: set[str] = set()
    for wanted in only:
        found = {cell.name for cell in grid if any(f"{form}/".startswith(f"{wanted}/") for form in _forms(cell))}
        if not found:
            names = [", ".join(dict.fromkeys(str(getattr(c, k)) for c in grid)) for k in ("arm", "base", "seed")]
            allowed = "arms {}; bases {}; seeds {}".format(*names)
            raise InputError(f"--only {wanted}: allowed is ARM[/BASE[/SEED]] of {allowed}")
        chosen |= found
    return [cell for cell in grid if not only or cell.name in chosen]


def sweep(ablation: Ablation, grid: Sequence[Cell], config: Path) -> dict[str, Any]:
    """A W&B sweep whose agents run one cell of the grid after the other."""
    run_one = ["python", "-m", "mifo_lightning.lab", "ablation", "--config", str(config)]
    run_one += ["--out", str(ablation.out), "--wandb", "online"]
    return {
        "name": ablation.name,
        "description": ablation.question,
        "project": (ablation.wandb or Wandb()).project,
        "program": "mifo_lightning/lab/__main__.py",
        "method": "grid",
        "parameters": {"only": {"values": [f"{cell.arm}/{cell.base}/{cell.seed}" for cell in grid]}},
        "command": ["${env}", *run_one, "${args}"],
    }


def with_wandb(ablation: Ablation, mode: Literal["offline", "online"] | None) -> Ablation:
    """The ablation with its runs logged to W&B in this mode; unchanged if there is none."""
    return replace(ablation, wandb=replace(ablation.wandb or Wandb(), mode=mode)) if mode else ablation


def as_pairs(contrast: Sequence[str] | Sequence[Sequence[str]]) -> list[list[str]]:
    """The pairs of a `primary_contrast`, which is one pair or several; none if it is empty."""
    several = [list(pair) for pair in contrast if not isinstance(pair, str)]
    return several or ([[str(arm) for arm in contrast]] if contrast else [])


def slug(name: str) -> str:
    """A name as a directory: `random freeze + ES` becomes `random_freeze_es`."""
    return re.sub(r"[^\w.=-]+", "_", name.lower()).strip("_.") or "_"


def _cell(ablation: Ablation, arm: str, base: str, seed: int) -> Cell:
    """One cell, its command line included."""
    change, model = ablation.run_arms[arm], ablation.bases[base]
    directory = ablation.out / slug(arm) / slug(base) / f"seed{seed}"
    configs = (*ablation.config, *change.configs)
    values = {"model.model": str(model), "seed_everything": seed, **ablation.set, **change.set}
    places: dict[str, Any] = {
        "trainer.default_root_dir": str(directory),
        "trainer.logger": _logger(ablation, f"{arm}/{base}/seed{seed}", directory),
        "checkpoint.dirpath": str(directory / "checkpoints"),
        "data.schedule.fit_sizes": False,
    }
    settings = [text for file in configs for text in ("--config", file)] + flags(values)
    needed = tuple(dict.fromkeys([ablation.primary, *chain(*ablation.trade_off.values())]))
    return Cell(arm, base, seed, directory, tuple(settings), tuple(flags(places)), configs, model, needed)


def _logger(ablation: Ablation, name: str, directory: Path) -> Any:
    """A logger's configuration, false without W&B; its own files lie inside the run's directory."""
    if ablation.wandb is None:
        return False
    options = {
        "project": ablation.wandb.project,
        "group": ablation.name,
        "name": name,
        "id": "-".join(slug(part) for part in (ablation.name, *name.rsplit("/", 2))),
        "save_dir": str(directory / "wandb"),
        "mode": ablation.wandb.mode,
    }
    return {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": options}


def flags(values: Mapping[str, Any]) -> list[str]:
    """Arguments of a command line; what is no string is written as JSON, which YAML contains."""
    return [t for key, v in values.items() for t in (f"--{key}", v if isinstance(v, str) else json.dumps(v))]


def _forms(cell: Cell) -> tuple[str, ...]:
    """The names under which a cell may be chosen."""
    return cell.name, f"{cell.arm}/{cell.base}/{cell.seed}", f"{slug(cell.arm)}/{slug(cell.base)}/{cell.seed}"
