"""Finished cells in one small file, so that a grid goes on where another machine stopped.

A line is a cell: its name, what it was run with, when, what had been named before, its seconds and its summary. Whoever
has the file and the bases of the unfinished cells needs no run directory of the others.
"""

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.files import replace_text
from mifo_lightning.lab.cell import SUMMARY, outcome, record_outcome, write_json
from mifo_lightning.lab.fingerprint import FINGERPRINT, Fingerprint, read_fingerprint
from mifo_lightning.lab.grid import Ablation, Cell
from mifo_lightning.lab.plan import check_same_names, named_before

Row = dict[str, Any]
RESULT, MADE = ("cell", "seconds", "fingerprint", "summary"), ("study", "commit", "named")


def keep(
    path: Path, ablation: Ablation, grid: Iterable[Cell], ran: Collection[str] = (), at: str | None = None
) -> None:
    """Write the finished cells of the grid; lines of others stay as they are.

    Args:
        path: The file.
        ablation: Says what was named before a fit, which stands in its line.
        grid: All its cells.
        ran: Names of those that this call runs.
        at: The commit at which it began.
    """
    rows = _read(path) if path.is_file() else {}
    now = {"study": ablation.name, "named": named_before(ablation)}
    for cell in grid:
        found = outcome(cell.directory)
        if found.status == "done":
            summary = json.loads((cell.directory / SUMMARY).read_text(encoding="utf-8"))
            values = (cell.name, found.seconds, read_fingerprint(cell.directory), summary)
            result, before = dict(zip(RESULT, values, strict=True)), rows.get(cell.name, {})
            known = all(before.get(key) == value for key, value in result.items())
            made = {key: before[key] for key in MADE if key in before} if known else now
            rows[cell.name] = result | made | ({"commit": at} if not known and cell.name in ran else {})
    replace_text(path, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows.values()))


def restore(path: Path, ablation: Ablation, grid: Iterable[Cell]) -> list[str]:
    """Make the cells of the file finished ones, where their directories say nothing of their own; their commits.

    Raises:
        InputError: A line is not what `keep` writes, or this ablation named other things before its fit.
    """
    rows = _read(path) if path.is_file() else {}
    commits = []
    for cell in grid:
        row = rows.get(cell.name)
        if row is None:
            continue
        if row.get("study") == ablation.name:  # a line may have been taken over from another study
            check_same_names(ablation, row["named"], path)
        if read_fingerprint(cell.directory) is None:
            cell.directory.mkdir(parents=True, exist_ok=True)
            write_json(cell.directory / FINGERPRINT, row["fingerprint"])
            write_json(cell.directory / SUMMARY, row["summary"])
            record_outcome(cell.directory, None, float(row["seconds"]))
            commits.append(row.get("commit") or "")
    return commits


def check_same_inputs(work: Iterable[tuple[Cell, Fingerprint]], grid: Iterable[Cell]) -> None:
    """Raise InputError if cells that are compared, finished or to be run, began with different models or files.

    The models are those of one base; a file is one that settings name by the same path.
    """
    known: dict[tuple[str, str], tuple[str, str]] = {}
    finished = [(cell, read_fingerprint(cell.directory)) for cell in grid if outcome(cell.directory).status == "done"]
    for cell, present in [*finished, *work]:
        if present is None:
            continue
        inputs = {("base", cell.base): present["base model"]}
        inputs |= {("file", path): digest for path, digest in present.get("files", {}).items()}
        for (kind, name), digest in inputs.items():
            other, one = known.setdefault((kind, name), (cell.name, digest))
            if one != digest:
                what = f"bases.{name}: {cell.model} is" if kind == "base" else f"{name} is"
                raise InputError(
                    f"{what} another one for {cell.name} than for {other}, which has been run; restore it, take --only "
                    "with other cells, or remove what was run of one, and its line where there are `records`"
                )


def _read(path: Path) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            made = {key: row[key] for key in MADE if key in row}
            rows[row["cell"]] = {key: row[key] for key in RESULT} | made
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}, line {number}: is no record of a finished cell") from None
    return rows
