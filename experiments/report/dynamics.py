"""How did the arms learn, what did they forget, and what did it cost? The sections about what monitors recorded."""

from collections.abc import Callable, Mapping

import numpy as np

from experiments.report import figures
from experiments.report.document import Figure, Section, Table, absent, intervals, large, mean, number
from experiments.report.results import (
    KINDS,
    Ablation,
    Cell,
    Kind,
    layer_means,
    learning_curves,
    mean_of,
    phase_changes,
    retention,
    retention_by_phase,
    update_norm,
)
from experiments.report.sections import MARKS
from experiments.report.statistics import rank_correlation

Measure = Callable[[Cell], float | None]
RL_AND_SFT = [figures.Key("RL phases", figures.RL), figures.Key("SFT phases", figures.SFT)]


def learning(ablation: Ablation) -> Section:
    """Learning curves."""
    question = "How did they learn?"
    drawn = {arm: data for arm in ablation.names if (data := learning_curves(ablation.done(arm)))}
    if not drawn:
        return absent(question, "history")
    last = {
        axis: max((c.edges[-1] for c in drawn.values() if c.axis == axis), default=0) for axis in ("rl_step", "step")
    }
    pictures = [
        Figure(figures.curves(f"Learning curves of {arm}", arm, data, float(last[data.axis])))
        for arm, data in drawn.items()
    ]
    text = (
        "Means over the runs of an arm. Reward is that of the rollouts; the accuracies are of greedy responses to a "
        "fixed set of questions, measured at every change of phase, with straight lines between (from start to end "
        "where there is no change). Shaded where runs had an SFT phase after that RL step: the stronger, the more runs."
    )
    sources = sorted({source for data in drawn.values() for source in data.accuracy})
    legend = [figures.Key("reward", figures.INK), *figures.keys(sources)]
    return Section(question, [text], legend=legend, panels=pictures)


def forgetting(ablation: Ablation) -> Section:
    """Retention of solved questions per SFT phase and over the run."""
    question = "What did each phase forget?"
    if not ablation.recorded("forgetting"):
        return absent(question, "forgetting")
    sources = sorted({s for cell in ablation.cells for s in cell.summary.get("forgetting", {}).get("run", {})})

    columns = {f"SFT phase: {source}": _retained_per_phase(source) for source in sources}
    columns |= {f"run: {source}": _retained(source) for source in sources}
    rows = [[arm, *(mean(ablation.grid(arm, measure)) for measure in columns.values())] for arm in ablation.names]
    text = (
        "Retention is the share of the questions solved before that are still solved after, by greedy responses to a "
        "fixed set of questions: over one SFT phase, or over the whole run."
    )
    pictures, panels = [], []
    for label, measure in (("over an SFT phase", _retained_per_phase()), ("over the run", _retained())):
        strips = _strips(ablation, {"": measure})
        if strips:
            title = f"retention {label}, all sources"
            pictures.append(Figure(figures.dots(title, strips, title, bold=ablation.reference), MARKS))
    for arm in ablation.names:
        by_source = {source: retention_by_phase(ablation.done(arm), source) for source in sources}
        if any(by_source.values()):
            title = f"Retention by SFT phase of {arm}"
            panels.append(Figure(figures.retention(title, arm, by_source)))
    tables = [Table("Mean retention", ["arm", *columns], rows)]
    return Section(question, [text], tables, figures.keys(sources), pictures, panels)


def divergence(ablation: Ablation) -> Section:
    """Forward KL of each phase and whether it predicts forgetting."""
    question = "How far did each phase move the policy, and does that predict forgetting?"
    if not ablation.recorded("phase_kl"):
        return absent(question, "phase_kl")

    def kl(kind: Kind) -> Measure:
        return lambda cell: mean_of(cell.phases("phase_kl", kind), "kl")

    label = "forward KL of a phase, nats per token"
    strips = _strips(ablation, {figures.RL: kl("rl"), figures.SFT: kl("sft")})
    pictures = [Figure(figures.dots(label, strips, label, log=True, bold=ablation.reference), MARKS)]
    text = ["Forward KL(before || after) of a phase on RL prompts, mean over the phases of a run."]
    changes = [change for arm in ablation.names for change in phase_changes(ablation.done(arm))]
    sft = [change for change in changes if change.kind == "sft"]
    if sft:
        lost = [change.lost for change in sft]
        by_kl = rank_correlation([change.kl for change in sft], lost)
        by_l2 = rank_correlation([change.l2 for change in sft], lost)
        text.append(
            f"Over {len(sft)} SFT phases of all arms the rank correlation of the share of solved questions lost is "
            f"{number(by_kl)} with forward KL and {number(by_l2)} with the L2 norm of the update. "
            "Phases of one run are not independent, so no interval is given."
        )
        pictures.append(Figure(figures.scatter("KL and forgetting", changes, "kl", label), "A point is a phase."))
        if np.isfinite([change.l2 for change in changes]).any():
            title = "L2 norm of a phase's update"
            pictures.append(Figure(figures.scatter("Update size and forgetting", changes, "l2", title)))
    return Section(question, text, [], RL_AND_SFT, pictures)


def updates(ablation: Ablation) -> Section:
    """Size of the updates by layer and kind of phase."""
    question = "How large were the updates, and where?"
    if not ablation.recorded("layer_updates"):
        return absent(question, "layer_updates")

    def sizes(kind: Kind) -> dict[str, Measure]:
        def length(cell: Cell) -> float | None:
            found = [update_norm(phase) for phase in cell.phases("layer_updates", kind)]
            return float(np.mean(found)) if found else None

        return {"steps": lambda cell: mean_of(cell.phases("layer_updates", kind), "steps"), "L2 norm": length}

    label = "L2 norm of a phase's update, all weights"
    strips = _strips(ablation, {figures.RL: sizes("rl")["L2 norm"], figures.SFT: sizes("sft")["L2 norm"]})
    pictures = [Figure(figures.dots(label, strips, label, log=True, bold=ablation.reference), MARKS)]
    layers = {
        arm: {kind: found for kind in KINDS if (found := layer_means(ablation.done(arm), kind))}
        for arm in ablation.names
    }
    norms = [l2 for by_kind in layers.values() for groups in by_kind.values() for l2, _ in groups.values()]
    ends = min((l2 for l2 in norms if l2 > 0), default=0.0), max(norms)
    panels = [
        Figure(figures.layers(f"Update by layer of {arm}", arm, by_kind, ends))
        for arm, by_kind in layers.items()
        if by_kind
    ]
    columns = {f"{kind.upper()}: {name}": measure for kind in KINDS for name, measure in sizes(kind).items()}
    table = _table("Mean of a phase", ablation, columns)
    text = "What a phase did to the weights: L2 norm of their change and share of entries that changed at all."
    return Section(question, [text], [table], RL_AND_SFT, pictures, panels)


def overlap(ablation: Ablation) -> Section:
    """Share of the SFT gradient on frozen coordinates, against chance."""
    question = "Does freezing hold what SFT wants to move?"
    if not ablation.recorded("overlap"):
        return absent(question, "overlap")
    names = {
        "frozen": "chance (share of coordinates frozen)",
        "gradient": "L1 mass",
        "gradient_squared": "squared mass",
    }
    colors = dict(zip(names, (figures.INK, *figures.PALETTE), strict=False))
    measures = {color: _overlap(key) for key, color in colors.items()}
    strips = _strips(ablation, measures)
    label = "share of SFT's gradient on frozen coordinates"
    picture = Figure(figures.dots(label, strips, label, bold=ablation.reference), MARKS)
    rows = [[arm, *(number(s.interval.mean) for s in row)] for arm, row in strips.items()]
    text = (
        "Share of the gradient of SFT steps that fell on frozen coordinates, before it was masked. Above chance, "
        "freezing stops more of SFT than a random choice would."
    )
    table = Table("Mean over SFT phases and runs", ["arm", *names.values()], rows)
    return Section(question, [text], [table], [figures.Key(n, colors[k]) for k, n in names.items()], [picture])


def costs(ablation: Ablation) -> Section:
    """Data, tokens, floating-point operations and seconds."""
    question = "What did it cost?"
    if not any("costs" in cell.summary for cell in ablation.cells):
        return absent(question, "costs")

    def account(key: str, *kinds: Kind) -> Measure:
        return lambda cell: sum(cell.summary["costs"][kind][key] for kind in kinds) if "costs" in cell.summary else None

    columns: dict[str, Measure] = {
        "questions": lambda cell: cell.summary.get("costs", {}).get("distinct_questions"),
        "demonstrations": lambda cell: cell.summary.get("costs", {}).get("distinct_demonstrations"),
        "tokens generated": account("generated_tokens", *KINDS),
        "scored": account("scored_tokens", *KINDS),
        "trained": account("trained_tokens", *KINDS),
        "FLOPs RL": account("flops", "rl"),
        "FLOPs SFT": account("flops", "sft"),
        "steps RL": account("optimizer_steps", "rl"),
        "steps SFT": account("optimizer_steps", "sft"),
        "seconds RL": account("seconds", "rl"),
        "seconds SFT": account("seconds", "sft"),
        "seconds of the run": lambda cell: cell.seconds,
    }
    names = sorted({name for cell in ablation.cells for name in cell.summary.get("costs", {}).get("callbacks", {})})
    callbacks = {name: _callback(name) for name in names}
    tables = [_table("Mean of a run; questions and demonstrations are distinct ones", ablation, columns)]
    if callbacks:
        tables.append(_table("Seconds of a run by callback, mean", ablation, callbacks))
    text = (
        "k, M, G, T: 10^3, 10^6, 10^9, 10^12. FLOPs: 2 per weight and token forwarded, 6 per weight and token trained."
    )
    return Section(question, [text], tables)


def _retained(source: str | None = None) -> Measure:
    return lambda cell: retention([cell.summary.get("forgetting", {}).get("run", {})], source)


def _retained_per_phase(source: str | None = None) -> Measure:
    return lambda cell: retention([phase["sources"] for phase in cell.phases("forgetting", "sft")], source)


def _overlap(key: str) -> Measure:
    return lambda cell: mean_of(cell.phases("overlap"), key)


def _callback(name: str) -> Measure:
    return lambda cell: cell.summary.get("costs", {}).get("callbacks", {}).get(name)


def _table(caption: str, ablation: Ablation, columns: Mapping[str, Measure]) -> Table:
    rows = []
    for arm in ablation.names:
        grids = [ablation.grid(arm, measure) for measure in columns.values()]
        rows.append([arm, *(large(float(np.nanmean(g))) if np.isfinite(g).any() else "-" for g in grids)])
    return Table(caption, ["arm", *columns], rows)


def _strips(ablation: Ablation, measures: Mapping[str, Measure]) -> dict[str, list[figures.Strip]]:
    """A line per arm and measure in its colour (by base if that is empty); without the arms that have no value."""
    rows: dict[str, list[figures.Strip]] = {arm: [] for arm in ablation.names}
    for color, measure in measures.items():
        scores = {arm: ablation.grid(arm, measure) for arm in ablation.names}
        for arm, found in intervals(ablation, scores).items():
            rows[arm].append(figures.Strip(scores[arm], found, color or None))
    return {arm: row for arm, row in rows.items() if any(np.isfinite(strip.interval.mean) for strip in row)}
