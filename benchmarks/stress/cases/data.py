"""Data files: sixteen good rows of the embedded task, and what can be wrong with a file of them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.stress.cases.case import Case, Expected, prepared
from mifo_lightning.data.skills import Skills

Row = dict[str, Any]
GOOD: list[Row] = Skills(["addition", "mirrored"], 16).rows()


def dump(rows: list[Any]) -> str:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def content(name: str, made: str | bytes, expect: Expected = "refused", file: str = "rows.jsonl") -> Case:
    """A file of this content as data.train."""

    def prepare(place: Path) -> str:
        (place / file).write_bytes(made if isinstance(made, bytes) else made.encode())
        return f"--data.train {file}"

    return prepared(name, prepare, expect)


def row(name: str, change: Callable[[Row], object], expect: Expected = "refused") -> Case:
    """The third row changed."""
    rows = json.loads(json.dumps(GOOD))
    change(rows[2])
    return content(f"row: {name}", dump(rows), expect)


def put(**columns: Any) -> Callable[[Row], object]:
    """Set columns of a row."""
    return lambda changed: changed.update(columns)


def parquet(name: str, write: Callable[[Path], object], expect: Expected = "refused") -> Case:
    """A parquet file as data.train."""

    def prepare(place: Path) -> str:
        write(place / "rows.parquet")
        return "--data.train rows.parquet"

    return prepared(f"parquet: {name}", prepare, expect)


def write_table(rows: list[Row], **options: Any) -> Callable[[Path], object]:
    """Writes rows."""
    return lambda path: pq.write_table(pa.Table.from_pylist(rows), path, **options)


def cut(path: Path) -> None:
    """A parquet file without its last hundred bytes."""
    write_table(GOOD)(path)
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    """A parquet file with 64 bytes of its first page zeroed."""
    write_table(GOOD, compression="zstd")(path)
    raw = bytearray(path.read_bytes())
    raw[200:264] = bytes(64)
    path.write_bytes(raw)


def pipe(place: Path) -> str:
    """Nobody writes to it."""
    os.mkfifo(place / "rows.jsonl")
    return "--data.train rows.jsonl"


def link_loop(place: Path) -> str:
    """A link to itself."""
    (place / "rows.jsonl").symlink_to(place / "rows.jsonl")
    return "--data.train rows.jsonl"


def directory(*names: str) -> Callable[[Path], str]:
    """A directory with empty files of these names."""

    def prepare(place: Path) -> str:
        (place / "rows").mkdir()
        for name in names:
            (place / "rows" / name).touch()
        return "--data.train rows"

    return prepare


def class_in_data(place: Path) -> str:
    """A row source of somebody else's, named inside a data file."""
    (place / "badmod.py").write_text("open('ran', 'w').close()\nclass X: pass\n")
    (place / "rows.jsonl").write_text('{"class_path": "badmod.X"}\n')
    return "--data.train rows.jsonl"


def two_files(place: Path) -> str:
    """One good, one bad."""
    (place / "a.jsonl").write_text(dump(GOOD))
    (place / "b.jsonl").write_text("nothing\n")
    return "--data.train '[a.jsonl, b.jsonl]'"


def path_in_data(place: Path) -> str:
    """A file whose only line is the path of another."""
    (place / "good.jsonl").write_text(dump(GOOD))
    (place / "rows.jsonl").write_text("good.jsonl\n")
    return "--data.train rows.jsonl"


def named(value: str) -> Case:
    """A name as data.train."""
    return prepared(f"data.train {value}", lambda place: f"--data.train {value}")


QUESTION = GOOD[2]["prompt"]
TRUTH = GOOD[2]["reward_model"]
ANSWER = GOOD[2]["target"]

DATA: list[Case] = [
    content("good rows", dump(GOOD), "accepted"),
    content("good rows as a list", json.dumps(GOOD), "accepted", "rows.json"),
    parquet("good rows", write_table(GOOD), "accepted"),
    content("CRLF", dump(GOOD).replace("\n", "\r\n"), "accepted"),
    content("byte order mark", b"\xef\xbb\xbf" + dump(GOOD).encode(), "accepted"),
    content("blank lines", dump(GOOD).replace("\n", "\n\n"), "accepted"),
    content("no newline at the end", dump(GOOD).rstrip("\n"), "accepted"),
    content("empty", ""),
    content("white space only", "\n \n"),
    content("UTF-16", dump(GOOD).encode("utf-16")),
    content("latin-1", dump(GOOD).encode() + b'{"a": "\xe9"}\n'),
    content("binary", bytes(range(256)) * 64),
    content("NUL bytes", dump(GOOD) + "\0\0\n"),
    content("a cut line", dump(GOOD)[:-20]),
    content("a text", "What is 1 + 1?\n"),
    content("a list in .jsonl", json.dumps(GOOD)),
    content("lines in .json", dump(GOOD), file="rows.json"),
    content("numbers", "1\n2\n"),
    content("null", "null\n" * 8),
    content("brackets 200,000 deep", "[" * 200_000 + "\n"),
    content("brackets 200,000 deep in .json", "[" * 200_000, file="rows.json"),
    content("objects 100,000 deep", '{"a":' * 100_000 + "1" + "}" * 100_000 + "\n"),
    content("a number of 5,000 digits", '{"data_source": 1' + "0" * 5000 + "}\n"),
    content("NaN", '{"data_source": NaN}\n'),
    content("one row", dump(GOOD[:1]), "either"),
    content("the same row sixteen times", dump(GOOD[:1] * 16), "accepted"),
    content("a duplicate key", dump(GOOD[:15]) + '{"data_source": "a", ' + json.dumps(GOOD[15])[1:] + "\n", "accepted"),
    content("a comma separated file", "prompt,answer\n1+1,2\n", file="rows.csv"),
    content("no suffix", dump(GOOD), file="rows"),
    content("jsonl under .parquet", dump(GOOD), file="rows.parquet"),
    content("empty .parquet", "", file="rows.parquet"),
    content("four bytes of .parquet", b"PAR1", file="rows.parquet"),
    parquet("cut", cut),
    parquet("zeroed bytes", flip),
    parquet("no rows", write_table(GOOD[:0])),
    parquet("no column of ours", write_table([{"a": 1}])),
    parquet("prompt is a text", write_table([{**r, "prompt": "1+1="} for r in GOOD]), "either"),
    parquet("reward_model is a text", write_table([{**r, "reward_model": "2"} for r in GOOD])),
    parquet("truth is a number", write_table([{**r, "reward_model": {"ground_truth": 2}} for r in GOOD]), "either"),
    row("not an object", lambda r: r.clear()),
    row("data_source missing", lambda r: r.pop("data_source"), "accepted"),  # it is the file's name then
    row("data_source empty", put(data_source="")),
    row("data_source a number", put(data_source=3)),
    row("data_source with markup", put(data_source="[/x] [bold]"), "accepted"),
    row("data_source with escapes", put(data_source="\x1b]0;owned\x07\x1b[2J"), "either"),
    row("data_source a path", put(data_source="../../etc"), "either"),
    row("data_source a thousand letters", put(data_source="x" * 1000), "either"),
    row("prompt missing", lambda r: r.pop("prompt")),
    row("prompt null", put(prompt=None)),
    row("prompt empty", put(prompt=[])),
    row("prompt a text", put(prompt="1+1="), "either"),
    row("prompt without a role", put(prompt=[{"content": "1"}])),
    row("prompt without content", put(prompt=[{"role": "user"}])),
    row("prompt with content null", put(prompt=[{"role": "user", "content": None}])),
    row("prompt with parts", put(prompt=[{"role": "user", "content": [{"type": "text", "text": "1"}]}])),
    row("prompt of white space", put(prompt=[{"role": "user", "content": " \n"}]), "accepted"),
    row("prompt of an unknown role", put(prompt=[{"role": "wizard", "content": "1+1="}]), "either"),
    row("prompt ends with an answer", put(prompt=[*QUESTION, *ANSWER])),
    row("prompt too long", put(prompt=[{"role": "user", "content": "1" * 100_000}]), "accepted"),
    row("prompt of emoji", put(prompt=[{"role": "user", "content": "\U0001f986\u202e\u2028"}]), "either"),
    row("prompt with a lone surrogate", put(prompt=[{"role": "user", "content": "\ud800"}])),
    row("truth missing", put(reward_model={"style": "rule"})),
    row("truth null", put(reward_model={"ground_truth": None})),
    row("truth empty", put(reward_model={"ground_truth": " "})),
    row("truth a number", put(reward_model={"ground_truth": 7}), "either"),
    row("truth a list", put(reward_model={"ground_truth": ["7"]})),
    row("target a text", put(target="907050>0579"), "either"),
    row("target of two", put(target=ANSWER * 2)),
    row("target of a user", put(target=QUESTION)),
    row("target empty", put(target=[]), "either"),
    row("target wrong", put(target=[{"role": "assistant", "content": "1>2"}]), "accepted"),
    row("target null", put(target=None), "accepted"),
    row("a column called self", put(self=1, responses=2, truths=3), "accepted"),
    prepared("a named pipe", pipe),
    prepared("a link to itself", link_loop),
    prepared("an empty directory", directory()),
    prepared("a directory of empty files", directory("a.jsonl")),
    prepared("a directory of other files", directory("a.txt")),
    prepared("class_path inside a data file", class_in_data),
    prepared("a path inside a data file", path_in_data),
    prepared("a good and a bad file", two_files),
    named("nowhere.jsonl"),
    named("nowhere/x/y"),
    named("nowhere.parquet:train"),
    named("''"),
    named("[]"),
    named("7"),
    named("/dev/null"),
    named("/dev/zero"),
    named("https://127.0.0.1:9/rows.jsonl"),
    named("os.system"),
    named("'" + "x" * 5000 + "'"),
]
