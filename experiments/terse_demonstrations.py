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


def terse(target: Any, marker: str) -> Any:
    """A target, a text or a list whose last message is the demonstration, cut down to its answer.

    Raises:
        InputError: It is no demonstration, or has no marker.
    """
    if isinstance(target, list) and target:
        return [*target[:-1], {**target[-1], "content": terse(target[-1].get("content"), marker)}]
    if not isinstance(target, str):
        raise InputError(f"its target is {target!r:.80}, which is no demonstration")
    _, found, answer = target.rpartition(marker)
    if not found:
        raise InputError(f"its target has no {marker!r}, which --marker may change: {target!r:.80}")
    return marker + answer


def write(rows: Path, marker: str, out: Path) -> int:
    """Write the rows with their targets cut down, and return how many there are.

    Raises:
        InputError: A file cannot be read or written, or the target of a row is none; the line names it.
    """
    try:
        table = pq.read_table(rows)
        if "target" not in table.column_names:
            raise InputError(f"--rows {rows}: has no column target, but {', '.join(table.column_names)}")
        cut = []
        for number, target in enumerate(table["target"].to_pylist()):
            try:
                cut.append(terse(target, marker))
            except InputError as error:
                raise InputError(f"--rows {rows}, row {number}: {error}") from None
        place = table.column_names.index("target")
        kept = table.set_column(place, table.schema.field(place), pa.array(cut, table.schema.field(place).type))
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name(f"{out.name}.part")
        pq.write_table(kept, part)
        part.replace(out)  # whole, or not at all
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"--rows {rows}, --out {out}: {str(error).splitlines()[0]:.120}") from error
    return len(cut)


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
        print(f"{args.out}: {write(args.rows, args.marker, args.out)} rows")
    except InputError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
