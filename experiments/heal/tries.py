"""Stage 2, measured leniently: several tries a question, and the greedy response, of the models that claims are about.

The paper counts a question as solved within five turns with a verifier's complaint between them; five independent
tries are the nearest to it without a second turn.
"""

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

from experiments.heal.fits import checkpoint, rl_cells, steps_of
from experiments.heal.measure import Bench
from experiments.heal.records import Record, open_records
from experiments.heal.settings import END, PEAK, Study
from experiments.heal.sweep import peak
from experiments.prune_update import read_weights

TRIES = "tries"
SAMPLES = 5
SWEPT = "SFT"
"""Stands where a record names an arm, for the checkpoint itself."""


def measure_tries(study: Study, base: str) -> None:
    """Evaluate base, peak and end, and what the main RL makes of them, with several tries a question."""
    records = open_records(study, base)
    changes = {"model.evaluation.samples": SAMPLES, "model.evaluation.greedy": True}
    bench = cache(partial(Bench, study, base, "test", losses=False, changes=changes))

    def result(model: Path) -> Record:
        return bench().evaluate(read_weights(model), metrics=metrics_of(study))

    for name, model in _models(study, base, peak(study, records)):
        records.once(TRIES, name, partial(result, model))


def metrics_of(study: Study) -> list[str]:
    """Share of right responses, of questions right at least once, and of greedy ones right, by source."""
    sources = [key.rpartition("/")[0] for key in (study.id_seen, study.id, study.ood) if key]
    return [f"{source}/{what}" for source in sources for what in (f"avg@{SAMPLES}", f"pass@{SAMPLES}", "greedy")]


def _models(study: Study, base: str, best: int) -> Iterator[tuple[str, Path]]:
    cells = rl_cells(study, base, best)
    for step in steps_of(study, [0, PEAK, END], best):
        yield f"{SWEPT}/{step}", checkpoint(study, base, step)
        if (study.main, step) in cells:
            yield f"{study.main}/{step}", cells[study.main, step].directory / "model"
