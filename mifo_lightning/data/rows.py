"""Reads question rows from local files, a dataset hub or a generator, and checks their format.

| source | read as |
|---|---|
| `data/train.parquet`, `.jsonl`, `.json` | one file; `.jsonl`: an object a line, `.json`: a list of objects |
| `data/train.csv` | one file whose first line names the columns; every cell is text |
| `data/train/` | all `.parquet`, `.jsonl` and `.csv` files directly in the directory, sorted by name |
| `owner/name`, `owner/name:split` | a dataset of the hub, through `datasets`; split `train` unless named |
| `owner/name:config:split` | the same of a dataset that has several configurations |
| a `RowSource` | its `rows()` |
| a list of dicts, a `datasets.Dataset` | its rows, from Python |
| a list of these | one after the other |

`Columns` say which columns hold what; a reward may use others. Rows are numbered from 1 in messages.
"""

import csv
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.files import UNREADABLE, check_regular
from mifo_lightning.common.hub import check_hub
from mifo_lightning.data.columns import Columns, has_source, to_row, wrong
from mifo_lightning.data.source import Row, RowSource

Source = Any  # one of the above
IN_DIRECTORY = (".parquet", ".jsonl", ".csv")  # a .json beside them describes the data set


def read_rows(source: Source, where: str = "data", columns: Columns = Columns(), unanswered: bool = False) -> list[Row]:
    """All rows of `source` as plain Python values, `target` None where a row has no demonstration.

    Args:
        source: One of the above.
        where: The key that names the source.
        columns: Names of the columns of files and hub sets; a RowSource is in the row format.
        unanswered: Whether rows may lack a truth, which is "" then.

    Raises:
        InputError: The source is absent, unreadable, empty or not what its name says, or a row has the wrong
            format; the message begins with `where`, the key that names the source.
    """
    sources = [source] if isinstance(source, str | Path | RowSource) or _is_table(source) else source
    if not isinstance(sources, list | tuple):
        raise InputError(
            f"{where}: a {type(source).__name__} is not allowed; allowed are files, directories, hub names, row "
            "sources, lists of dicts and `datasets.Dataset`s, or a list of these"
        )
    if not sources:
        raise InputError(f"{where}: no source; allowed are files, directories, hub names and row sources")
    # what is measured is measured by name: two sets must not become one without a word
    taken: dict[str, str] | None = None if where == "data.train" else {}
    try:
        return [row for each in sources for row in _read(each, columns, unanswered, taken)]
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _is_table(source: object) -> bool:
    """Whether these are rows in memory: a list of dicts, or a `datasets.Dataset`."""
    rows = isinstance(source, list) and bool(source) and isinstance(source[0], dict)
    return rows or (hasattr(source, "column_names") and hasattr(source, "to_list"))


def _read(source: Source, columns: Columns, unanswered: bool, taken: dict[str, str] | None) -> list[Row]:
    if _is_table(source):
        rows = source if isinstance(source, list) else source.to_list()
        return _checked(rows, columns, unanswered, name="rows", where=type(source).__name__)
    if isinstance(source, RowSource):
        kind = type(source).__name__
        return _checked(list(source.rows()), Columns(), unanswered, name=kind, where=kind)
    if UNREADABLE.search(str(source)):
        raise InputError(f"{str(source)!r}: is no path")
    try:
        path = Path(source).expanduser()
        local = path.exists() or _looks_local(str(source), path)
        files = _files_in(path) if path.is_dir() else [path]
    except (OSError, RuntimeError) as error:  # the latter: the home of nobody
        raise _unreadable(source, error) from error
    if not local:
        return _read_hub(str(source), columns, unanswered, taken)
    place = Path(os.path.abspath(path))  # "." has a name too; a link keeps its own
    name = place.name if path.is_dir() else place.stem  # of a directory, not of its parts
    parts = [(file, _read_file(file)) for file in files]
    _take(taken, name, str(place), [row for _, found in parts for row in found], columns)
    return [row for file, found in parts for row in _checked(found, columns, unanswered, name, str(file))]


def _looks_local(name: str, path: Path) -> bool:
    """Whether an absent `path` is a misspelt one rather than a hub name, which is slow to look for."""
    below = "/" in name and path.parent.is_dir()
    return below or name.startswith(("/", ".", "~")) or name.count("/") > 1 or path.suffix in READERS


def _files_in(path: Path) -> list[Path]:
    inside = sorted(path.iterdir())
    files = [file for file in inside if file.suffix in IN_DIRECTORY and file.is_file()]
    if not files:
        names = ", ".join(entry.name for entry in inside[:5]) or "nothing"
        raise InputError(f"{path}: this directory holds no {', '.join(IN_DIRECTORY)} files, but {names}")
    return files


def _read_file(path: Path) -> list[Any]:
    try:
        check_regular(path)
        size = path.stat().st_size
        if path.suffix not in READERS:
            raise InputError(f"{path}: allowed are {', '.join(READERS)} or a directory of {', '.join(IN_DIRECTORY)}")
        if not size:
            raise InputError(f"{path}: the file is empty")
        return READERS[path.suffix](path)
    except OSError as error:
        raise _unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            rows: list[Any] = file.read().to_pylist()
            return rows
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a readable parquet file: {_first_line(error)}") from error


def _read_jsonl(path: Path) -> list[Any]:
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                rows.append(_parse_json(line, f"{path}, line {number}"))
    return rows


def _read_json(path: Path) -> list[Any]:
    rows = _parse_json(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(rows, list):
        raise wrong(str(path), "a .json file", "one list of rows (one object a line is .jsonl)", rows)
    return rows


def _read_csv(path: Path) -> list[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            lines = [line for line in csv.reader(file, strict=True) if line]
        except csv.Error as error:
            raise InputError(f"{path}: not CSV: {error}") from error
    names, *rows = lines or [[]]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{path}: its first line names column `{twice}` twice")
    for number, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise InputError(f"{path}, row {number}: has {len(row)} cells, the first line names {len(names)} columns")
    return [dict(zip(names, row, strict=True)) for row in rows]


READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
}


def _read_hub(source: str, columns: Columns, unanswered: bool, taken: dict[str, str] | None) -> list[Row]:
    from datasets import load_dataset

    name, *config, split = source.split(":", 2) if ":" in source else (source, "train")
    check_hub(source)
    try:
        data = load_dataset(name, *config, split=split or "train")
    except Exception as error:
        # `datasets` raises a dozen kinds of exception here, from the network down to the file format.
        problem = f"{type(error).__name__}: {_first_line(error)}"
        raise InputError(f"{source}: no such file, and not loadable from the hub ({problem})") from error
    found = data.to_list()
    _take(taken, name, name, found, columns)  # subsets and splits of a set have its name
    return _checked(found, columns, unanswered, name, source)


def _take(taken: dict[str, str] | None, name: str, place: str, found: Sequence[object], columns: Columns) -> None:
    """Note that rows without a source are called `name`; InputError if those of another place are."""
    bare = any(isinstance(row, dict) and not has_source(row, columns) and "data_source" not in row for row in found)
    if taken is not None and bare and (other := taken.setdefault(name, place)) != place:
        raise InputError(
            f"{place}: its rows have no column `{columns.data_source}`, and would be counted as `{name}` together with "
            f"those of {other}; give one of them the column, or another name"
        )


def _checked(found: Sequence[object], columns: Columns, unanswered: bool, name: str, where: str) -> list[Row]:
    """The rows of one file or data set in the row format; `name` is the `data_source` of those that have none."""
    if not len(found):
        raise InputError(f"{where}: holds no rows")
    rows = [_plain(row) for row in found]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise wrong(f"{where}, row {number}", "a row", "an object with named columns", row)
    here = columns.of(list(dict.fromkeys(key for row in rows for key in row)), where)
    return [to_row(row, here, name, f"{where}, row {number}", unanswered) for number, row in enumerate(rows, 1)]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "as_py"):
        return _plain(value.as_py())
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from error


def _unreadable(path: str | Path, error: Exception) -> InputError:
    return InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or _first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
