"""The tables of a study: means over bases with intervals, every claim beside its controls."""

from collections.abc import Sequence

import numpy as np

from experiments.heal.fits import HALF_RATE, NO_UPDATE, OTHER_SEED, SWEEP
from experiments.heal.restoration import units
from experiments.heal.results import Results
from experiments.heal.settings import END, PEAK, Start
from experiments.heal.tries import SAMPLES, SWEPT, metrics_of
from experiments.heal.verdict import NO_FALL, UNCLEAR, restored, told
from mifo_lightning.lab.report.document import bracketed, number
from mifo_lightning.lab.report.statistics import Scores, interval

Rows = list[list[str]]
COSTS = {"questions": "questions asked", "trained_tokens": "tokens trained on", "flops": "FLOPs"}
SIGNALS = ("groups with signal", "positive", "advantage entropy")


def markdown(header: Sequence[str], rows: Rows) -> str:
    """A table."""
    texts = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (header, *rows)]
    head, *body = (f"| {text} |" for text in texts)
    return "\n".join([head, "|" + "---|" * len(header), *body])


def sweep_table(results: Results) -> str:
    """Along SFT: accuracies on test, losses, what RL would have to work with, and half the rate beside it."""
    study, rows = results.study, []
    losses = [key for key in study.metrics[len(accuracies(results)) :] if np.isfinite(results.swept(0, key)).all()]
    for step in study.sweep.steps:
        cells = [mean(results.swept(step, key)) for key in (*accuracies(results), *losses)]
        cells += [mean(results.signal(step, key)) for key in SIGNALS]
        rows.append([f"{step}", *cells, *(mean(results.swept(step, key, HALF_RATE)) for key in accuracies(results))])
    halves = [f"half rate: {key}" for key in accuracies(results)]
    return markdown(["SFT steps", *accuracies(results), *losses, *SIGNALS, *halves], rows)


def checkpoint_table(results: Results) -> str:
    """The checkpoints that four rules choose, on test."""
    bases = list(results.bases.values())
    rules = {
        "peak: highest OOD on val": [base["peak"] for base in bases],
        "least loss on seen ID questions": [base["least train loss"] for base in bases],
        "least loss on unseen ID questions": [base["least test loss"] for base in bases],
        "end": [results.study.last for _ in bases],
    }
    rows = []
    for rule, steps in rules.items():
        if None not in steps:
            cells = [bracketed(interval(results.at_steps(steps, key))) for key in accuracies(results)]
            rows.append([rule, ", ".join(map(str, steps)), *cells])
    return markdown(["checkpoint", "SFT steps by base", *accuracies(results)], rows)


def rl_table(results: Results) -> str:
    """Every arm from every start, before and after, and its share of what was lost."""
    study, rows = results.study, []
    arms = {name: arm.start for name, arm in study.rl.items()} | {NO_UPDATE: [END]}
    for arm, starts in arms.items():
        for start in starts:
            cells = [arm, named(start)]
            for key in accuracies(results):
                before, after = results.swept(start, key), results.after(arm, start, key)
                cells += [mean(after), told(interval(after - before))]
            steps = _mean_steps(results, arm, start)
            rows.append([*cells, share_restored(results, arm, start), steps, *costs(results, arm, start)])
    header = [text for key in accuracies(results) for text in (key, "minus its start")]
    return markdown(["arm", "from", *header, "R", "optimizer steps", *COSTS.values()], rows)


def share_restored(results: Results, arm: str, start: Start) -> str:
    """R of an arm, and of how many bases; or that there is none."""
    found = restored(results, arm, start)
    if found:
        return f"{told(found[0])} ({found[1]})"
    return UNCLEAR if results.fallen(start) else NO_FALL


def costs(results: Results, arm: str, start: Start) -> list[str]:
    """Questions asked, tokens trained on and FLOPs of an arm, of RL and SFT together, means over bases."""
    found = [base["rl"][f"{arm}/{results.step(base, start)}"].get("costs") for base in results.bases.values()]
    if None in found:
        return ["-"] * len(COSTS)
    totals = {key: np.mean([each["rl"][key] + each["sft"][key] for each in found]) for key in COSTS}
    return [f"{totals['questions']:.0f}", f"{totals['trained_tokens'] / 1e3:.0f} k", f"{totals['flops']:.2e}"]


def slower_table(results: Results) -> str:
    """SFT alone that could forget less: where it has the accuracy of the sweep's end, and at its own end."""
    study, rows = results.study, []
    earlier = results.at_equal_matched(SWEEP, study.ood).values
    peak, end = results.swept(PEAK, study.ood), results.swept(END, study.ood)
    for run in results.slower:
        kept, unseen = (results.at_equal_matched(run, metric) for metric in (study.ood, study.id))
        cells = [mean(kept.gaps), f"{kept.missed}", bracketed(interval(kept.values))]
        cells += [told(interval(values)) for values in (kept.values - end, peak - kept.values)]
        cells += ["" if run == SWEEP else told(interval(kept.values - earlier))]
        cells.append(told(interval(unseen.values - results.swept(END, study.id))))
        rows.append([run, *cells, *(mean(results.swept(END, key, run)) for key in accuracies(results))])
    header = [f"{study.matched} minus the end's", "bases that never have it", "OOD there", "minus the end"]
    header += ["peak minus it", "minus the sweep there", f"{study.id} there, minus the end"]
    last = [f"{key} after {study.last} steps" for key in accuracies(results)]
    return markdown(["SFT", *header, *last], rows)


def floor_table(results: Results) -> str:
    """How large a difference is without any cause: other draws, another seed."""
    rows = []
    for key in accuracies(results):
        end = results.swept(END, key)
        draws = units([_deviation([each["test"][key] for each in base["noise"].values()])
                       for base in results.bases.values()])  # fmt: skip
        rows.append([key, mean(end), mean(draws), mean(np.abs(results.swept(END, key, OTHER_SEED) - end))])
    return markdown(["", "at the end", "sd over draws", "other seed, abs. difference"], rows)


def tries_table(results: Results) -> str:
    """Several tries a question, and the greedy response, before and after the main RL."""
    study, rows = results.study, []
    key = f"{study.ood.rpartition('/')[0]}/pass@{SAMPLES}"
    healed = [(study.main, start) for start in (0, PEAK, END) if start in study.rl[study.main].start]
    for arm, start in [*((SWEPT, start) for start in (0, PEAK, END)), *healed]:
        gain = results.of_tries(arm, start, key) - results.of_tries(SWEPT, start, key)
        cells = [mean(results.of_tries(arm, start, metric)) for metric in metrics_of(study)]
        rows.append([arm, named(start), *cells, told(interval(gain)) if arm != SWEPT else ""])
    return markdown(["", "from", *metrics_of(study), f"{key} minus its start"], rows)


def accuracies(results: Results) -> list[str]:
    """The accuracies of a study."""
    study = results.study
    return [key for key in (study.id_seen, study.id, study.ood) if key]


def _deviation(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def mean(values: Scores) -> str:
    """The mean over bases; a dash if one has none."""
    return number(float(values.mean())) if np.isfinite(values).all() else "-"


def _mean_steps(results: Results, arm: str, start: Start) -> str:
    found = [base["rl"][f"{arm}/{results.step(base, start)}"]["optimizer steps"] for base in results.bases.values()]
    return f"{np.mean(found):.0f}"


def named(start: Start) -> str:
    return {0: "base", PEAK: PEAK, END: END}.get(start, f"step {start}")
