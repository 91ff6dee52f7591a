"""The stages in order: fits and measurements of all bases, each skipped where its result is there, then one file."""

import json
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from experiments.heal.edit_stage import EDITS, measure_edits
from experiments.heal.fits import HALF_RATE, OTHER_SEED, SWEEP, rl_cells, sweep_cells
from experiments.heal.records import RECORDS, Record, Records, open_records, records_path
from experiments.heal.results import Results
from experiments.heal.settings import Study, loss
from experiments.heal.spectra import SPECTRA, measure_spectra
from experiments.heal.sweep import FACTS, NOISE, RL, least_loss, measure_rl, measure_sweep, peak
from mifo_lightning.common.terminal import quiet
from mifo_lightning.lab.cell import output_to
from mifo_lightning.lab.runner import run_all

Stage = Callable[[Study, str], None]


def run_study(study: Study) -> None:
    """Run what is missing and write `records.json`; the report reads nothing else.

    Raises:
        InputError: Something in `out` was made with other settings.
        TrainingError: A fit failed.
    """
    for base in study.bases:
        open_records(study, base)  # refused before the first fit, not after it
    run_all([cell for base in study.bases for cell in sweep_cells(study, base).values()], study.jobs)
    _on_all_bases(study, measure_sweep)
    chosen = {base: peak(study, open_records(study, base)) for base in study.bases}
    run_all([cell for base, step in chosen.items() for cell in rl_cells(study, base, step).values()], study.jobs)
    for stage in (measure_rl, measure_spectra):
        _on_all_bases(study, stage)
    if Results(study, collect(study)["bases"], None).wants_edits:
        _on_all_bases(study, measure_edits)
    else:
        print("no edits: there is no fall to restore", flush=True)
    text = json.dumps(collect(study), separators=(",", ":"))
    (study.out / RECORDS).write_text(text + "\n", encoding="utf-8")


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

    def short(record: Record) -> Record:
        return {**record, "test": {key: value for key, value in record["test"].items() if key not in losses}}

    return {
        "peak": peak(study, records),
        "least train loss": least_loss(study, records, study.id_seen) if study.id_seen else None,
        "least test loss": least_loss(study, records, study.id),
        "questions": records.stage(FACTS)["base"]["questions"],
        **{stage: records.stage(stage) for stage in (SWEEP, HALF_RATE, OTHER_SEED, NOISE, RL)},
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


def _on_all_bases(study: Study, stage: Stage) -> None:
    """Measure every base, `jobs` of them at once, each in a process of its own; one at a time in this one."""
    work = [partial(_measure, study, stage, base) for base in study.bases]
    if study.jobs == 1 or len(work) == 1:
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
    path = records_path(study, base)
    path.parent.mkdir(parents=True, exist_ok=True)
    with output_to(path.with_suffix(".log")):
        stage(study, base)
    return f"{stage.__name__.replace('_', ' ')} of {base}: {time.monotonic() - began:.0f} s"


def _call(work: Callable[[], str]) -> str:
    return work()
