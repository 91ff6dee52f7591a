"""What has been measured on one base, kept as it comes: an interrupted study goes on, and its page is remade."""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from experiments.heal.settings import Study
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.files import replace_text
from mifo_lightning.lab.grid import slug
from mifo_lightning.lab.plan import commit

Record = dict[str, Any]
PLAN, COMMITS = "study", "commits"
SECONDS = "seconds"
"""Wall time of every fit, and of every stage of measuring that is done."""
RECORDS = "records.json"


class Records:
    """The records of one base, by stage and name, in a JSON file that is never there by half.

    Args:
        path: The file; it need not exist.
        made_with: What decides every record; another one is refused.

    Raises:
        InputError: The file was made with something else, or is none that was written here.
    """

    def __init__(self, path: Path, made_with: Record) -> None:
        self.path = path
        wanted = json.loads(json.dumps(made_with))
        self.content: dict[str, Record] = {PLAN: wanted}
        if path.is_file():
            self.content = _read(path)
            changed = [key for key in wanted if self.content[PLAN].get(key) != wanted[key]]
            if changed:
                raise InputError(
                    f"{path}: was made with another {' and '.join(changed)}; choose another `out` or `records`, or "
                    "remove that file"
                )

    def once(self, stage: str, name: str, measure: Callable[[], Any]) -> Any:
        """The record of that name; measured, and written, if there is none."""
        kept = self.content.setdefault(stage, {})
        if name not in kept:
            kept[name] = rounded(measure())
            self.content[COMMITS] = dict.fromkeys([*self.commits, *filter(None, [now()])], True)
            replace_text(self.path, as_lines(self.content))
        return kept[name]

    @property
    def commits(self) -> list[str]:
        """Those of the code that measured, in order."""
        return list(self.content.get(COMMITS, {}))

    def stage(self, stage: str) -> Record:
        """All records of a stage."""
        return self.content.get(stage, {})


def as_lines(content: dict[str, Record]) -> str:
    """JSON with a line a record, so that a commit shows which are new."""
    groups = []
    for group, records in content.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(record)}" for name, record in records.items()]
        groups.append(f" {json.dumps(group)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(groups) + "\n}\n"


def _read(path: Path) -> dict[str, Record]:
    """What is kept; a file that is committed may hold the marks of a merge, or be somebody else's."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(part, dict) for part in (content, content[PLAN], *content.values())):
            raise TypeError("groups of records are objects")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: no readable records: {type(error).__name__}: {error}; mend it, or remove it to measure anew"
        ) from None
    return dict(content)


def open_records(study: Study, base: str) -> Records:
    """The records of a base of the study; `Records` says what is raised."""
    return Records(records_path(study, base), study.decisive())


def records_path(study: Study, base: str) -> Path:
    """Where they are kept."""
    return (study.records or study.out / "records") / f"{slug(base)}.json"


@cache
def now() -> str | None:
    """The commit of the working tree, as this process finds it."""
    return commit()


def rounded(value: Any) -> Any:
    """Plain values with six significant digits, which is beyond what any of them means; no number is null."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
