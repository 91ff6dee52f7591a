"""What an ablation file means: the file, checked, and the cells of its grid. Nothing is run or written here."""

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import PositiveInt
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mifo_lightning.errors import InputError

# what the grid itself puts on the command line of a fit -> where it comes from
GIVEN = {
    "model.model": "bases",
    "seed_everything": "seeds",
    "trainer.default_root_dir": "out",
    "trainer.logger": "wandb",
    "checkpoint.dirpath": "out",
    "ckpt_path": "the unfinished run",
    "resume": "the unfinished run",
    "data.fit_sizes": "its purpose: an arm runs what it says or is refused",
}


CROSSED_BASES, CROSSED_SEEDS = 5, 3
"""How many bases may share seeds, and how few seeds: beyond, too many of equal arms are called different
(`experiments.report.rates`)."""


@dataclass(frozen=True)
class Arm:
    """What one arm adds to the settings of all."""

    configs: list[str] = field(default_factory=list)
    """Configuration files, laid over those of all arms in this order."""
    set: dict[str, Any] = field(default_factory=dict)
    """Command-line keys and values, laid over those of all arms."""


@dataclass(frozen=True)
class Wandb:
    """Where W&B runs go; a run's group is the ablation, its name the cell."""

    project: str = "mifo-lightning"
    """W&B project."""
    mode: Literal["offline", "online"] = "offline"
    """Offline needs no account; `wandb sync` uploads later."""


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
    primary_contrast: list[str]
    """The one pair of arms, first minus second, whose difference is tested as it is; all others are exploratory."""
    config: list[str]
    """Configuration files of all arms, the base first."""
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
    design: Literal["crossed", "nested"] = "nested"
    """Nested: every base has seeds of its own, so that the first base runs with `seeds`, the next with those after
    them, and so on. Crossed: `seeds` on every base."""
    set: dict[str, Any] = field(default_factory=dict)
    """Command-line keys and values of all arms."""
    make_bases: str | None = None
    """The command that makes the bases; printed if one is missing."""
    jobs: PositiveInt = 1
    """Fits at once, one thread each."""
    wandb: Wandb | None = None
    """Null logs to files only."""
    slurm: dict[str, Any] | None = None
    """Options of `submitit.AutoExecutor.update_parameters`, and `cluster`: slurm, local or debug."""

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
    """Files that decide the result too."""
    model: Path
    """Directory of the base model."""
    primary: str
    """Key of the final evaluation without which the cell has no result."""

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


def read_ablation(path: Path, **changes: Any) -> Ablation:
    """The ablation that a YAML file describes, with some keys changed; raises InputError for what cannot be run."""
    try:
        raw = OmegaConf.load(path)
        content = OmegaConf.to_container(raw, resolve=True) if isinstance(raw, DictConfig) else None
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"--config {path}: cannot be read: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: expected keys and values, such as those of experiments/ablations/*.yaml")
    for key in ("arms", "bases"):
        if key in content and not (isinstance(content[key], dict) and content[key]):
            raise InputError(f"{path}: {key}: expected at least one name with what it stands for, got {content[key]}")
    for name, arm in content.get("arms", {}).items():
        _build(Arm, arm, f"{path}: arms.{name}")
    ablation = replace(_build(Ablation, content, str(path)), **changes)
    _check(ablation, path)
    return ablation


def cells(ablation: Ablation) -> list[Cell]:
    """All cells; seeds vary slowest, so that an unfinished grid already compares all arms on all bases."""
    return [
        _cell(ablation, arm, base, ablation.seeds_of(base)[i])
        for i in range(len(ablation.seeds))
        for base in ablation.bases
        for arm in ablation.arms
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
    run_one = ["python", "-m", "experiments.ablation", "--config", str(config), "--out", str(ablation.out)]
    run_one += ["--wandb", "online"]
    return {
        "name": ablation.name,
        "description": ablation.question,
        "project": (ablation.wandb or Wandb()).project,
        "program": "experiments/ablation.py",
        "method": "grid",
        "parameters": {"only": {"values": [f"{cell.arm}/{cell.base}/{cell.seed}" for cell in grid]}},
        "command": ["${env}", *run_one, "${args}"],
    }


def with_wandb(ablation: Ablation, mode: Literal["offline", "online"] | None) -> Ablation:
    """The ablation with its runs logged to W&B in this mode; unchanged if there is none."""
    return replace(ablation, wandb=replace(ablation.wandb or Wandb(), mode=mode)) if mode else ablation


def slug(name: str) -> str:
    """A name as a directory: `random freeze + ES` becomes `random_freeze_es`."""
    return re.sub(r"[^\w.=-]+", "_", name.lower()).strip("_.") or "_"


Kind = TypeVar("Kind", Ablation, Arm)


def _build(kind: type[Kind], content: Any, where: str) -> Kind:
    allowed = [f.name for f in fields(kind)]
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected {{}} or some of {', '.join(allowed)}; got {content}")
    unknown = [key for key in content if key not in allowed]
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]}; allowed are {', '.join(allowed)}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        return kind(**parser.instantiate(parser.parse_object(content)).as_dict())
    except ArgumentError as error:
        raise InputError(f"{where}: {_one_line(error)}") from None


def _check(ablation: Ablation, path: Path) -> None:
    """What types cannot say."""
    if ablation.reference not in ablation.arms:
        raise InputError(f"{path}: reference: {ablation.reference} is no arm; allowed are {', '.join(ablation.arms)}")
    _check_comparisons(ablation, path)
    once: dict[str, list[str]] = {
        "seeds": [str(seed) for seed in ablation.seeds],
        "arms": [slug(arm) for arm in ablation.arms],
        "bases": [slug(base) for base in ablation.bases],
    }
    for key, names in once.items():
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice or not names:
            raise InputError(f"{path}: {key}: {', '.join(twice) or 'none'} given; allowed is one or more, each once")
    parts = {"": Arm(ablation.config, ablation.set)}
    parts |= {f"arms.{name}.": arm for name, arm in ablation.arms.items()}
    for prefix, part in parts.items():
        for file in part.configs:
            if not Path(file).is_file():
                where = f"{prefix}configs" if prefix else "config"
                raise InputError(f"{path}: {where}: {file} is no file; paths are those of the working directory")
        for key in part.set:
            if source := next((GIVEN[own] for own in GIVEN if f"{key}.".startswith(f"{own}.")), None):
                raise InputError(f"{path}: {prefix}set.{key}: the grid gives it, from {source}; leave it out")
    for name, directory in ablation.bases.items():
        if not (directory / "config.json").is_file():
            make = f"; make it with `{ablation.make_bases}`" if ablation.make_bases else ""
            raise InputError(f"{path}: bases.{name}: {directory} is no model directory{make}")


def _check_comparisons(ablation: Ablation, path: Path) -> None:
    """That `trade_off` and the contrasts name two things each, and that a margin is one."""
    if ablation.trade_off and (len(ablation.trade_off) != 2 or not all(ablation.trade_off.values())):
        raise InputError(f"{path}: trade_off: {ablation.trade_off}: allowed are two names, each with metrics")
    if ablation.margin is not None and not 0 < ablation.margin < math.inf:
        raise InputError(f"{path}: margin: {ablation.margin}: allowed are numbers above 0, or null")
    pairs = [("primary_contrast", ablation.primary_contrast), *(("contrasts", pair) for pair in ablation.contrasts)]
    if ablation.primary_contrast[:1] == [ablation.reference]:
        raise InputError(f"{path}: primary_contrast: {ablation.primary_contrast}: the reference comes second")
    bases, seeds = len(ablation.bases), len(ablation.seeds)
    if ablation.design == "crossed" and bases > 1 and (bases > CROSSED_BASES or seeds < CROSSED_SEEDS):
        raise InputError(
            f"{path}: design: crossed: with {bases} bases and {seeds} seeds; what seeds do to all bases would pass for "
            f"what arms do: allowed are up to {CROSSED_BASES} bases with {CROSSED_SEEDS} seeds or more, or nested"
        )
    for key, pair in pairs:
        unknown = [arm for arm in pair if arm not in ablation.arms]
        if unknown or len(set(pair)) != 2 or len(pair) != 2:
            raise InputError(f"{path}: {key}: {pair}: allowed are two different arms of {', '.join(ablation.arms)}")


def _cell(ablation: Ablation, arm: str, base: str, seed: int) -> Cell:
    """One cell, its command line included."""
    change, model = ablation.arms[arm], ablation.bases[base]
    directory = ablation.out / slug(arm) / slug(base) / f"seed{seed}"
    configs = (*ablation.config, *change.configs)
    values = {"model.model": str(model), "seed_everything": seed, **ablation.set, **change.set}
    places: dict[str, Any] = {
        "trainer.default_root_dir": str(directory),
        "trainer.logger": _logger(ablation, f"{arm}/{base}/seed{seed}", directory),
        "checkpoint.dirpath": str(directory / "checkpoints"),
        "data.fit_sizes": False,
    }
    settings = [text for file in configs for text in ("--config", file)] + _flags(values)
    return Cell(arm, base, seed, directory, tuple(settings), tuple(_flags(places)), configs, model, ablation.primary)


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


def _flags(values: Mapping[str, Any]) -> list[str]:
    """Arguments of a command line; what is no string is written as JSON, which YAML contains."""
    return [t for key, v in values.items() for t in (f"--{key}", v if isinstance(v, str) else json.dumps(v))]


def _forms(cell: Cell) -> tuple[str, ...]:
    """The names under which a cell may be chosen."""
    return cell.name, f"{cell.arm}/{cell.base}/{cell.seed}", f"{slug(cell.arm)}/{slug(cell.base)}/{cell.seed}"


def _one_line(error: Exception) -> str:
    """An exception's text without line breaks, and without the names of our own classes."""
    return " ".join(re.sub(r"Problem with given class_path '[^']*':|Parser key", " ", str(error)).split())
