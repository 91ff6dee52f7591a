"""What a study of circuits measures, and its file."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from mifo_lightning.common.errors import InputError, require
from mifo_lightning.data.skills import SIZES
from mifo_lightning.data.source import Split

BASE = "base"
"""Stands where a record names an arm, for the base itself."""


@dataclass(frozen=True)
class Study:
    """The keys of a file such as experiments/circuits.yaml, which says what each means."""

    runs: Path
    bases: dict[str, Path]
    arms: list[str]
    primary_arm: str
    untrained: list[str]
    out: Path
    skills: list[str]
    make_bases: str | None = None
    questions: int = 256
    split: Split = "test"
    seed: int = 0
    given: int = 1
    kept: float = 0.9
    least: float = 0.1
    random_sets: int = 8

    @property
    def measured(self) -> dict[str, Any]:
        """What decides a record, weights aside."""
        names = ("skills", "untrained", "questions", "split", "seed", "given", "kept", "least", "random_sets")
        return {name: value for name, value in asdict(self).items() if name in names}


def read_study(path: Path, out: Path | None = None) -> Study:
    """The study that a YAML file describes, with another `out` if one is given; raises InputError for a bad file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: expected keys and values, such as those of experiments/circuits.yaml")
    allowed = [field.name for field in fields(Study)]
    if unknown := [key for key in content if key not in allowed]:
        raise InputError(f"{path}: unknown key {unknown[0]}; allowed are {', '.join(allowed)}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study)
    given = {**content, **({"out": str(out)} if out else {})}
    try:
        study = Study(**parser.instantiate(parser.parse_object(given)).as_dict())
    except ArgumentError as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    _check(study, path)
    return study


def _check(study: Study, path: Path) -> None:
    """What types cannot say."""
    known = ", ".join(SIZES)
    for key, names, allowed, what in (
        ("skills", study.skills, list(SIZES), f"one or more of {known}, each once"),
        ("untrained", study.untrained, study.skills, "one or more of `skills`, each once"),
        ("arms", study.arms, [arm for arm in study.arms if arm != BASE], f"one or more arms, each once, none {BASE!r}"),
        ("bases", list(study.bases), list(study.bases), "one or more bases"),
    ):
        good = bool(names) and set(names) <= set(allowed) and len(set(names)) == len(names)
        require(f"{path}: {key}", names, good, what)
    require(
        f"{path}: primary_arm", study.primary_arm, study.primary_arm in study.arms, f"one of {', '.join(study.arms)}"
    )
    for key in ("questions", "random_sets"):
        require(f"{path}: {key}", getattr(study, key), getattr(study, key) >= 1, "1 or more")
    for key in ("seed", "given"):
        require(f"{path}: {key}", getattr(study, key), getattr(study, key) >= 0, "0 or more")
    for key in ("kept", "least"):
        require(f"{path}: {key}", getattr(study, key), 0 < getattr(study, key) <= 1, "above 0, at most 1")
