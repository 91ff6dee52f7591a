"""Finished cells in one small file, so that a grid goes on where another machine stopped.

A line is a cell: its name, what it was run with, its seconds and its summary. Whoever has the file and the bases of the
unfinished cells needs no run directory of the others.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.files import replace_text
from mifo_lightning.lab.cell import FINGERPRINT, SUMMARY, Fingerprint, outcome, record_outcome, write_json
from mifo_lightning.lab.grid import Cell

Row = dict[str, object]


def keep(path: Path, grid: Iterable[Cell]) -> None:
    """Write the finished cells of the grid; lines of others stay as they are."""
    rows = _read(path) if path.is_file() else {}
    for cell in grid:
        found = outcome(cell.directory)
        if found.status == "done":
            read = {
                key: json.loads((cell.directory / file).read_text(encoding="utf-8"))
                for key, file in (("fingerprint", FINGERPRINT), ("summary", SUMMARY))
            }
            rows[cell.name] = {"cell": cell.name, "seconds": found.seconds, **read}
    replace_text(path, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows.values()))


def restore(path: Path, grid: Iterable[Cell]) -> None:
    """Make the cells of the file finished ones, where their directories say nothing of their own.

    Raises:
        InputError: A line is not what `keep` writes.
    """
    rows = _read(path) if path.is_file() else {}
    for cell in grid:
        row = rows.get(cell.name)
        if row is not None and not (cell.directory / FINGERPRINT).is_file():
            cell.directory.mkdir(parents=True, exist_ok=True)
            write_json(cell.directory / FINGERPRINT, row["fingerprint"])
            write_json(cell.directory / SUMMARY, row["summary"])
            record_outcome(cell.directory, None, float(str(row["seconds"])))


def check_same_bases(work: Iterable[tuple[Cell, Fingerprint]], grid: Iterable[Cell]) -> None:
    """Raise InputError if a cell is to run on another model than the finished cells of its base have run on."""
    known: dict[str, str] = {}
    for cell in grid:
        path = cell.directory / FINGERPRINT
        if path.is_file() and outcome(cell.directory).status == "done":
            known.setdefault(cell.base, json.loads(path.read_text(encoding="utf-8"))["base model"])
    for cell, present in work:
        if known.get(cell.base, present["base model"]) != present["base model"]:
            raise InputError(
                f"bases.{cell.base}: {cell.model} is another model than the one that finished runs of this base began "
                "with; restore it, or take --only with other bases"
            )


def _read(path: Path) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows[row["cell"]] = {key: row[key] for key in ("cell", "seconds", "fingerprint", "summary")}
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}, line {number}: is no record of a finished cell") from None
    return rows
