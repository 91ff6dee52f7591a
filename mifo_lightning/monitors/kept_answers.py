"""What an initial model answered, kept for other runs that begin alike: the arms of a study ask it once, not each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mifo_callbacks.collectives import from_first_rank, rank
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.seeds import stable_key

Answers = list[dict[str, Any]]


def kept_answers(directory: str | None, about: object, draw: Callable[[], Answers]) -> Answers:
    """What `draw` returns, or what it has returned to a run with the same `about`; collective.

    Args:
        directory: Where answers are kept, in a file for each `about`; the first rank reads and writes. None: nowhere.
        about: All that decides what is drawn, the same on every rank; as JSON.
        draw: Draws the answers of all ranks; collective.

    Raises:
        InputError: A file cannot be read or written, on all ranks.
    """
    if directory is None:
        return draw()
    text = json.dumps(about, sort_keys=True)
    path = Path(directory) / f"{stable_key(text):016x}.json"
    found = from_first_rank(_attempt(lambda: _read(path, text), path) if rank() == 0 else None)
    if found is None:
        found = draw()
        problem = from_first_rank(_attempt(lambda: _write(path, text, found), path) if rank() == 0 else None)
        if isinstance(problem, str):
            raise InputError(problem)
    if isinstance(found, str):
        raise InputError(found)
    return found


def _attempt(work: Callable[[], Answers | None], path: Path) -> Answers | str | None:
    """The result, or the line that says what went wrong: an exception on one rank would leave the others waiting."""
    try:
        return work()
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"retention.cache: {path}: {type(error).__name__}: {error!s:.120}; remove it, or name another directory"


def _read(path: Path, about: str) -> Answers | None:
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["about"] != about:
        raise ValueError("holds the answers of another run")
    answers: Answers = record["answers"]
    return answers


def _write(path: Path, about: str, answers: Answers) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps({"about": about, "answers": answers}), encoding="utf-8")
    part.replace(path)
