"""The stages in order: fits and measurements of all bases, each skipped where its result is there, then one file."""

import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from experiments.heal.edit_stage import EDITS, measure_edits
from experiments.heal.fits import HALF_RATE, OTHER_SEED, SWEEP, protected_cells, protected_runs, rl_cells, sweep_cells
from experiments.heal.records import RECORDS, SECONDS, Record, Records, open_records, records_path
from experiments.heal.results import Results
from experiments.heal.settings import Study, loss
from experiments.heal.spectra import SPECTRA, measure_spectra
from experiments.heal.sweep import (
    FACTS,
    NOISE,
    RL,
    check_end,
    check_start,
    least_loss,
    measure_protected,
    measure_rl,
    measure_sweep,
    peak,
)
from experiments.heal.tries import TRIES, measure_tries
from mifo_lightning.common.files import make_writable, replace_text
from mifo_lightning.common.terminal import quiet
from mifo_lightning.lab.cell import LOCK, held, outcome, output_to
from mifo_lightning.lab.grid import Cell, slug
from mifo_lightning.lab.runner import run_all

Stage = Callable[[Study, str], None]


def run_study(study: Study) -> None:
    """Run what is missing and write `records.json`; the report reads nothing else.

    The sweep of all bases comes first: it says whether there is a fall to restore. Then bases go through the other
    stages `jobs` at a time, so that a study that ends early has whole bases; one that is measured needs no fits.

    Raises:
        InputError: Something was made with other settings, or a measured base cannot be gone on with.
        TrainingError: A fit failed.
    """
    make_writable(study.out, "out")
    make_writable(records_path(study, next(iter(study.bases))).parent, "records")
    with held(study.out / LOCK, f"{study.out}: another call runs this study; this one waits, and goes on after it"):
        _run(study)


def _run(study: Study) -> None:
    for base in study.bases:
        open_records(study, base)  # refused before the first fit, not after it
    bases = _unmeasured(study, [measure_sweep])
    _fits(study, {base: sweep_cells(study, base) for base in bases})
    _on_bases(study, bases, measure_sweep)
    stages: list[Stage] = [measure_rl, measure_tries, measure_spectra]
    if Results(study, collect(study)["bases"], None).wants_edits:
        stages.append(measure_edits)
    else:
        print("no edits: there is no fall to restore", flush=True)
    missing = _unmeasured(study, stages)
    for i in range(0, len(missing), study.jobs):
        bases = missing[i : i + study.jobs]
        _fits(study, {base: sweep_cells(study, base) for base in bases})  # gone where another machine has measured them
        for base in bases:
            check_end(study, base)
        _fits(study, {base: rl_cells(study, base, peak(study, open_records(study, base))) for base in bases})
        for stage in stages:
            _on_bases(study, bases, stage)
    bases = [base for base in study.bases if _unprotected(study, open_records(study, base))]
    _fits(study, {base: protected_cells(study, base) for base in bases})
    _on_bases(study, bases, measure_protected)
    replace_text(study.out / RECORDS, json.dumps(collect(study), separators=(",", ":")) + "\n")


def collect(study: Study) -> Record:
    """What the page is made of: the study, and the records of its bases without what only a rerun needs."""
    commits = dict.fromkeys(commit for base in study.bases for commit in open_records(study, base).commits)
    return {
        "study": study.content(),
        "commit": ", ".join(commits) or None,
        "bases": {base: _collected(study, open_records(study, base)) for base in study.bases},
    }


def _collected(study: Study, records: Records) -> Record:
    """One base: which checkpoints were chosen, and all stages; of edits the accuracies alone."""
    losses = {loss(key) for key in (study.id_seen, study.id, study.ood) if key}
    plain = (SWEEP, HALF_RATE, OTHER_SEED, *protected_runs(study), NOISE, RL, TRIES, SECONDS)

    def short(record: Record) -> Record:
        return {**record, "test": {key: value for key, value in record["test"].items() if key not in losses}}

    return {
        "peak": peak(study, records),
        "least train loss": least_loss(study, records, study.id_seen) if study.id_seen else None,
        "least test loss": least_loss(study, records, study.id),
        "questions": records.stage(FACTS)["base"]["questions"],
        **{stage: records.stage(stage) for stage in plain},
        SPECTRA: _shortened(records.stage(SPECTRA)),
        EDITS: {name: short(record) for name, record in records.stage(EDITS).items()},
    }


def _shortened(value: Any) -> Any:
    """Three significant digits: these are means over matrices."""
    if isinstance(value, dict):
        return {key: _shortened(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_shortened(each) for each in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _unmeasured(study: Study, stages: Sequence[Stage]) -> list[str]:
    """The bases on which a stage is not done."""
    done = {base: open_records(study, base).stage(SECONDS) for base in study.bases}
    return [base for base in study.bases if any(_name(stage) not in done[base] for stage in stages)]


def _unprotected(study: Study, records: Records) -> bool:
    """Whether a step of the runs with directions that stand still has no record; their names say the share."""
    steps = set(map(str, study.sweep.steps))
    return any(not steps <= set(records.stage(run)) for run in protected_runs(study))


def _fits(study: Study, wanted: Mapping[str, Mapping[Any, Cell]]) -> None:
    """Run those of the bases, and record how long they took; none if a base is another than before."""
    for base in wanted:
        check_start(study, base)
    run_all([cell for cells in wanted.values() for cell in cells.values()], study.jobs)
    for base, cells in wanted.items():
        for cell in cells.values():
            seconds = outcome(cell.directory).seconds
            open_records(study, base).once(SECONDS, cell.name, partial(float, seconds))


def _on_bases(study: Study, bases: Sequence[str], stage: Stage) -> None:
    """Measure them, `jobs` at once, each in a process of its own; one at a time in this one."""
    work = [partial(_measure, study, stage, base) for base in bases]
    if study.jobs == 1 or len(work) <= 1:
        for measure in work:
            print(measure(), flush=True)
        return
    with multiprocessing.get_context("spawn").Pool(study.jobs) as pool:  # ended with this block, however it ends
        for line in pool.imap_unordered(_call, work):
            print(line, flush=True)


def _measure(study: Study, stage: Stage, base: str) -> str:
    """Measure a base; what evaluations print goes to its log. The line that says so."""
    quiet()
    torch.set_num_threads(1)
    began = time.monotonic()
    log = study.out / "logs" / f"{slug(base)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with output_to(log):
        stage(study, base)
    seconds = time.monotonic() - began  # of the call that ends it
    open_records(study, base).once(SECONDS, _name(stage), partial(float, seconds))
    return f"{_name(stage)} of {base}: {seconds:.0f} s"


def _name(stage: Stage) -> str:
    return stage.__name__.replace("_", " ")


def _call(work: Callable[[], str]) -> str:
    return work()
