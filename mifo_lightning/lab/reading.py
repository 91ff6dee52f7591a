"""An ablation file, read and checked."""

import math
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError, safe_load

from mifo_lightning.cli.config_files import given
from mifo_lightning.cli.packaged import find
from mifo_lightning.common.errors import InputError
from mifo_lightning.lab.grid import Ablation, Arm, as_pairs, slug

# what the grid itself puts on the command line of a fit -> where it comes from
GIVEN = {
    "model.model": "bases",
    "seed_everything": "seeds",
    "trainer.default_root_dir": "out",
    "trainer.logger": "wandb",
    "checkpoint.dirpath": "out",
    "ckpt_path": "the unfinished run",
    "resume": "the unfinished run",
    "data.schedule.fit_sizes": "its purpose: an arm runs what it says or is refused",
}


CROSSED_BASES, CROSSED_SEEDS = 5, 3
"""How many bases may share seeds, and how few seeds: beyond, too many of equal arms are called different
(`mifo_lightning.lab.report.rates`)."""


def read_ablation(path: Path, **changes: Any) -> Ablation:
    """The ablation that a YAML file describes, with some keys changed; raises InputError for what cannot be run."""
    content = read_keys(path, "experiments/ablations/*.yaml")
    for key in ("arms", "bases"):
        if key in content and not (isinstance(content[key], dict) and content[key]):
            raise InputError(f"{path}: {key}: expected at least one name with what it stands for, got {content[key]}")
    for name, arm in content.get("arms", {}).items():
        build(Arm, arm, f"{path}: arms.{name}")
    ablation = replace(build(Ablation, content, str(path)), **changes)
    _check(ablation, path)
    return ablation


Kind = TypeVar("Kind")


def read_keys(path: Path, like: str) -> dict[str, Any]:
    """What a YAML file says, interpolations resolved; InputError unless it has keys, such as those of files `like`."""
    try:
        raw = OmegaConf.load(path)
        content = OmegaConf.to_container(raw, resolve=True) if isinstance(raw, DictConfig) else None
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"--config {path}: cannot be read: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: expected keys and values, such as those of {like}")
    return {str(key): value for key, value in content.items()}


def check_bases(ablation: Ablation, needed: Collection[str]) -> None:
    """Raise InputError if a base that unfinished cells need is no model directory."""
    for name, directory in ablation.bases.items():
        if name in needed and not (directory / "config.json").is_file():
            make = f"; make it with `{ablation.make_bases}`" if ablation.make_bases else ""
            raise InputError(f"bases.{name}: {directory} is no model directory{make}")


def build(kind: type[Kind], content: Any, where: str) -> Kind:
    """The dataclass `kind` from its keys and values; InputError, which begins with `where`, for what it cannot hold."""
    allowed = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected {{}} or some of {', '.join(allowed)}; got {content}")
    unknown = [key for key in content if key not in allowed]
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]}; allowed are {', '.join(allowed)}")
    empty = [f.name for f in fields(kind) if f.default is not None and content.get(f.name, f) is None]  # type: ignore[arg-type]
    if empty:
        raise InputError(f"{where}: {empty[0]}: nothing is given; allowed is a value, or no such key for its default")
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
    _check_sweep(ablation, path)
    once: dict[str, list[str]] = {
        "seeds": [str(seed) for seed in ablation.seeds],
        "arms": [slug(arm) for arm in ablation.run_arms],
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
            try:
                find(file)
            except InputError as error:
                where = f"{prefix}configs" if prefix else "config"
                raise InputError(f"{path}: {where}: {str(error).removeprefix('--config ')}") from None
        for key in part.set:
            if source := next((GIVEN[own] for own in GIVEN if f"{key}.".startswith(f"{own}.")), None):
                raise InputError(f"{path}: {prefix}set.{key}: the grid gives it, from {source}; leave it out")


def replaced(ablation: Ablation) -> list[str]:
    """Lines about settings of all arms that take the place of what makes an arm the method it is called by.

    So may `data.schedule.rl_steps` of a table give steps of RL to SFT alone. An arm that says itself what holds, and a
    value that follows another key, are left out.
    """
    lines = []
    for key, of_all in ablation.set.items():
        found = [
            f"{one.value} of {name!r} ({one.place})"
            for name, arm in ablation.arms.items()
            if key not in arm.set
            for one in given([text for file in arm.configs for text in ("--config", file)])
            if one.key == key and "${" not in one.value and safe_load(one.value) != of_all
        ]
        if found:
            lines.append(
                f"set.{key}: {of_all} takes the place of {', '.join(found)}; an arm's own `set` can say otherwise"
            )
    return lines


def _check_sweep(ablation: Ablation, path: Path) -> None:
    """That a sweep can be interpolated, and changes what no arm sets for itself."""
    sweep = ablation.sweep
    if sweep is None:
        return
    if len(sweep.values) < 2 or sweep.values != sorted(set(sweep.values)):
        raise InputError(f"{path}: sweep.values: {sweep.values}: allowed are two numbers or more, in rising order")
    if not ablation.trade_off or len(ablation.bases) < 2:
        raise InputError(f"{path}: sweep: needs a trade_off and two bases or more: arms are compared on it within each")
    if ablation.design == "crossed":
        raise InputError(f"{path}: design: crossed: a sweep compares within bases, each with seeds of its own: nested")
    if not math.isfinite(sweep.level):
        raise InputError(f"{path}: sweep.level: {sweep.level}: allowed are finite numbers")
    if source := next((GIVEN[own] for own in GIVEN if f"{sweep.key}.".startswith(f"{own}.")), None):
        raise InputError(f"{path}: sweep.key: {sweep.key}: the grid gives it, from {source}")
    for where, names in {
        "set": ablation.set,
        **{f"arms.{name}.set": arm.set for name, arm in ablation.arms.items()},
    }.items():
        if sweep.key in names:
            raise InputError(f"{path}: {where}.{sweep.key}: is what the sweep changes in every arm; leave it out")


def _check_comparisons(ablation: Ablation, path: Path) -> None:
    """That `trade_off` and the contrasts name two things each, and that a margin is one."""
    if ablation.trade_off and (len(ablation.trade_off) != 2 or not all(ablation.trade_off.values())):
        raise InputError(f"{path}: trade_off: {ablation.trade_off}: allowed are two names, each with metrics")
    if ablation.margin is not None and not 0 < ablation.margin < math.inf:
        raise InputError(f"{path}: margin: {ablation.margin}: allowed are numbers above 0, or null")
    named = as_pairs(ablation.primary_contrast)
    if not named or len({frozenset(pair) for pair in named}) < len(named):
        raise InputError(f"{path}: primary_contrast: {ablation.primary_contrast}: allowed are pairs of arms, each once")
    pairs = [*(("primary_contrast", pair) for pair in named), *(("contrasts", pair) for pair in ablation.contrasts)]
    if any(pair[:1] == [ablation.reference] for pair in named):
        raise InputError(f"{path}: primary_contrast: {ablation.primary_contrast}: the reference comes second")
    if len(named) > 1 and ablation.margin is None:
        raise InputError(f"{path}: margin: null: several primary contrasts must all hold by more than a margin")
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


def _one_line(error: Exception) -> str:
    """An exception's text without line breaks, and without the names of our own classes."""
    return " ".join(re.sub(r"Problem with given class_path '[^']*':|Parser key", " ", str(error)).split())
