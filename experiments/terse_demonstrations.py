"""What do demonstrations without their steps teach? Writes rows whose targets are the final answer alone.

    python -m experiments.terse_demonstrations --rows DATA/words_rl.parquet --out runs/words/terse.parquet

A target becomes what stands from its last marker on: `8 - 2 = 6` and `\\boxed{6}` become `\\boxed{6}`. All else of a
row stays as it is. Wrong steps under a right answer, the other way in which demonstrations can be poor, are a key of
any run: `data.demonstrations.damaged_share`.
"""

import argparse
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.terminal import fail


def terse(row: dict[str, Any], marker: str) -> dict[str, Any]:
    """The row with the last message of its target cut down to its answer.

    Raises:
        InputError: There is no target, or it has no marker.
    """
    if not row.get("target"):
        raise InputError(f"--rows: a row without a target: {row!r:.80}")
    *before, last = row["target"]
    _, found, answer = last["content"].rpartition(marker)
    if not found:
        raise InputError(f"--marker {marker}: not in the target {last['content']!r:.80}")
    return {**row, "target": [*before, {**last, "content": marker + answer}]}


def main(arguments: list[str] | None = None) -> None:
    """Write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rows", type=Path, required=True, help="a parquet file in the row format, with targets")
    parser.add_argument("--marker", default="\\boxed{", help="a final answer begins with it")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args(arguments)
    try:
        rows = [terse(row, args.marker) for row in pq.read_table(args.rows).to_pylist()]
    except InputError as error:
        fail(str(error))
    except (OSError, pa.ArrowException) as error:
        fail(f"--rows {args.rows}: {str(error).splitlines()[0]:.120}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), args.out)
    print(f"{args.out}: {len(rows)} rows")


if __name__ == "__main__":
    main()
