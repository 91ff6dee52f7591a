"""What did an ablation show? Writes one self-contained page, and the same in Markdown with one picture.

    python -m mifo_lightning.lab report runs/ablations/paper_table --out docs/results/paper_table

The runner does this by itself when it ends. A directory with a committed page has `ablation.json` and `runs.csv`: its
statistics are written again from these, in place, without what only the runs themselves can tell.

    python -m mifo_lightning.lab report docs/results/paper_table

Of an ablation that is still running, `--bases` takes those bases on which all arms are done; the page says so.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.terminal import printable
from mifo_lightning.lab.report.page import write_report


def main(arguments: Sequence[str]) -> int:
    """Read the ablation, write both files, print where they are; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mifo_lightning.lab report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, help="ablation.json with the runner's cells.json, or with runs.csv")
    parser.add_argument(
        "--out", type=Path, help="where to write report.html and report.md; default: the same directory"
    )
    parser.add_argument("--bases", nargs="+", default=[], metavar="BASE", help="these bases alone; needs --out")
    args = parser.parse_args(arguments)
    try:
        page = write_report(args.directory, args.out, args.bases)
    except InputError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    print(f"wrote {page} and {page.with_name('report.md')}")
    return 0
