"""Stages 1 and 2, measured: what SFT does to both accuracies along its way, and what RL makes of each checkpoint."""

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

from experiments.heal.fits import HALF_RATE, OTHER_SEED, SWEEP, checkpoint, protected_runs, rl_cells
from experiments.heal.measure import Bench
from experiments.heal.records import Record, Records, open_records
from experiments.heal.settings import Study, loss
from experiments.prune_update import Weights, read_weights
from mifo_lightning.common.errors import InputError
from mifo_lightning.lab import fingerprint
from mifo_lightning.lab.cell import SUMMARY, outcome
from mifo_lightning.lab.fingerprint import sha256

FACTS, NOISE, RL = "facts", "noise", "rl"
VAL_DRAW = 1000
"""Val draws with other random numbers than test: keys of questions do not tell the splits apart."""


def measure_sweep(study: Study, base: str) -> None:
    """Evaluate every checkpoint on val and test, the controls on test, and the end with other draws."""
    records, bench = open_records(study, base), cache(partial(Bench, study, base))

    def on_test(run: str, step: int, draw: int = 0) -> Record:
        return {"test": bench("test").evaluate(read_weights(checkpoint(study, base, step, run)), draw)}

    def chosen_and_reported(step: int) -> Record:
        weights = read_weights(checkpoint(study, base, step))
        found: Record = {"val": bench("val").evaluate(weights, VAL_DRAW)}
        found["signal"] = bench("val").signal(study.signal_questions)
        return {**found, "test": bench("test").evaluate(weights)}

    def facts() -> Record:
        on_test(SWEEP, 0)
        return {"questions": bench("test").questions(), "trained tokens": bench("test").trained_tokens()}

    records.once(FACTS, "end", partial(digest, checkpoint(study, base, study.last)))
    check_end(study, base)
    for step in study.sweep.steps:
        records.once(SWEEP, str(step), partial(chosen_and_reported, step))
        records.once(HALF_RATE, str(step), partial(on_test, HALF_RATE, step))
    for step in (peak(study, records), study.last):
        records.once(OTHER_SEED, str(step), partial(on_test, OTHER_SEED, step))
    for draw in range(1, study.draws + 1):
        records.once(NOISE, str(draw), partial(on_test, SWEEP, study.last, draw))
    records.once(FACTS, "base", facts)


def measure_protected(study: Study, base: str) -> None:
    """Evaluate on test, at the sweep's steps, what SFT makes of the base where main directions stand still.

    Raises:
        InputError: The base is another one than that of the sweep.
    """
    records, bench = open_records(study, base), cache(partial(Bench, study, base, "test"))

    def on_test(model: Path) -> Record:
        return {"test": bench().evaluate(read_weights(model))}

    for run in protected_runs(study):
        for step in study.sweep.steps:
            found = records.once(run, str(step), partial(on_test, checkpoint(study, base, step, run)))
            if step == 0 and found["test"] != records.stage(SWEEP)["0"]["test"]:
                raise InputError(
                    f"{records.path}: {run} begins with other accuracies than those that were measured of this base; "
                    "go on where they were made, or remove that file to measure this base anew"
                )


def check_start(study: Study, base: str) -> None:
    """Refuse, before the first fit, a base that is not the one of the records.

    Raises:
        InputError: It is another one.
    """
    records = open_records(study, base)
    if {"start", "end"} & records.stage(FACTS).keys() == {"end"}:
        return  # measured before this was kept: `check_end` will tell
    start = fingerprint.digest(study.bases[base])
    if records.once(FACTS, "start", lambda: start) != start:
        raise InputError(
            f"{records.path}: {study.bases[base]} is another base than the one that its fits began with; go on where "
            "that was made, or remove that file to measure this base anew"
        )


def check_end(study: Study, base: str) -> None:
    """Refuse to go on from other weights than those that were measured: another kind of CPU rounds otherwise.

    Raises:
        InputError: The end of the sweep is not that of the records.
    """
    records, end = open_records(study, base), checkpoint(study, base, study.last)
    if digest(end) != records.stage(FACTS)["end"]:
        raise InputError(
            f"{records.path}: {end} has other weights than those that were measured; another kind of CPU makes others: "
            "go on where they were made, or remove that file to measure this base anew"
        )


def digest(model: Path) -> str:
    """Of all weights of a directory."""
    return sha256(model / "model.safetensors")[:16]


def measure_rl(study: Study, base: str) -> None:
    """Evaluate on test what every arm of stage 2 has made of its checkpoints."""
    records, bench = open_records(study, base), cache(partial(Bench, study, base))

    def result(arm: str, step: int) -> Record:
        cell = rl_cells(study, base, peak(study, records))[arm, step]
        weights, before = read_weights(cell.directory / "model"), read_weights(checkpoint(study, base, step))
        summary: dict[str, Any] = json.loads((cell.directory / SUMMARY).read_text(encoding="utf-8"))
        return {
            "test": bench("test").evaluate(weights),
            "norm": distance(weights, before),
            "optimizer steps": summary["optimizer_steps"],
            "seconds": outcome(cell.directory).seconds,
            "costs": summary.get("costs"),
        }

    for arm, step in rl_cells(study, base, peak(study, records)):
        records.once(RL, f"{arm}/{step}", partial(result, arm, step))


def peak(study: Study, records: Records) -> int:
    """The step with the highest OOD accuracy on val; the earliest of several."""
    found = records.stage(SWEEP)
    return max(study.sweep.steps, key=lambda step: (found[str(step)]["val"][study.ood], -step))


def least_loss(study: Study, records: Records, metric: str) -> int | None:
    """The step with the least loss, on val, on demonstrations of the questions of a metric; None if not measured."""
    found = {step: records.stage(SWEEP)[str(step)]["val"].get(loss(metric)) for step in study.sweep.steps}
    if any(value is None for value in found.values()):
        return None
    return min(study.sweep.steps, key=lambda step: (found[step], step))


def distance(weights: Weights, other: Weights) -> float:
    """L2 norm of the difference of all weights."""
    return sum(float((w.double() - other[name].double()).square().sum()) for name, w in weights.items()) ** 0.5
