"""What a study is made of: the keys of its file, read and checked."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from mifo_lightning.cli.packaged import find
from mifo_lightning.common.errors import InputError, require
from mifo_lightning.lab.grid import Arm, Values, slug
from mifo_lightning.lab.reading import GIVEN, build, read_keys

PEAK, END = "peak", "end"
Start = int | str
"""A step of the sweep, peak or end."""
KINDS = ("rollback", "block", "either", "values", "directions", "as_published", "reverse")
Rank = int | str
"""A number of dimensions, or a share of min(m, n) as text: 1/8."""


@dataclass(frozen=True)
class Sweep:
    """Stage 1: one SFT run a base at a constant rate, and the steps at which its model is kept."""

    steps: list[int]
    """SFT steps after which the model is evaluated; 0, the base, among them; the last one is the end."""
    configs: list[str] = field(default_factory=lambda: ["methods/sft"])
    """Configurations laid over those of all fits."""
    set: Values = field(default_factory=dict)
    """Keys and values laid over those of all fits."""


@dataclass(frozen=True)
class Stage:
    """What one arm of stage 2 does, and from which checkpoints."""

    configs: list[str] = field(default_factory=list)
    """Configurations laid over those of all fits."""
    set: Values = field(default_factory=dict)
    """Keys and values laid over those of all fits."""
    start: list[Start] = field(default_factory=lambda: [END])
    """Steps of the sweep, peak or end."""


@dataclass(frozen=True)
class Spectra:
    """Stage 3: which matrices are taken apart, and at which dimensions."""

    matrices: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Names of the matrices of a layer; stage 4 edits the same."""
    k: list[Rank] = field(default_factory=lambda: [1, 4, 8, "1/16", "1/8", "1/4", "1/2"])
    """Dimensions of the subspaces; those above half of min(m, n) are left out of a matrix."""
    steps: list[int] = field(default_factory=list)
    """Steps of the sweep that are compared with base and peak; none takes the end alone."""


@dataclass(frozen=True)
class Edits:
    """Stage 4: which parts of SFT's change are put back; the controls always come on top."""

    primary: str
    """The edit that the verdict is about, named before it is run, such as `either top 1/4`."""
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    """Of rollback, block, either, values, directions, as_published, reverse."""
    k: list[str] = field(default_factory=lambda: ["1/16", "1/8", "1/4", "1/2"])
    """Dimensions of block, either, reverse and random subspaces, shares of min(m, n)."""
    thirds: bool = True
    """Whether each third of the layers is edited alone as well."""
    published: list[list[str]] = field(default_factory=lambda: [["1/8", "0"], ["1/2", "0"], ["0", "1/8"]])
    """k_top and k_tail of as_published, shares of the width of the model."""
    seeds: PositiveInt = 5
    """Random subspaces of each kind and dimension."""
    interpolation: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    """Shares of SFT's change that are kept; 0 and 1 come by themselves."""


@dataclass(frozen=True)
class Study:
    """One study."""

    name: str
    """Title of its page."""
    config: list[str]
    """Configuration files or packaged names of all fits and evaluations, the base first."""
    bases: dict[str, Path]
    """Name of each base model -> its directory; the base is the unit of every interval."""
    id: str
    """Metric of the task that is trained, on questions that are not."""
    ood: str
    """Metric out of distribution."""
    evaluation: dict[str, Values]
    """Keys and values of `val`, by which checkpoints are chosen, and `test`, which is reported."""
    sweep: Sweep
    rl: dict[str, Stage]
    """Arms of stage 2 by name; the first is the RL that spectra and reverse edits are about."""
    edits: Edits
    out: Path
    """Where fits and the page are kept, and what is measured, unless `records` names a place for it."""
    id_seen: str | None = None
    """Metric of the task on questions that were trained; edits are then compared at equal values of it, else of id."""
    setting: str = ""
    """What was run, for readers who do not know it."""
    set: Values = field(default_factory=dict)
    """Keys and values of all fits and evaluations."""
    spectra: Spectra = field(default_factory=Spectra)
    protected: float | None = None
    """Share of each matrix's own main directions that stand still in two further runs of SFT; null makes none."""
    signal_questions: PositiveInt = 256
    """Training questions that are asked once, a group each, to see how much RL would have to work with."""
    draws: PositiveInt = 4
    """Further evaluations of the end with other random draws: the noise of an evaluation."""
    verdict: bool = True
    """Whether the bases suffice for one; false describes."""
    seed: int = 0
    """Seed of the first base; the next has the next one."""
    records: Path | None = None
    """Directory of what is measured, a file a base, to be committed: another machine goes on. null: in `out`."""
    make_bases: str | None = None
    """The command that makes the bases; printed if one is missing."""
    jobs: PositiveInt = 1
    """Fits and evaluations at once, one thread each."""

    @property
    def matched(self) -> str:
        """The metric at equal values of which edits are compared."""
        return self.id_seen or self.id

    @property
    def metrics(self) -> list[str]:
        """What is kept of an evaluation: accuracies, then losses on demonstrations."""
        accuracies = [key for key in (self.id_seen, self.id, self.ood) if key]
        return [*accuracies, *(loss(key) for key in accuracies)]

    @property
    def last(self) -> int:
        """The step of the end."""
        return max(self.sweep.steps)

    @property
    def main(self) -> str:
        """The RL that spectra and reverse edits are about."""
        return next(iter(self.rl))

    def seed_of(self, base: str) -> int:
        """The seed of all fits on a base."""
        return self.seed + list(self.bases).index(base)

    def content(self) -> dict[str, Any]:
        """What a page is made of, as plain values: all but places and how many run at once."""
        places = ("out", "records", "jobs", "make_bases", "bases")
        kept = {key: value for key, value in asdict(self).items() if key not in places}
        return kept | {"bases": list(self.bases)}

    def decisive(self) -> dict[str, Any]:
        """What of it decides a measurement: not how the page words it, nor what names of records say."""
        apart = ("name", "setting", "verdict", "protected")
        return {key: value for key, value in self.content().items() if key not in apart}


def loss(metric: str) -> str:
    """The loss on demonstrations of the questions of a metric."""
    return f"{metric.rpartition('/')[0]}/demonstration_loss"


def read_study(path: Path, **changes: Any) -> Study:
    """The study that a YAML file describes, with some keys changed; raises InputError for what cannot be run."""
    content = read_keys(path, "experiments/heal/*.yaml")
    for key in ("bases", "rl"):
        good = isinstance(content.get(key), dict) and content[key]
        require(f"{path}: {key}", content.get(key), bool(good), "at least one name with what it stands for")
    parts = {"sweep": Sweep, "spectra": Spectra, "edits": Edits}
    for key, kind in parts.items():
        if key in content:
            build(kind, content[key], f"{path}: {key}")
    for name, arm in content["rl"].items():
        build(Stage, arm, f"{path}: rl.{name}")
    study = replace(build(Study, content, str(path)), **changes)
    _check(study, path)
    return study


def share(text: str) -> float:
    """A share of a dimension: `1/8` or `0`.

    Raises:
        ValueError: It is none, or outside [0, 1].
    """
    above, _, below = text.partition("/")
    if not (value := int(above) / int(below or 1)) <= 1 or value < 0:
        raise ValueError(text)
    return value


def dimension(rank: Rank, size: int) -> int:
    """How many of `size` dimensions a rank means: shares are rounded, and at least 1 unless they are 0."""
    if isinstance(rank, int):
        return rank
    return max(1, round(share(rank) * size)) if share(rank) else 0


def _check(study: Study, path: Path) -> None:
    """What types cannot say."""
    steps = study.sweep.steps
    good = len(steps) > 1 and min(steps) == 0 and steps == sorted(set(steps))
    require(f"{path}: sweep.steps", steps, good, "ascending whole numbers from 0, at least two")
    for name, arm in study.rl.items():
        _check_start(arm.start, steps, f"{path}: rl.{name}.start")
    main = study.rl[study.main].start
    require(f"{path}: rl.{study.main}.start", main, 0 in main and END in main, "a list with 0 and end among others")
    late = [step for step in study.spectra.steps if step not in steps or not step]
    require(f"{path}: spectra.steps", late, not late, "some of sweep.steps, without 0")
    for key in ("val", "test"):
        require(
            f"{path}: evaluation.{key}", study.evaluation.get(key), key in study.evaluation, "keys and values, or {}"
        )
    share_held = study.protected
    good = share_held is None or 0 < share_held < 1
    require(f"{path}: protected", share_held, good, "a share between 0 and 1, or null")
    _check_edits(study.edits, path)
    _check_ranks(study.spectra.k, f"{path}: spectra.k")
    names = [slug(name) for name in study.bases]
    require(f"{path}: bases", list(study.bases), len(set(names)) == len(names), "names of different directories")
    _check_files(study, path)


def _check_start(start: Sequence[Start], steps: list[int], key: str) -> None:
    wrong = [one for one in start if one not in (*steps, PEAK, END)]
    require(key, wrong or list(start), bool(start) and not wrong, f"some of {', '.join(map(str, steps))}, peak, end")


def _check_edits(edits: Edits, path: Path) -> None:
    wrong = [kind for kind in edits.kinds if kind not in KINDS]
    require(f"{path}: edits.kinds", wrong, not wrong, f"some of {', '.join(KINDS)}")
    _check_ranks(edits.k, f"{path}: edits.k")
    for pair in edits.published:
        _check_ranks(pair, f"{path}: edits.published")
        require(f"{path}: edits.published", pair, len(pair) == 2, "pairs of k_top and k_tail")
    allowed = [f"{kind} {end} {k}" for kind in ("block", "either") if kind in edits.kinds for end in ("top", "tail")
               for k in edits.k]  # fmt: skip
    require(f"{path}: edits.primary", edits.primary, edits.primary in allowed, " or ".join(allowed))
    good = bool(edits.interpolation) and all(0 < a < 1 for a in edits.interpolation)
    require(f"{path}: edits.interpolation", edits.interpolation, good, "numbers between 0 and 1, at least one")


def _check_ranks(ranks: Sequence[Rank], key: str) -> None:
    for rank in ranks:
        try:
            good = rank >= 1 if isinstance(rank, int) else share(rank) >= 0
        except (ValueError, ZeroDivisionError):
            good = False
        require(key, rank, good, "whole numbers above 0 or shares such as 1/8")


def _check_files(study: Study, path: Path) -> None:
    """That configurations and bases are there, and that no key is given that the study gives itself."""
    parts = {"": Arm(study.config, study.set), "sweep.": Arm(study.sweep.configs, study.sweep.set)}
    parts |= {f"rl.{name}.": Arm(arm.configs, arm.set) for name, arm in study.rl.items()}
    parts |= {f"evaluation.{key}.": Arm(set=values) for key, values in study.evaluation.items()}
    own = [*GIVEN, "export.steps", "export.directory", "export.dtype"]
    for prefix, part in parts.items():
        for file in part.configs:
            try:
                find(file)
            except InputError as error:
                raise InputError(f"{path}: {prefix}configs: {str(error).removeprefix('--config ')}") from None
        for key in part.set:
            given = any(f"{key}.".startswith(f"{name}.") for name in own)
            require(f"{path}: {prefix}set", key, not given, "left out: the study gives it")
    for name, directory in study.bases.items():
        make = f"; make it with `{study.make_bases}`" if study.make_bases else ""
        if not (directory / "config.json").is_file():
            raise InputError(f"{path}: bases.{name}: {directory} is no model directory{make}")
