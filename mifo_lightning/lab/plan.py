"""What an ablation writes beside its runs: what was planned, before the fits, and how each of them ended."""

import json
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mifo_lightning.common.errors import InputError
from mifo_lightning.lab.cell import LOCK, held, outcome, write_json
from mifo_lightning.lab.grid import Ablation, Cell, slug

PLAN = "ablation.json"
NAMED_BEFORE = ("primary", "trade_off", "primary_contrast", "margin", "sweep")
"""What a reader takes to have been named before a run had been seen."""


def write_plan(ablation: Ablation, command: str, fits: bool) -> None:
    """Write `ablation.json`; its `commit` (all of them, in order) and `command` are those of calls with fits to run.

    Written before the fits, so that a call that is killed is recorded too.
    """
    path = ablation.out / PLAN
    keys = ("name", "question", "setting", "metrics", "trade_off", "reference", "contrasts", "design")
    record = {
        **{key: getattr(ablation, key) for key in keys},
        **_named_before(ablation),
        "arms": [{"name": name, "directory": slug(name), **asdict(arm)} for name, arm in ablation.run_arms.items()],
        "swept": ablation.swept,
        "bases": list(ablation.bases),
        "seeds": {base: ablation.seeds_of(base) for base in ablation.bases},
    }
    with held(ablation.out / LOCK):  # agents of a sweep begin and end at any time
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        made = {key: before.get(key) for key in ("command", "commit")}
        if fits:
            commits = (made["commit"] or "").split(", ")
            commits += [now for now in [commit()] if now and now not in commits]
            made = {"command": command, "commit": ", ".join(filter(None, commits)) or None}
        write_json(path, {**record, **made})


def check_named_before(ablation: Ablation, grid: Iterable[Cell]) -> None:
    """Raise InputError if what is tested was named anew after a fit had ended."""
    path = ablation.out / PLAN
    if not path.is_file() or all(outcome(cell.directory).status == "missing" for cell in grid):
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for key, value in _named_before(ablation).items():
        if before.get(key) != value:
            raise InputError(
                f"{key}: {value}: was {before.get(key)} when runs of {ablation.out} were made; one "
                "named after them is exploratory: put a pair of arms under `contrasts`, or choose another `out`"
            )


def _named_before(ablation: Ablation) -> dict[str, Any]:
    """What the plan has of it."""
    sweep = None if ablation.sweep is None else asdict(ablation.sweep)
    return {key: sweep if key == "sweep" else getattr(ablation, key) for key in NAMED_BEFORE}


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
    """The commit of the working tree, marked if files differ from it; None outside of a repository."""
    try:
        # no tag is wanted: only then is it the hash
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return None
    return ended.stdout.strip() or None
