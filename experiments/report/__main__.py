"""What did an ablation show? Writes one self-contained page, and the same in Markdown with one picture.

    python -m experiments.report runs/ablations/paper_table --out docs/results/paper_table

The runner does this by itself when it ends. A directory with a committed page has `ablation.json` and `runs.csv`: its
statistics are written again from these, in place, without what only the runs themselves can tell.

    python -m experiments.report docs/results/paper_table
"""

import argparse
import sys
from pathlib import Path

from experiments.report.page import write_report
from mifo_lightning.errors import InputError
from mifo_lightning.terminal import printable


def main() -> None:
    """Read the ablation, write both files, print where they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="ablation.json with the runner's cells.json, or with runs.csv")
    parser.add_argument(
        "--out", type=Path, help="where to write report.html and report.md; default: the same directory"
    )
    args = parser.parse_args()
    try:
        page = write_report(args.directory, args.out)
    except InputError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"wrote {page} and {page.with_name('report.md')}")


if __name__ == "__main__":
    main()
