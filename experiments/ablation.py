"""Which part of a method does what? Runs every arm of an ablation on every base with every seed, and reports.

    python -m experiments.ablation --config experiments/ablations/paper_table.yaml --dry_run
    python -m experiments.ablation --config experiments/ablations/paper_table.yaml --jobs 2
    python -m experiments.ablation --config experiments/ablations/paper_table.yaml --only mifo/seed0/1

Each fit is a process of its own. Whatever is killed, the same command goes on: finished fits are kept, unfinished ones
resume from their last checkpoint and end with the same bits. A signal (SIGTERM, Ctrl-C) reaches all fits: each writes a
checkpoint and is listed as cut off, and the exit status is 128 + the signal's number. A fit that fails is listed, the
others go on; the exit status is then 1. `--slurm` runs the fits as an array of jobs, `--sweep` leaves them to agents of
a W&B sweep.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.cell import (
    LOCK,
    LOG,
    ClusterCell,
    Fingerprint,
    Outcome,
    check_fingerprint,
    child,
    fingerprint,
    held,
    last_line,
    outcome,
    record_outcome,
    write_json,
)
from experiments.grid import Ablation, Cell, cells, choose, read_ablation, slug, sweep, with_wandb
from mifo_lightning.errors import InputError, Interrupted
from mifo_lightning.stopping import interruption
from mifo_lightning.terminal import printable

PLAN = "ablation.json"
GRACE = 25.0  # seconds that interrupted fits have to write their checkpoints; schedulers give 30
NAMED_BEFORE = ("primary", "primary_contrast", "margin")
"""What a reader takes to have been named before a run had been seen."""
Work = Sequence[tuple[Cell, Fingerprint]]
# imported once for all fits of `run_here`; W&B imports the latter two when a run begins
IMPORTS = ("mifo_lightning.cli", "wandb.wandb_run", "experiments.cell")
IMPORTS_OF_WANDB = ("wandb.sdk.launch", "pandas")


class View:
    """How far a grid is: a live bar in a terminal, elsewhere a line for every fit that ends."""

    def __init__(self, kept: int, unfinished: int) -> None:
        self.kept, self.unfinished = kept, unfinished
        self.console = Console(highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._task = self._bar.add_task("", total=kept + unfinished, completed=kept)
        self._began, self._ended, self._failed = time.monotonic(), 0, 0

    def __enter__(self) -> "View":
        self._bar.start()
        self.show(0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def show(self, running: int) -> None:
        """Show how many fits run."""
        self._bar.update(self._task, description=self._text(running), completed=self.kept + self._ended)

    def end(self, cell: Cell, result: Outcome, running: int) -> None:
        """Count a fit that has ended, and say so."""
        self._ended += 1
        self._failed += result.status != "done"
        self.show(running)
        line = f"{result.status:7} {cell.name}  {result.seconds:.0f} s"
        if not self.console.is_terminal:
            self.say(f"{line}  |  {self._text(running)}")
        elif result.status != "done":
            self.say(line)

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        self.console.print(printable(line), markup=False)

    def _text(self, running: int) -> str:
        done = self.kept + self._ended - self._failed
        text = f"{done} of {self.kept + self.unfinished} done, {running} running, {self._failed} failed"
        if self._ended and self._ended < self.unfinished:
            left = (time.monotonic() - self._began) / self._ended * (self.unfinished - self._ended)
            text += f", about {left / 60:.0f} min left" if left > 90 else f", about {left:.0f} s left"
        return text


def run_here(work: Work, jobs: int, imports: Sequence[str], view: View) -> None:
    """Run cells in processes of their own, at most `jobs` at once; these modules are imported once for all."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(imports))
    waiting, running = deque(work), dict[Any, tuple[Any, Cell, float]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell, present = waiting.popleft()
                process = context.Process(target=child, args=(cell, present), name=cell.name)
                process.start()
                running[process.sentinel] = process, cell, time.monotonic()
                view.show(len(running))
            for sentinel in connection.wait(list(running)):
                process, cell, began = running.pop(sentinel)
                process.join()
                if process.exitcode:  # the fit itself catches errors: the process was ended from outside
                    how = f"signal {-process.exitcode}" if process.exitcode < 0 else f"status {process.exitcode}"
                    error = f"its process ended with {how}: {last_line(cell.directory / LOG)}"
                    record_outcome(cell.directory, error, time.monotonic() - began)
                view.end(cell, outcome(cell.directory), len(running))
    except Interrupted as stop:
        for process, _, _ in running.values():
            os.kill(process.pid, stop.signum)
        latest = time.monotonic() + GRACE
        for process, cell, _ in running.values():
            process.join(max(0.0, latest - time.monotonic()))
            view.end(cell, outcome(cell.directory), 0)
        raise
    finally:
        for process, _, _ in running.values():
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.kill()  # not yet in a group of its own
            process.join()


def run_on_cluster(work: Work, options: dict[str, Any], folder: Path, view: View) -> None:
    """Submit cells as one array of jobs and wait for them; interrupting the wait leaves the jobs alone."""
    try:
        import submitit
    except ImportError:
        raise InputError("--slurm needs submitit: pip install -e '.[experiments]'") from None
    cluster = options.get("cluster", "slurm")
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**{key: value for key, value in options.items() if key != "cluster"})
        with executor.batch():
            jobs = [executor.submit(ClusterCell(*pair)) for pair in work]
    except (RuntimeError, ValueError, TypeError, NameError, submitit.core.utils.FailedJobError) as error:
        raise InputError(f"slurm: {options}: {' '.join(str(error).split())}") from None
    view.say(f"submitted {len(jobs)} jobs; their own logs are in {folder}")
    pending = [(job, cell) for job, (cell, _) in zip(jobs, work, strict=True)]
    while pending:
        view.show(len(pending))
        for pair in [pair for pair in pending if pair[0].done()]:
            job, cell = pair
            pending.remove(pair)
            if job.exception() is not None and outcome(cell.directory).status != "failed":
                record_outcome(cell.directory, f"job {job.job_id}: {last_line(job.paths.stderr)}", 0.0)
            view.end(cell, outcome(cell.directory), len(pending))
        time.sleep(1 if pending else 0)


def write_plan(ablation: Ablation, command: str, fits: bool) -> None:
    """Write `ablation.json`; its `commit` (all of them, in order) and `command` are those of calls with fits to run.

    Written before the fits, so that a call that is killed is recorded too.
    """
    path = ablation.out / PLAN
    keys = ("name", "question", "setting", "metrics", "trade_off", "reference", "contrasts", "design", *NAMED_BEFORE)
    record = {
        **{key: getattr(ablation, key) for key in keys},
        "arms": [{"name": name, "directory": slug(name), **asdict(arm)} for name, arm in ablation.arms.items()],
        "bases": list(ablation.bases),
        "seeds": {base: ablation.seeds_of(base) for base in ablation.bases},
    }
    with held(ablation.out / LOCK):  # agents of a sweep begin and end at any time
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        made = {key: before.get(key) for key in ("command", "commit")}
        if fits:
            commits = (made["commit"] or "").split(", ")
            commits += [now for now in [commit()] if now and now not in commits]
            made = {"command": command, "commit": ", ".join(filter(None, commits)) or None}
        write_json(path, {**record, **made})


def check_named_before(ablation: Ablation, grid: Iterable[Cell]) -> None:
    """Raise InputError if what is tested was named anew after a fit had ended."""
    path = ablation.out / PLAN
    if not path.is_file() or all(outcome(cell.directory).status == "missing" for cell in grid):
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for key in NAMED_BEFORE:
        if before.get(key) != getattr(ablation, key):
            raise InputError(
                f"{key}: {getattr(ablation, key)}: was {before.get(key)} when runs of {ablation.out} were made; one "
                "named after them is exploratory: put a pair of arms under `contrasts`, or choose another `out`"
            )


def write_cells(ablation: Ablation, grid: Iterable[Cell]) -> list[dict[str, Any]]:
    """Write `cells.json`, all cells as they are on disk now; returns its rows."""
    with held(ablation.out / LOCK):
        rows = [
            {
                "arm": cell.arm,
                "base": cell.base,
                "seed": cell.seed,
                "directory": str(cell.directory.relative_to(ablation.out)),
                **asdict(outcome(cell.directory)),
            }
            for cell in grid
        ]
        write_json(ablation.out / "cells.json", rows)
    return rows


def commit() -> str | None:
    """The commit of the working tree, marked if files differ from it; None outside of a repository."""
    try:
        # no tag is wanted: only then is it the hash
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return None
    return ended.stdout.strip() or None


def run(ablation: Ablation, only: Sequence[str], on_cluster: bool, command: str) -> int:
    """Run what is unfinished and write the report; the exit status, 1 if a fit failed."""
    missing = [name for name in ("matplotlib", "jinja2", "scipy") if find_spec(name) is None]
    if missing:  # known before the fits, not after them
        raise InputError(f"the report needs {' and '.join(missing)}: pip install -e '.[experiments]'")
    grid = cells(ablation)
    check_named_before(ablation, grid)
    chosen = [(cell, fingerprint(cell)) for cell in choose(grid, only)]
    for cell, present in chosen:
        check_fingerprint(cell, present)
    work = [(cell, present) for cell, present in chosen if outcome(cell.directory).status != "done"]
    write_plan(ablation, command, fits=bool(work))
    with View(len(chosen) - len(work), len(work)) as view:
        if work and on_cluster:
            options = {"slurm_array_parallelism": ablation.jobs, **(ablation.slurm or {})}
            run_on_cluster(work, options, ablation.out / "slurm", view)
        elif work:
            run_here(work, ablation.jobs, IMPORTS + (IMPORTS_OF_WANDB if ablation.wandb else ()), view)
    rows = write_cells(ablation, grid)
    done = sum(row["status"] == "done" for row in rows)
    if done and (not only or done == len(rows)):
        from experiments.report import write_report

        view.say(f"report: {write_report(ablation.out)}")
    elif done:
        view.say(f"{done} of {len(rows)} done; report: python -m experiments.report {ablation.out}")
    failed = [cell for cell, _ in chosen if outcome(cell.directory).status != "done"]
    for cell in failed:
        found = outcome(cell.directory)
        view.say(f"{found.status}: {cell.name}: {found.error} ({cell.directory / LOG})")
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.ablation",
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parsed = parse(arguments)
    command = shlex.join(["python", "-m", "experiments.ablation", *(sys.argv[1:] if arguments is None else arguments)])
    changes = {key: value for key in ("jobs", "out") if (value := getattr(parsed, key)) is not None}
    try:
        with interruption.noted():
            ablation = with_wandb(read_ablation(parsed.config, **changes), parsed.wandb)
            chosen = choose(cells(ablation), parsed.only)
            if parsed.sweep:
                text = yaml.safe_dump(sweep(ablation, chosen, parsed.config), sort_keys=False)
                parsed.sweep.write_text(text, encoding="utf-8")
                print(f"wrote {parsed.sweep} with {len(chosen)} fits; next: wandb sweep {parsed.sweep}")
            elif parsed.dry_run:
                for cell in chosen:
                    print(f"# {cell.name}\n{cell.command}")
            else:
                return run(ablation, parsed.only, parsed.slurm, command)
    except InputError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"interrupted by {signal.Signals(stop.signum).name}; the same command goes on", file=sys.stderr)
        return 128 + stop.signum
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
