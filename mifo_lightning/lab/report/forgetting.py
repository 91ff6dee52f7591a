"""What did the phases make the models forget, and what predicts it? The sections about retention and KL."""

import re
from collections.abc import Callable

import numpy as np

from mifo_lightning.lab.report import figures
from mifo_lightning.lab.report.document import (
    MARKS,
    Figure,
    Gallery,
    Legend,
    Measure,
    Section,
    Table,
    bracketed,
    ends,
    intervals,
    large,
    means,
    number,
    strips,
)
from mifo_lightning.lab.report.drawing import RL, SFT, keys
from mifo_lightning.lab.report.dynamics import RL_AND_SFT, table
from mifo_lightning.lab.report.reductions import PhaseChange, mean_of, phase_changes, retention, retention_by_phase
from mifo_lightning.lab.report.results import KINDS, Ablation, Kind, probe
from mifo_lightning.lab.report.scores import metrics_table, of_every_run, ranked
from mifo_lightning.lab.report.statistics import rank_correlation

MEANING = {
    "lost": "the probability of an answer that is right before and wrong after, less what sampling alone turns round",
    "gained": "the same of wrong before and right after",
    "before": "the share right before training",
    "after": "the share right after it",
    "floor": "what sampling alone turns from right to wrong",
    "kl": "the KL from the initial to the trained model in nats a token, along responses of the initial one",
    "kl_floor": "that of the initial model to itself, computed in other batches",
    "kl_to_": "that of the initial model to another one",
    "kl_from_": "that of another model to the trained one",
}
"""What the monitor retention finds, by its name or the beginning of it."""


PLASTICITY = {"groups with signal": "groups_with_signal", "gradient norm": "grad_norm"}
"""What the monitor retention records of an RL phase, by the name of a column."""


def old_abilities(ablation: Ablation) -> Section | None:
    """What the monitor retention found, where metrics of the ablation name it."""
    if not ablation.of_retention:
        return None
    order = ranked(intervals(ablation, ablation.scores(ablation.primary)))
    names = {metric: metric.removeprefix("retention/") for metric in ablation.of_retention}
    told = "; ".join(f"{name}: {what}" for name, what in MEANING.items() if any(map(_means(name), names.values())))
    text = [f"The end of each run against its beginning, by the monitor retention at T = 1. {told}."]
    pictures = [of_every_run(ablation, metric, order) for metric in names]
    found = metrics_table(ablation, order, names, "Old abilities")
    return Section("What became of abilities that were not trained?", [], text, [found, Gallery(pictures)])


def plasticity(ablation: Ablation) -> Section | None:
    """Whether RL still learns after SFT, where metrics of the ablation name the monitor that says it."""
    if not ablation.of_retention:
        return None
    columns: dict[str, Measure] = {"SFT steps before": _plasticity("after_sft_steps", True)}
    for when, after in {"after SFT": True, "at first": False}.items():
        columns |= {f"{name} {when}": _plasticity(key, after) for name, key in PLASTICITY.items()}
    if not (found := {name: one for name, one in columns.items() if means(ablation, one)}):
        return None
    text = (
        "Means over the first RL steps of a phase, eight at most, of RL phases that come after SFT steps and of those "
        "that come first: the share of groups whose rewards are not all alike, from which alone RL learns, and the "
        "norm of its gradient before clipping."
    )
    return Section("Does RL still learn after SFT?", [], [text], [table("Mean of a phase", ablation, found)])


def _plasticity(key: str, after: bool) -> Measure:
    """A mean over the RL phases of a run that come after SFT steps, or over those that do not."""
    return lambda cell: mean_of([p for p in cell.phases("retention", "rl") if (p["after_sft_steps"] > 0) == after], key)


def _means(name: str) -> Callable[[str], bool]:
    """Whether a key of `MEANING` is that of a metric, ahead of whose last part a source may stand."""
    whole = re.compile(rf"(.*/)?{re.escape(name)}{'.*' if name.endswith('_') else ''}")
    return lambda metric: whole.fullmatch(metric) is not None


def forgetting(ablation: Ablation) -> Section:
    """Retention of solved questions over the run and per phase."""
    question = "What was forgotten?"
    if not ablation.recorded("forgetting"):
        return Section(question, monitor="forgetting")
    sources = sorted({s for cell in ablation.cells for s in cell.summary.get("forgetting", {}).get("run", {})})
    whole = means(ablation, _retained())
    answer = [f"Of the questions solved before training, {ends(whole)} are still solved after it."] if whole else []
    text = (
        f"Retention is the share of the questions solved before that are still solved after, by {probe(ablation)}. "
        "A dash: there was no such phase, no question of that source was solved before, or a run is missing. A low "
        "value of a source that was hardly solved yet rests on few questions."
    )
    tables = [_run_table(ablation, sources), *(_phase_table(ablation, sources, kind) for kind in KINDS)]
    pictures = []
    for label, measure in (("over the run", _retained()), ("over an SFT phase", _retained_per_phase("sft"))):
        rows = strips(ablation, {"": measure})
        if rows:
            title = f"retention {label}, all sources"
            pictures.append(Figure(figures.dots(title, rows, title, bold=ablation.reference), MARKS))
    return Section(question, answer, [text], [*filter(None, tables), Gallery(pictures), *_by_phase(ablation, sources)])


def _run_table(ablation: Ablation, sources: list[str]) -> Table:
    columns = {"all sources": _retained(), **{source: _retained(source) for source in sources}}
    scores = [{arm: ablation.grid(arm, measure) for arm in ablation.names} for measure in columns.values()]
    found = [intervals(ablation, one) for one in scores]
    rows = [[arm, *(bracketed(column[arm]) for column in found)] for arm in ablation.names]
    return Table("Retention over the whole run, mean over runs [95 % interval]", ["arm", *columns], rows)


def _phase_table(ablation: Ablation, sources: list[str], kind: Kind) -> Table | None:
    """Retention over phases of one kind, beside how many and how long they were; None if there were none."""
    numbers: dict[str, Measure] = {
        "phases in a run": lambda cell: float(len(cell.phases("forgetting", kind))) or None,
        "steps in a phase": lambda cell: mean_of(cell.phases("layer_updates", kind), "steps"),
    }
    shares = {"all sources": _retained_per_phase(kind)}
    shares |= {source: _retained_per_phase(kind, source) for source in sources}
    lengths = {name: found for name, measure in numbers.items() if (found := means(ablation, measure))}
    kept = {name: means(ablation, measure) for name, measure in shares.items()}
    if "phases in a run" not in lengths:
        return None
    rows = [
        [arm, *(large(found.get(arm, np.nan)) for found in lengths.values()),
         *(number(found.get(arm, np.nan)) for found in kept.values())]
        for arm in ablation.names
    ]  # fmt: skip
    return Table(f"Retention over an {kind.upper()} phase, mean over runs", ["arm", *lengths, *kept], rows)


def _by_phase(ablation: Ablation, sources: list[str]) -> list[Gallery]:
    """A panel per arm with more than one SFT phase."""
    panels = []
    for arm in ablation.names:
        by_source = {source: retention_by_phase(ablation.done(arm), source) for source in sources}
        if max(map(len, by_source.values()), default=0) > 1:
            title = f"Retention by SFT phase of {arm}"
            panels.append(Figure(figures.retention(title, arm, by_source)))
    text = (
        "Retention over the first, second, ... SFT phase, of all runs together; a point is left out where fewer than "
        "half of the runs had a solved question to lose."
    )
    return [Gallery(panels, [Legend("Sources", keys(sources))], [text], "small")] if panels else []


def divergence(ablation: Ablation) -> Section:
    """Forward KL of each phase and whether it predicts forgetting."""
    question = "How far did each phase move the policy, and does that predict forgetting?"
    if not ablation.recorded("phase_kl"):
        return Section(question, monitor="phase_kl")

    def kl(kind: Kind) -> Measure:
        return lambda cell: mean_of(cell.phases("phase_kl", kind), "kl")

    label = "forward KL of a phase, nats per token"
    rows = strips(ablation, {RL: kl("rl"), SFT: kl("sft")})
    pictures = [Figure(figures.dots(label, rows, label, log=True, bold=ablation.reference), MARKS)]
    by_arm = {arm: phase_changes(ablation.done(arm)) for arm in ablation.names}
    correlations = _correlations(by_arm)
    text = ["Forward KL(before || after) of a phase on training prompts of RL."]
    shown = {kind.upper(): found for kind in KINDS if (found := means(ablation, kl(kind)))}
    answer = [f"The forward KL of an {kind} phase is {ends(found)} nats per token." for kind, found in shown.items()]
    if not correlations.rows:
        return Section(question, answer, text, [Gallery(pictures, [RL_AND_SFT])])
    text.append(
        "A rank correlation over the phases of all arms mixes in that arms have phases of different length; the mean "
        "of the correlations within each arm does so less. Phases of one run are not independent, so no interval is "
        "given."
    )
    changes = [change for found in by_arm.values() for change in found]
    pictures.append(
        Figure(figures.scatter("KL and forgetting", changes, "kl", label), "A point is a phase; all are shown.")
    )
    if np.isfinite([change.l2 for change in changes]).any():
        title = "L2 norm of a phase's update"
        pictures.append(Figure(figures.scatter("Update size and forgetting", changes, "l2", title)))
    return Section(question, answer, text, [correlations, Gallery(pictures, [RL_AND_SFT])])


def _correlations(by_arm: dict[str, list[PhaseChange]]) -> Table:
    """Of the share lost with KL and with update size: over all phases of a kind, and the mean of those of each arm."""
    rows = []
    for kind in KINDS:
        arms = [[c for c in changes if c.kind == kind] for changes in by_arm.values()]
        pooled = [change for changes in arms for change in changes]
        row = [f"{kind.upper()} phases", str(len(pooled))]
        for x in ("kl", "l2"):
            overall, *within = (
                rank_correlation([getattr(c, x) for c in changes], [c.lost for c in changes])
                for changes in (pooled, *arms)
            )
            there = [value for value in within if np.isfinite(value)]
            inside = f"{number(float(np.mean(there)))} ({len(there)} arms)" if there else "-"
            row += [number(overall), inside]
        rows += [row] if pooled else []
    names = ("forward KL", "L2 norm of the update")
    header = ["", "number", *(f"with {name}, {how}" for name in names for how in ("all arms", "mean within an arm"))]
    return Table("Rank correlation of the share of solved questions that a phase lost", header, rows)


def _retained(source: str | None = None) -> Measure:
    return lambda cell: retention([cell.summary.get("forgetting", {}).get("run", {})], source)


def _retained_per_phase(kind: Kind, source: str | None = None) -> Measure:
    return lambda cell: retention([phase["sources"] for phase in cell.phases("forgetting", kind)], source)
