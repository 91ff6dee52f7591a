"""The stages in order: fits and measurements of all bases, each skipped where its result is there, then one file."""

import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from experiments.heal.edit_stage import EDITS, measure_edits
from experiments.heal.fits import HALF_RATE, OTHER_SEED, SWEEP, rl_cells, run, sweep_cells
from experiments.heal.records import Record, Records, open_records
from experiments.heal.settings import Study, loss
from experiments.heal.spectra import SPECTRA, measure_spectra
from experiments.heal.sweep import FACTS, NOISE, RL, least_loss, measure_rl, measure_sweep, peak
from mifo_lightning.lab.plan import commit

RECORDS = "records.json"


def run_study(study: Study) -> None:
    """Run what is missing and write `records.json`; the report reads nothing else.

    Raises:
        InputError: Something in `out` was made with other settings.
        TrainingError: A fit failed.
    """
    for base in study.bases:
        open_records(study, base)  # refused before the first fit, not after it
    run([cell for base in study.bases for cell in sweep_cells(study, base).values()], study.jobs)
    _on_all_bases(study, measure_sweep)
    chosen = {base: peak(study, open_records(study, base)) for base in study.bases}
    run([cell for base, step in chosen.items() for cell in rl_cells(study, base, step).values()], study.jobs)
    for measure in (measure_rl, measure_spectra, measure_edits):
        _on_all_bases(study, measure)
    text = json.dumps(collect(study), separators=(",", ":"))
    (study.out / RECORDS).write_text(text + "\n", encoding="utf-8")


def collect(study: Study) -> Record:
    """What the page is made of: the study, and the records of its bases without what only a rerun needs."""
    return {
        "study": study.content(),
        "commit": commit(),
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
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _on_all_bases(study: Study, measure: Callable[[Study, str], None]) -> None:
    """Measure every base, `jobs` of them at once, each in a process of its own; one alone in this one."""
    if study.jobs == 1 or len(study.bases) == 1:
        for base in study.bases:
            measure(study, base)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(study.jobs, mp_context=context) as pool:
        for done in [pool.submit(measure, study, base) for base in study.bases]:
            done.result()
