"""Word problems with demonstrations made from their equations, in the row format, split by number of operations.

    python -m experiments.word_problems --out data

MAWPS (Koncel-Kedziorski et al. 2016), ASDiv-A (Miao et al. 2020) and SVAMP (Patel et al. 2021) as the repository of
SVAMP, https://github.com/arkilpatel/SVAMP (MIT), has them in one format: a question with `number0` for its numbers, the
numbers, and the equation in prefix notation. `- number0 number1` of 8 and 2 becomes `8 - 2 = 6` and `\\boxed{6}`.

| file | rows |
|---|---|
| words_cold | 640 questions of one operation: the cold start |
| words_rl | the other questions of one and two operations: RL, and SFT phases |
| words_val | the fold that is held out of MAWPS and ASDiv-A; none of its questions is in the two files above |
| svamp | SVAMP: out of distribution |

Left out: other numbers of operations, equations that do not give the answer, numbers that four decimals do not write.
Files that lie in DIR/source already are not downloaded.
"""

import argparse
import csv
import hashlib
import re
import urllib.request
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.terminal import fail

COMMIT = "bbf1e71d2f65453a87665414ff374e5a5962ef95"
ADDRESS = f"https://raw.githubusercontent.com/arkilpatel/SVAMP/{COMMIT}/data/"
TRAIN = ("cv_mawps/fold0/train.csv", "cv_asdiv-a/fold0/train.csv")
VAL = ("cv_mawps/fold0/dev.csv", "cv_asdiv-a/fold0/dev.csv")
SVAMP = ("mawps-asdiv-a_svamp/dev.csv",)
COLD = 640  # rows of the cold start
PATIENCE = 20.0  # seconds for the server to answer
ASK = " Write each calculation on a line of its own, then the final answer in \\boxed{}."
DECIMALS = 4

Row = dict[str, Any]


def read_source(directory: Path, names: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of CSV files under `directory`, which are downloaded unless they are there.

    Raises:
        InputError: One cannot be had; the line says where to put it.
    """
    rows: list[dict[str, str]] = []
    for name in names:
        path = directory / name
        if not path.is_file():
            download(ADDRESS + name, path, directory)
        with path.open(encoding="utf-8", newline="") as file:
            rows += csv.DictReader(file)
    return rows


def download(address: str, path: Path, directory: Path) -> None:
    """Load a file, whole or not at all."""
    try:
        with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
            content = answer.read()
    except OSError as error:
        raise InputError(
            f"{address}: cannot be loaded ({getattr(error, 'reason', error)}); put the directory `data` of "
            f"https://github.com/arkilpatel/SVAMP at {directory}, or give rows of your own: make real DATA=directory"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    part.rename(path)


def written(number: Fraction) -> str | None:
    """The number as a person writes it; None if four decimals do not write it exactly."""
    if (number * 10**DECIMALS).denominator != 1:
        return None
    text = f"{float(number):.{DECIMALS}f}"
    return text.rstrip("0").rstrip(".")


def work_out(equation: str, numbers: list[str]) -> tuple[list[str], Fraction] | None:
    """The calculations of a prefix equation in the order in which they are made, and its value.

    Args:
        equation: Operators, `number0`, `number1`, ... and plain numbers, between blanks.
        numbers: What they stand for.

    Returns:
        None if it is no such equation, divides by 0 or holds a number that cannot be written.
    """
    lines: list[str] = []
    words = iter(equation.split())

    def value() -> Fraction:
        word = next(words)
        if word not in {"+", "-", "*", "/"}:
            found = re.fullmatch(r"number(\d+)", word)
            return Fraction(numbers[int(found[1])] if found else word)
        a, b = value(), value()
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[word]
        texts = [x if x is None else written(x) for x in (a, b, result)]
        if result is None or None in texts:
            raise ValueError(word)
        lines.append(f"{texts[0]} {word} {texts[1]} = {texts[2]}")
        return result

    try:
        result = value()
    except (ValueError, IndexError, StopIteration):
        return None
    return None if next(words, None) else (lines, result)


def as_text(question: str, numbers: list[str]) -> str | None:
    """The question with its numbers in place, and without the blanks that tokenising has left; None: unwritable."""
    texts = [written(Fraction(number)) for number in numbers]
    if None in texts:
        return None
    text = re.sub(r"number(\d+)", lambda found: str(texts[int(found[1])]), question)
    text = re.sub(r" (?=[.,?!;:%]|'s\b|n't\b)", "", " ".join(text.split())).replace("$ ", "$")
    return text[:1].upper() + text[1:]


def make_row(source: dict[str, str], name: str) -> Row | None:
    """A row with its demonstration; None if it is one that is left out."""
    numbers = source["Numbers"].split()
    worked = work_out(source["Equation"], numbers)
    try:
        text, answer = as_text(source["Question"], numbers), float(source["Answer"])
    except (ValueError, IndexError):
        return None
    if worked is None or text is None or not 1 <= len(worked[0]) <= 2 or abs(float(worked[1]) - answer) > 1e-3:
        return None
    lines, truth = worked[0], written(worked[1])
    return {
        "data_source": f"{name}{len(lines)}",
        "prompt": [{"role": "user", "content": text + ASK}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "target": [{"role": "assistant", "content": "\n".join([*lines, f"\\boxed{{{truth}}}"])}],
    }


def question(row: Row) -> str:
    """What makes two rows the same question."""
    return str(row["prompt"][-1]["content"]).lower()


def shuffled(rows: list[Row]) -> list[Row]:
    """In an order that depends on nothing but the questions, each of them once."""
    single = {question(row): row for row in rows}
    return [single[key] for key in sorted(single, key=lambda text: hashlib.sha256(text.encode()).digest())]


def apart(rows: list[Row], others: list[Row]) -> list[Row]:
    """Those rows whose question is not among the others."""
    taken = {question(row) for row in others}
    return [row for row in rows if question(row) not in taken]


def make_rows(directory: Path) -> dict[str, list[Row]]:
    """The rows of all four files by name; see the head of this module."""

    def rows(names: tuple[str, ...], name: str) -> list[Row]:
        made = [make_row(source, name) for source in read_source(directory, names)]
        return shuffled([row for row in made if row is not None])

    train = rows(TRAIN, "words")
    cold = [row for row in train if row["data_source"] == "words1"][:COLD]
    return {
        "words_cold": cold,
        "words_rl": apart(train, cold),
        "words_val": apart(rows(VAL, "words"), train),
        "svamp": rows(SVAMP, "svamp"),
    }


def main() -> None:
    """Write the four files."""
    parser = argparse.ArgumentParser(description="Make word problems with demonstrations from public sources.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    out = parser.parse_args().out
    try:
        made = make_rows(out / "source")
    except InputError as error:
        fail(str(error))
    for name, rows in made.items():
        pq.write_table(pa.Table.from_pylist(rows), out / f"{name}.parquet")
        print(f"{out / name}.parquet: {len(rows)} rows")


if __name__ == "__main__":
    main()
