"""Reads question rows from local files, a dataset hub or a generator, and checks their format.

| source | read as |
|---|---|
| `data/train.parquet`, `.jsonl`, `.json` | one file; `.jsonl`: an object a line, `.json`: a list of objects |
| `data/train/` | all `.parquet` and `.jsonl` files directly in the directory, sorted by name |
| `owner/name` or `owner/name:split` | a dataset of the hub, through `datasets`; split `train` unless named |
| a `RowSource` | its `rows()` |
| a list of these | one after the other |

A row holds the columns of `RowSource`; a reward may use others. Rows are numbered from 1 in messages.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from mifo_lightning.config_files import UNREADABLE, check_regular
from mifo_lightning.data.source import Row, RowSource
from mifo_lightning.errors import InputError
from mifo_lightning.hub import check_hub

REQUIRED = ("data_source", "prompt", "reward_model")
COLUMNS = (*REQUIRED, "target")
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON can spell it, no tokenizer can read it
Source = str | Path | RowSource


def read_rows(source: Source | Sequence[Source], where: str = "data") -> list[Row]:
    """All rows of `source` as plain Python values, `target` None where a row has no demonstration.

    Raises:
        InputError: The source is absent, unreadable, empty or not what its name says, or a row has the wrong
            format; the message begins with `where`, the key that names the source.
    """
    sources = [source] if isinstance(source, str | Path | RowSource) else source
    if not sources:
        raise InputError(f"{where}: no source; allowed are files, directories, hub names and row sources")
    try:
        return [row for each in sources for row in _read(each)]
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def check_row(row: object, where: str) -> Row:
    """One row, the format of its four columns checked, NumPy and Arrow values turned into plain ones.

    Raises:
        InputError: A column is missing or of the wrong type; the message begins with `where`.
    """
    row = _plain(row)
    if not isinstance(row, dict):
        raise _wrong(where, "a row", "an object with named columns", row)
    _require_columns(row, where)
    source, prompt, reward_model, target = (row.get(column) for column in COLUMNS)
    if not (_is_text(source) and source):
        raise _wrong(where, "`data_source`", "a name in Unicode", source)
    if not _is_conversation(prompt):
        raise _wrong(where, "`prompt`", "a list of {role, content} with Unicode texts", prompt)
    if not prompt:
        raise _wrong(where, "`prompt`", "a conversation of at least one message", prompt)
    if prompt[-1]["role"] == "assistant":
        raise _wrong(where, "`prompt`", "a conversation that does not end in an answer, which is `target`", prompt[-1:])
    truth = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    if not (_is_text(truth) and truth.strip()):
        raise _wrong(
            where, "`reward_model`", "{style, ground_truth} with a Unicode text, not empty, as truth", reward_model
        )
    if target is not None and not (_is_conversation(target) and len(target) == 1 and target[0]["role"] == "assistant"):
        raise _wrong(where, "`target`", "null or a list with one {role: assistant, content}", target)
    return row | {"target": target}


def _read(source: Source) -> list[Row]:
    if isinstance(source, RowSource):
        return _checked(source.rows(), type(source).__name__)
    if UNREADABLE.search(str(source)):
        raise InputError(f"{str(source)!r}: is no path")
    try:
        path = Path(source).expanduser()
        local = path.exists() or _looks_local(str(source), path)
        files = _files_in(path) if path.is_dir() else [path]
    except (OSError, RuntimeError) as error:  # the latter: the home of nobody
        raise _unreadable(source, error) from error
    return [row for file in files for row in _read_file(file)] if local else _read_hub(str(source))


def _looks_local(name: str, path: Path) -> bool:
    """Whether an absent `path` is a misspelt one rather than a hub name, which is slow to look for."""
    below = "/" in name and path.parent.is_dir()
    return below or name.startswith(("/", ".", "~")) or name.count("/") > 1 or path.suffix in READERS


def _files_in(path: Path) -> list[Path]:
    inside = sorted(path.iterdir())
    files = [file for file in inside if file.suffix in (".parquet", ".jsonl") and file.is_file()]
    if not files:
        names = ", ".join(entry.name for entry in inside[:5]) or "nothing"
        raise InputError(f"{path}: this directory holds no .parquet or .jsonl files, but {names}")
    return files


def _read_file(path: Path) -> list[Row]:
    try:
        check_regular(path)
        size = path.stat().st_size
        if path.suffix not in READERS:
            raise InputError(f"{path}: allowed are {', '.join(READERS)} or a directory of .parquet and .jsonl")
        if not size:
            raise InputError(f"{path}: the file is empty")
        rows = READERS[path.suffix](path)
    except OSError as error:
        raise _unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    return _checked(rows, str(path))


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _require_columns(names, str(path))
            return file.read().to_pylist()
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
        raise _wrong(str(path), "a .json file", "one list of rows (one object a line is .jsonl)", rows)
    return rows


READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
}


def _read_hub(source: str) -> list[Row]:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    check_hub(source)
    try:
        data = load_dataset(name, split=split or "train")
    except Exception as error:
        # `datasets` raises a dozen kinds of exception here, from the network down to the file format.
        problem = f"{type(error).__name__}: {_first_line(error)}"
        raise InputError(f"{source}: no such file, and not loadable from the hub ({problem})") from error
    _require_columns(data.column_names, source)
    return _checked(data.to_list(), source)


def _checked(rows: Sequence[object], where: str) -> list[Row]:
    if not len(rows):
        raise InputError(f"{where}: holds no rows")
    return [check_row(row, f"{where}, row {number}") for number, row in enumerate(rows, 1)]


def _require_columns(present: Iterable[str], where: str) -> None:
    for column in REQUIRED:
        if column not in present:
            names = ", ".join(map(str, present)) or "none"
            raise InputError(f"{where}: column `{column}` is missing; there are {names}")


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and _is_text(message.get("role")) and _is_text(message.get("content"))
        for message in value
    )


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and not SURROGATE.search(value)


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


def _wrong(where: str, what: str, allowed: str, value: object) -> InputError:
    return InputError(f"{where}: {what} must be {allowed}, got {type(value).__name__} {value!r:.80}")


def _unreadable(path: str | Path, error: Exception) -> InputError:
    return InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or _first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
