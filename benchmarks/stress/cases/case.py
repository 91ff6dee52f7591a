"""A case, and the pantry: the tiny run, its model and its checkpoint that all cases start from."""

import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

Expected = Literal["refused", "accepted", "either"]
TINY = Path(__file__).parents[3] / "configs" / "tiny.yaml"
MIFO = TINY.parent / "methods" / "mifo.yaml"
BASE = Path(__file__).parents[3] / "mifo_lightning" / "assets" / "base"

# MIFO on configs/tiny.yaml, cut down to two RL steps and their SFT phase: a second and a half
SMALL = {
    "trainer": {"logger": False, "profiler": None, "enable_progress_bar": False},
    "progress": None,
    "model": {"rollout": {"group_size": 2, "self_check": False}},
    "data": {
        "train": {
            "class_path": "mifo_lightning.data.skills.Skills",
            "init_args": {"skills": ["addition", "mirrored"], "count": 16},
        },
        "val": None,
        "schedule": {"rl_steps": 2, "prompts_per_step": 4, "sft_batch": 4, "sft_epochs": 1},
    },
    "buffer": {"size": 4, "max_accuracy": 1.0},
}


@dataclass(frozen=True)
class Pantry:
    """What cases share, made once: `small.yaml`, and in `run/` what a whole tiny run leaves behind."""

    root: Path

    @property
    def small(self) -> Path:
        """The configuration laid over MIFO on configs/tiny.yaml."""
        return self.root / "small.yaml"

    @property
    def checkpoint(self) -> Path:
        """last.ckpt after the first optimizer step of a tiny run."""
        return self.root / "run" / "checkpoints" / "last.ckpt"

    def fit(self, place: Path, *flags: str | Path) -> list[str]:
        """The command line of a tiny fit that writes under `place`."""
        configs = ["--config", TINY, "--config", MIFO, "--config", self.small]
        return [str(part) for part in ("fit", *configs, "--trainer.default_root_dir", place / "out", *flags)]

    def fill(self) -> list[str]:
        """Write the configuration; the command line that makes the rest."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.small.write_text(yaml.safe_dump(SMALL))
        flags = self.fit(self.root, "--trainer.max_steps", "1")
        return [*flags, "--trainer.default_root_dir", str(self.root / "run")]


Build = Callable[[Path, Pantry], list[str]]


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        name: What is wrong with it, or right.
        build: Writes its files into an empty directory, which is also the working directory; returns the arguments.
        expect: What should come of it.
        env: Further environment variables; then it runs as a process of its own.
        harm: Looks at the directory afterwards; what was done there that should not be, or an empty text.
        limit: Seconds until it counts as hanging, where it needs more than others.
    """

    name: str
    build: Build
    expect: Expected = "refused"
    env: dict[str, str] = field(default_factory=dict)
    harm: Callable[[Path], str] | None = None
    limit: float = 0.0


def flags(text: str, expect: Expected = "refused") -> Case:
    """A tiny fit with these flags; `{place}` stands for its directory, `{run}` for the earlier run."""

    def build(place: Path, pantry: Pantry) -> list[str]:
        named = {"{place}": str(place), "{run}": str(pantry.root / "run")}
        words = shlex.split(text)
        for name, value in named.items():
            words = [word.replace(name, value) for word in words]
        return pantry.fit(place, *words)

    return Case(text, build, expect)


def overlay(name: str, text: str | bytes, expect: Expected = "refused") -> Case:
    """A tiny fit with one more configuration file."""

    def build(place: Path, pantry: Pantry) -> list[str]:
        path = place / "over.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        return pantry.fit(place, "--config", path)

    return Case(name, build, expect)


def prepared(name: str, prepare: Callable[[Path], str], expect: Expected = "refused") -> Case:
    """A tiny fit with the flags that `prepare` returns once it has written its files."""
    return Case(name, lambda place, pantry: pantry.fit(place, *shlex.split(prepare(place))), expect)


def changed_model(name: str, change: Callable[[Path], object], expect: Expected = "refused") -> Case:
    """A tiny fit on a copy of the embedded model in which something was changed."""

    def build(place: Path, pantry: Pantry) -> list[str]:
        directory = place / "model"
        shutil.copytree(BASE, directory)
        change(directory)
        return pantry.fit(place, "--model.model", directory)

    return Case(name, build, expect)
