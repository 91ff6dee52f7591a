"""One cell of a grid in its directory: what it was run with, where it stopped, and the fit itself."""

import fcntl
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.files import replace_text
from mifo_lightning.lab.fingerprint import FINGERPRINT, Fingerprint, check_same, read_fingerprint
from mifo_lightning.lab.grid import Cell

OUTCOME, SUMMARY, LOG, LOCK = "outcome.json", "summary.json", "log.txt", "lock"


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: status done, cut off (by a signal), failed or missing; wall seconds of its last attempt."""

    status: str
    error: str | None = None
    seconds: float = 0.0


def check_fingerprint(cell: Cell, present: Fingerprint) -> None:
    """Raise InputError if the cell's directory holds something else than a run of exactly this cell."""
    before = read_fingerprint(cell.directory)
    if before is not None:
        check_same(cell, before, present)
    elif cell.directory.is_dir() and {entry.name for entry in cell.directory.iterdir()} - {LOG, LOCK}:
        raise InputError(f"{cell.name}: {cell.directory} holds other files; choose another `out` or remove it")


def outcome(directory: Path) -> Outcome:
    """How the cell in this directory ended; missing if it has not."""
    path = directory / OUTCOME
    if not path.is_file():
        return Outcome("missing")
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["error"] is None and not (directory / SUMMARY).is_file():
        return Outcome("missing")
    status = "done" if record["error"] is None else "cut off" if record.get("cut_off") else "failed"
    return Outcome(status, record["error"], record["seconds"])


def record_outcome(directory: Path, error: str | None, seconds: float, cut_off: bool = False) -> None:
    """Write how an attempt ended; an error of None means that it is done, `cut_off` that a signal is to blame."""
    record = {"error": error, "seconds": round(seconds, 3)}
    write_json(directory / OUTCOME, record | ({"cut_off": True} if cut_off else {}))


def record_death(directory: Path, error: str, seconds: float) -> None:
    """Write that an attempt was ended from outside, unless it had said before how it ended."""
    if outcome(directory).status not in ("done", "failed"):
        record_outcome(directory, error, seconds)


def write_json(path: Path, record: Any) -> None:
    """Write a JSON file that is never there by half."""
    replace_text(path, json.dumps(record, indent=1) + "\n")


def prepare(directory: Path) -> list[str]:
    """Make the directory ready for an attempt; the arguments that go on from its checkpoint, if one is whole."""
    from mifo_lightning.cli.resume import read_or_previous

    try:
        path, _ = read_or_previous(directory / "checkpoints" / "last.ckpt")
    except InputError:
        _clear(directory)
        return []
    (directory / OUTCOME).unlink(missing_ok=True)
    return ["--ckpt_path", str(path)]


def fit(cell: Cell, present: Fingerprint) -> None:
    """Run the cell to its end unless that has been done; what it prints goes to its log."""
    directory = cell.directory
    directory.mkdir(parents=True, exist_ok=True)
    with held(directory / LOCK):
        check_fingerprint(cell, present)
        if outcome(directory).status == "done":  # another runner was faster
            return
        (directory / OUTCOME).unlink(missing_ok=True)  # of an earlier attempt
        write_json(directory / FINGERPRINT, present)
        began = time.monotonic()
        with output_to(directory / LOG):
            status = _call([*cell.arguments, *prepare(directory)])
        cut_off = status > 128
        error = last_line(directory / LOG) if status else _broken(directory / SUMMARY, cell.needed)
        record_outcome(directory, error, time.monotonic() - began, cut_off)
        if error is None:  # nothing will go on from its checkpoint, and a grid has many
            shutil.rmtree(directory / "checkpoints", ignore_errors=True)


def child(cell: Cell, present: Fingerprint) -> None:
    """`fit` in a process of its own, which ends with the process that started it, and its children with it."""
    os.setpgrp()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    fit(cell, present)


class ClusterCell:
    """`fit` as a job of submitit; one that is preempted or out of time is queued again and goes on."""

    def __init__(self, cell: Cell, present: Fingerprint) -> None:
        self.cell, self.present = cell, present

    def __call__(self) -> None:
        """Run it."""
        fit(self.cell, self.present)

    def checkpoint(self) -> Any:
        """What submitit is to queue again: the checkpoint on disk is all the state."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@contextmanager
def held(path: Path, taken: str | None = None) -> Iterator[None]:
    """Hold a file's lock, waiting for it; the system frees it when the process ends, however it ends.

    Args:
        path: The file; made if it is not there.
        taken: What to say before waiting, if there is somebody to wait for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if taken:
                print(taken, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Append to a file what this process and its children write to standard output and error."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(fd) for fd in (1, 2)]
    with open(path, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, old in zip((1, 2), before, strict=True):
            os.dup2(old, fd)
            os.close(old)


def last_line(path: Path) -> str:
    """The last line of a log that says something."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def _call(arguments: list[str]) -> int:
    """Call the command line in this process; its exit status, 128 + n for a signal."""
    from mifo_lightning.cli import main

    try:
        main(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        import wandb

        wandb.finish()  # a process of multiprocessing runs no exit handlers
    return 0


def _broken(summary: Path, needed: Sequence[str]) -> str | None:
    """Why a fit that ended well has no result; None if it has one. Numbers that are none must not be averaged."""
    if not summary.is_file():
        return f"it wrote no {SUMMARY}: the group `summary` must not be null"
    after = json.loads(summary.read_text(encoding="utf-8"))["after"]
    if lacking := [key for key in needed if key not in after]:
        return f"its final evaluation has no {' and no '.join(lacking)}; it has {', '.join(after) or 'nothing'}"
    wrong = next((key for key, value in after.items() if not math.isfinite(value)), None)
    return f"its final {wrong} is {after[wrong]}" if wrong else None


def _die_with_parent() -> None:
    """Wait for the end of the process that started this one, then kill this one and its children."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)


def _clear(directory: Path) -> None:
    """Remove what an attempt left that cannot be gone on from; the log stays."""
    for entry in directory.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name not in (FINGERPRINT, LOG, LOCK):
            entry.unlink()
