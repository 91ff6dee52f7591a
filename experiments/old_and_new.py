"""What did a study show before its task was mended, and what does it show now? Two pages' arms side by side.

python -m experiments.old_and_new docs/results/tied/paper_table docs/results/paper_table
"""

import argparse
from pathlib import Path

from mifo_lightning.common.errors import InputError
from mifo_lightning.common.terminal import fail
from mifo_lightning.lab.report.document import bracketed, intervals
from mifo_lightning.lab.report.results import Ablation, load


def table(old: Ablation, new: Ablation) -> str:
    """Markdown: both sides of the trade-off of every arm of either study, mean [95 % interval], a dash without it."""
    sides = list(new.trade_off)
    header = ["arm", *(f"{side}, {when}" for side in sides for when in ("before", "now"))]
    found = [[intervals(study, study.traded(side)) for study in (old, new)] for side in sides]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for arm in dict.fromkeys([*new.names, *old.names]):
        cells = [bracketed(study[arm]) if arm in study else "-" for pair in found for study in pair]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a directory with ablation.json and runs.csv")
    parser.add_argument("new", type=Path, help="another, whose trade-off is shown")
    args = parser.parse_args(arguments)
    try:
        print(table(load(args.old), load(args.new)))
    except InputError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
