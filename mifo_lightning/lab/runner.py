"""The fits of a grid, run: here in processes of their own, or on a cluster; and how far they are."""

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mifo_lightning.common.errors import InputError, Interrupted, TrainingError
from mifo_lightning.common.terminal import printable
from mifo_lightning.lab.cell import (
    LOG,
    ClusterCell,
    Outcome,
    check_fingerprint,
    child,
    last_line,
    outcome,
    record_death,
)
from mifo_lightning.lab.fingerprint import Fingerprint, fingerprint
from mifo_lightning.lab.grid import Cell

# imported once for all fits of `run_here`; W&B imports the latter two when a run begins
IMPORTS = ("mifo_lightning.cli", "wandb.wandb_run", "mifo_lightning.lab.cell")
IMPORTS_OF_WANDB = ("wandb.sdk.launch", "pandas")
GRACE = 25.0  # seconds that interrupted fits have to write their checkpoints; schedulers give 30
Work = Sequence[tuple[Cell, Fingerprint]]


def unfinished(grid: Sequence[Cell]) -> Work:
    """The cells that are not done, each with what it is run with.

    Raises:
        InputError: A cell's directory holds something else than a run of exactly this cell.
    """
    present = [(cell, fingerprint(cell)) for cell in grid]
    for cell, made_with in present:
        check_fingerprint(cell, made_with)
    return [(cell, made_with) for cell, made_with in present if outcome(cell.directory).status != "done"]


def run_all(grid: Sequence[Cell], jobs: int) -> None:
    """Run what is not done, here, `jobs` at once.

    Raises:
        InputError: A run was made with other settings.
        TrainingError: One failed; the line names its log. The others have been run.
    """
    work = unfinished(grid)
    if work:
        with View(len(grid) - len(work), len(work)) as view:
            run_here(work, jobs, IMPORTS, view)
    for cell, _ in work:
        if (found := outcome(cell.directory)).status != "done":
            raise TrainingError(f"{found.status}: {cell.name}: {found.error} ({cell.directory / LOG})")


class View:
    """How far a grid is: a live bar in a terminal, elsewhere a line for every fit that ends; `ended` is called."""

    def __init__(self, kept: int, unfinished: int, ended: Callable[[], None] | None = None) -> None:
        self.kept, self.unfinished, self.ended = kept, unfinished, ended
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
        if self.ended is not None:
            try:
                self.ended()
            except (InputError, OSError) as error:  # the fits that run are worth more
                self.say(f"warning: {error}")
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
                    record_death(cell.directory, error, time.monotonic() - began)
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
        raise InputError("--slurm needs submitit: pip install 'mifo-lightning[lab]'") from None
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
            if job.exception() is not None:
                record_death(cell.directory, f"job {job.job_id}: {last_line(job.paths.stderr)}", 0.0)
            view.end(cell, outcome(cell.directory), len(pending))
        time.sleep(1 if pending else 0)
