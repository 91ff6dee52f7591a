"""Which part of a method does what? Runs every arm of an ablation on every base with every seed, and reports.

    python -m mifo_lightning.lab ablation --config experiments/ablations/paper_table.yaml --dry_run
    python -m mifo_lightning.lab ablation --config experiments/ablations/paper_table.yaml --jobs 2
    python -m mifo_lightning.lab ablation --config experiments/ablations/paper_table.yaml --only mifo/seed1

Each fit is a process of its own. Whatever is killed, the same command goes on: finished fits are kept, unfinished ones
resume from their last checkpoint and end with the same bits. A signal (SIGTERM, Ctrl-C) reaches all fits: each writes a
checkpoint and is listed as cut off, and the exit status is 128 + the signal's number. A fit that fails is listed, the
others go on; the exit status is then 1. `--slurm` runs the fits as an array of jobs, `--sweep` leaves them to agents of
a W&B sweep.
"""

import argparse
import shlex
import sys
from collections.abc import Collection, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import yaml

from mifo_lightning.common.errors import InputError
from mifo_lightning.lab.cell import LOCK, LOG, held, outcome
from mifo_lightning.lab.exit_status import exit_status
from mifo_lightning.lab.fingerprint import check_settings
from mifo_lightning.lab.grid import Ablation, Cell, cells, choose, sweep, with_wandb
from mifo_lightning.lab.plan import check_named_before, commit, write_cells, write_plan
from mifo_lightning.lab.reading import check_bases, read_ablation, replaced
from mifo_lightning.lab.records import check_same_inputs, keep, restore
from mifo_lightning.lab.runner import IMPORTS, IMPORTS_OF_WANDB, View, run_here, run_on_cluster, unfinished


def run(ablation: Ablation, only: Sequence[str], on_cluster: bool, command: str) -> int:
    """Run what is unfinished and write the report; the exit status, 1 if a fit failed."""
    missing = [name for name in ("matplotlib", "jinja2", "scipy") if find_spec(name) is None]
    if missing:  # known before the fits, not after them
        raise InputError(f"the report needs {' and '.join(missing)}: pip install 'mifo-lightning[lab]'")
    grid = cells(ablation)
    restored = restore(ablation.records, ablation, grid) if ablation.records else []
    check_named_before(ablation, grid)
    chosen = choose(grid, only)
    for cell in grid:  # all that are done stand in the report
        if outcome(cell.directory).status == "done":
            check_settings(cell)
    work = unfinished(chosen)
    check_bases(ablation, {cell.base for cell, _ in work})
    check_same_inputs(work, grid)
    write_plan(ablation, command, bool(work), restored)
    if work:
        warn(ablation)
    ran = {cell.name for cell, _ in work}
    record = partial(_record, ablation, grid, ran, commit())  # after every fit: a machine may go at any time
    with View(len(chosen) - len(work), len(work), record) as view:
        try:
            if work and on_cluster:
                options = {"slurm_array_parallelism": ablation.jobs, **(ablation.slurm or {})}
                run_on_cluster(work, options, ablation.out / "slurm", view)
            elif work:
                run_here(work, ablation.jobs, IMPORTS + (IMPORTS_OF_WANDB if ablation.wandb else ()), view)
        finally:
            record()
    rows = write_cells(ablation, grid)
    done = sum(row["status"] == "done" for row in rows)
    if done and (not only or done == len(rows)):
        from mifo_lightning.lab.report import write_report

        view.say(f"report: {write_report(ablation.out)}")
    elif done:
        view.say(f"{done} of {len(rows)} done; report: python -m mifo_lightning.lab report {ablation.out}")
    failed = [cell for cell in chosen if outcome(cell.directory).status != "done"]
    for cell in failed:
        found = outcome(cell.directory)
        view.say(f"{found.status}: {cell.name}: {found.error} ({cell.directory / LOG})")
    return 1 if failed else 0


def _record(ablation: Ablation, grid: Sequence[Cell], ran: Collection[str], at: str | None) -> None:
    """Keep the finished cells, where the ablation names a file for them."""
    if ablation.records:
        with held(ablation.out / LOCK):  # agents of a sweep begin and end at any time
            keep(ablation.records, ablation, grid, ran, at)


def warn(ablation: Ablation) -> None:
    """Tell what settings of all arms do to single ones."""
    for line in replaced(ablation):
        print(f"warning: {line}", file=sys.stderr)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mifo_lightning.lab ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="an ablation, such as experiments/ablations/*.yaml")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM[/BASE[/SEED]]", help="these cells alone")
    parser.add_argument("--jobs", type=int, help="fits at once, one thread each; instead of the file's")
    parser.add_argument("--out", type=Path, help="where runs and results are kept; instead of the file's")
    parser.add_argument("--wandb", choices=["offline", "online"], help="log to W&B; instead of the file's mode")
    parser.add_argument("--dry_run", action="store_true", help="print the command of every fit, run nothing")
    parser.add_argument("--slurm", action="store_true", help="run as an array of jobs, by the file's `slurm`")
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="write a W&B sweep of the fits, run nothing")
    parsed = parser.parse_args(arguments)
    if parsed.jobs is not None and parsed.jobs < 1:
        parser.error(f"--jobs {parsed.jobs}: allowed is 1 or more")
    return parsed


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit status."""
    parsed = parse(arguments)
    command = shlex.join(["python", "-m", "mifo_lightning.lab", "ablation", *arguments])
    changes = {key: value for key in ("jobs", "out") if (value := getattr(parsed, key)) is not None}

    def work() -> int:
        ablation = with_wandb(read_ablation(parsed.config, **changes), parsed.wandb)
        chosen = choose(cells(ablation), parsed.only)
        if parsed.sweep:
            text = yaml.safe_dump(sweep(ablation, chosen, parsed.config), sort_keys=False)
            parsed.sweep.write_text(text, encoding="utf-8")
            print(f"wrote {parsed.sweep} with {len(chosen)} fits; next: wandb sweep {parsed.sweep}")
        elif parsed.dry_run:
            warn(ablation)
            for cell in chosen:
                print(f"# {cell.name}\n{cell.command}")
        else:
            return run(ablation, parsed.only, parsed.slurm, command)
        return 0

    return exit_status(work)
