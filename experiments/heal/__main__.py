"""Does RL heal what SFT forgets, and where in the weights? Runs all of it, resumably, and writes the page.

    python -m experiments.heal --config experiments/heal/points.yaml
    python -m experiments.heal --config experiments/heal/points.yaml --jobs 2 --out runs/heal_points
    python -m experiments.heal --report runs/heal_points            # the page again, from its records.json

1. Sweep: one SFT run a base at a constant rate; ID and OOD accuracy of its checkpoints. The peak is chosen on val.
2. RL from checkpoints, the same steps from each, and its controls.
3. Spectra: how singular values and subspaces move, beside what any change of the same size does.
4. Edits: parts of SFT's change put back, against random subspaces, interpolation and random changes.

The same command goes on where it was stopped. Exit status 2: bad input; 1: a fit failed; 128 + n: a signal.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.heal.settings import read_study
from mifo_lightning.common.terminal import quiet
from mifo_lightning.lab.exit_status import exit_status


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.heal",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="a study, such as experiments/heal/points.yaml")
    what.add_argument(
        "--report", type=Path, metavar="DIR", help="write the page of DIR/records.json again, run nothing"
    )
    parser.add_argument("--jobs", type=int, help="fits and bases at once, one thread each; instead of the file's")
    parser.add_argument("--out", type=Path, help="where everything is kept, records too; instead of the file's")
    parsed = parser.parse_args(arguments)
    if parsed.jobs is not None and parsed.jobs < 1:
        parser.error(f"--jobs {parsed.jobs}: allowed is 1 or more")
    if parsed.report and (parsed.jobs or parsed.out):
        parser.error("--report: takes neither --jobs nor --out")
    return parsed


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit status."""
    parsed = parse(arguments)
    quiet()
    from experiments.heal.report import write_report

    changes = {key: value for key in ("jobs", "out") if (value := getattr(parsed, key)) is not None}
    if parsed.out:
        changes["records"] = None  # a study apart, not one that goes on with what the repository keeps

    def work() -> int:
        place = parsed.report
        if parsed.config:
            from experiments.heal.study import run_study

            study = read_study(parsed.config, **changes)
            place = study.out
            run_study(study)
        print(f"wrote {write_report(place)}")
        return 0

    return exit_status(work)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
