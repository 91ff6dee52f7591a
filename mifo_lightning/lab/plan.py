"""What an ablation writes beside its runs: what was planned, before the fits, and how each of them ended."""

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mifo_lightning.common.errors import InputError
from mifo_lightning.lab.cell import LOCK, held, outcome, write_json
from mifo_lightning.lab.grid import Ablation, Cell, slug

PLAN = "ablation.json"
KEPT = "experiments/records"
"""Where studies add what is measured while they run."""
NAMED_BEFORE = ("primary", "trade_off", "primary_contrast", "margin", "sweep", "bases", "seeds")
"""What a reader takes to have been named before a run had been seen."""


def write_plan(ablation: Ablation, command: str, fits: bool, restored: Sequence[str] = ()) -> None:
    """Write `ablation.json`, before the fits, so that a call that is killed is recorded too.

    Its `commit` (all of them, in order) and `command` are those of calls with fits to run; commits of fits that were
    restored from records, `restored`, come first.
    """
    path = ablation.out / PLAN
    keys = ("name", "question", "setting", "metrics", "reference", "contrasts", "design")
    record = {
        **{key: getattr(ablation, key) for key in keys},
        **named_before(ablation),
        "arms": [{"name": name, "directory": slug(name), **asdict(arm)} for name, arm in ablation.run_arms.items()],
        "swept": ablation.swept,
    }
    with held(ablation.out / LOCK):  # agents of a sweep begin and end at any time
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        made: dict[str, str | None] = {"command": None, "commit": None}
        made |= {key: before[key] for key in ("command", "commit", "note") if key in before}
        commits = [*", ".join([made["commit"] or "", *restored]).split(", "), *([commit()] if fits else [])]
        if fits or (restored and not made["command"]):
            made["command"] = command
        made["commit"] = ", ".join(dict.fromkeys(filter(None, commits))) or None
        write_json(path, {**record, **made})


def check_named_before(ablation: Ablation, grid: Iterable[Cell]) -> None:
    """Raise InputError if what is tested, or on what, was named anew after a fit was done."""
    path = ablation.out / PLAN
    if path.is_file() and any(outcome(cell.directory).status == "done" for cell in grid):
        check_same_names(ablation, json.loads(path.read_text(encoding="utf-8")), ablation.out)


def check_same_names(ablation: Ablation, before: Mapping[str, Any], where: Path) -> None:
    """Raise InputError if what is tested, or on what, differs from what was named `before` the runs of `where`."""
    for key, value in named_before(ablation).items():
        if before.get(key) != value:
            raise InputError(
                f"{key}: {value}: was {before.get(key)} when runs of {where} were made; one named after them is "
                "exploratory: put a pair of arms under `contrasts`, take some bases by `lab report --bases`, or choose "
                f"another `out`{' and `records`' if ablation.records else ''}"
            )


def named_before(ablation: Ablation) -> dict[str, Any]:
    """What the plan has of it, in types of JSON."""
    found = {key: getattr(ablation, key) for key in NAMED_BEFORE}
    sweep = None if ablation.sweep is None else asdict(ablation.sweep)
    bases = list(ablation.bases)
    return {**found, "sweep": sweep, "bases": bases, "seeds": {base: ablation.seeds_of(base) for base in bases}}


def write_cells(ablation: Ablation, grid: Iterable[Cell]) -> list[dict[str, Any]]:
    """Write `cells.json`, all cells as they are on disk now; returns its rows."""
    with held(ablation.out / LOCK):
        rows = [
            {
                "arm": cell.arm,
                "base": cell.base,
                "seed": cell.seed,
                "directory": str(cell.directory.relative_to(ablation.out)),
                **asdict(outcome(cell.directory)),
            }
            for cell in grid
        ]
        write_json(ablation.out / "cells.json", rows)
    return rows


def commit() -> str | None:
    """The commit of the working tree, marked if files but kept records differ from it; None outside of a repository."""
    here: dict[str, Any] = {"capture_output": True, "text": True, "cwd": Path(__file__).parent}
    try:
        # no tag is wanted: only then is it the hash
        found = subprocess.run(["git", "describe", "--always", "--abbrev=40", "--exclude=*"], **here).stdout.strip()
        differs = ["git", "status", "--porcelain", "--untracked-files=no", "--", ":(top)", f":(top,exclude){KEPT}"]
        dirty = subprocess.run(differs, **here).stdout.strip()
    except FileNotFoundError:
        return None
    return f"{found}-dirty" if found and dirty else found or None
