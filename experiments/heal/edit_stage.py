"""Stages 4 and 5, measured: each edit's accuracies on test, and how far it lies from the peak."""

from functools import cache, partial

from experiments.heal.factorial import Edit, Editor
from experiments.heal.fits import checkpoint, rl_cells
from experiments.heal.measure import Bench
from experiments.heal.records import Record, open_records
from experiments.heal.settings import Study
from experiments.heal.sweep import FACTS, peak
from experiments.prune_update import read_weights

EDITS = "edits"


def measure_edits(study: Study, base: str) -> None:
    """Make and evaluate every edit and control that has no record yet; none where the peak is the end."""
    records, bench = open_records(study, base), cache(partial(Bench, study, base, losses=False))
    step = peak(study, records)
    if step == study.last:
        return
    rl = read_weights(rl_cells(study, base, step)[study.main, study.last].directory / "model")
    best, end = (read_weights(checkpoint(study, base, each)) for each in (step, study.last))
    rows = max(len(w) for name, w in end.items() if "embed" in name)
    untrained = sorted({*range(rows)} - {*records.stage(FACTS)["base"]["trained tokens"]})
    editor = Editor(study.edits, best, end, rl, study.spectra.matrices, untrained, study.seed_of(base))

    def result(edit: Edit) -> Record:
        weights, more = edit.make()
        norms = {"norm": editor.norm(weights), "from end": editor.norm(weights, end)}
        return {"family": edit.family, "test": bench("test").evaluate(weights), **norms, **more}

    for edit in editor.all():
        records.once(EDITS, edit.name, partial(result, edit))
