"""Which word problems is a run evaluated on? A fixed sample of each source that training never sees.

    python -m experiments.word_sample --data DATA --held words_val svamp --questions 128 --out runs/words/sample.parquet

The same questions every time: the order depends on their text alone.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.word_problems import apart, shuffled
from mifo_lightning.common.errors import InputError
from mifo_lightning.common.terminal import fail

TRAINED = ("words_cold", "words_rl")


def sample(rows: Path, questions: int, out: Path, held: Sequence[str] = ("words_val",)) -> None:
    """Write `questions` rows of each source of the held-out files that are in no training file.

    Raises:
        InputError: A file is missing or cannot be read.
    """
    read = {}
    for name in (*TRAINED, *held):
        path = rows / f"{name}.parquet"
        if not path.is_file():
            wanted = ", ".join(f"{file}.parquet" for file in (*TRAINED, *held))
            raise InputError(f"--data: {rows} has no {path.name}; give a directory with {wanted}")
        try:
            read[name] = pq.read_table(path).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"--data {path}: {str(error).splitlines()[0]:.120}") from error
    trained = [row for name in TRAINED for row in read[name]]
    free = shuffled(apart([row for name in held for row in read[name]], trained))
    chosen = []
    for source in sorted({row["data_source"] for row in free}):
        chosen += [row for row in free if row["data_source"] == source][:questions]
    if len(chosen) < 2:
        named = " and ".join(f"{rows}/{name}.parquet" for name in held)
        raise InputError(f"--data {named}: {len(chosen)} questions that are not trained on; 2 are needed")
    out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(chosen), out)
    print(f"{out}: {len(chosen)} of {len(free)} questions of {' and '.join(held)} that are in no training file")


def main(arguments: list[str] | None = None) -> None:
    """Write the sample."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, required=True, help="directory with the parquet files")
    parser.add_argument(
        "--held", nargs="+", default=["words_val"], help="files that are evaluated on, without .parquet"
    )
    parser.add_argument("--questions", type=int, default=128, help="of each source")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args(arguments)
    if args.questions < 1:
        parser.error(f"--questions: {args.questions} is not allowed; it must be at least 1")
    try:
        sample(args.data, args.questions, args.out, args.held)
    except InputError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
