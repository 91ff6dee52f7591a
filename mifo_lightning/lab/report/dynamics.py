"""How did the arms learn, and what moved? The sections about learning curves, updates and frozen weights."""

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
    ends,
    large,
    means,
    number,
    strips,
)
from mifo_lightning.lab.report.drawing import INK, PALETTE, RL, SFT, Key, keys
from mifo_lightning.lab.report.reductions import layer_means, learning_curves, mean_of, update_norm
from mifo_lightning.lab.report.results import KINDS, Ablation, Cell, Kind, probe

RL_AND_SFT = Legend("Phases", [Key("RL", RL), Key("SFT", SFT)])
CONSTANT = 0.005
"""Shares that differ by no more are the same."""


def learning(ablation: Ablation) -> Section:
    """Learning curves."""
    question = "How did they learn?"
    whole = [arm for arm in ablation.names if all(cell.history for cell in ablation.done(arm))]
    drawn = {arm: data for arm in whole if (data := learning_curves(ablation.done(arm)))}
    absent = [repr(arm) for arm in ablation.names if arm not in whole]
    left = f"Not drawn, since some of their runs have no history here: {', '.join(absent)}." if absent else ""
    if not drawn and any(cell.history for arm in ablation.names for cell in ablation.done(arm)):
        return Section(question, text=[left])
    if not drawn:
        return Section(question, monitor="history")
    last = {
        axis: max((c.edges[-1] for c in drawn.values() if c.axis == axis), default=0) for axis in ("rl_step", "step")
    }
    pictures = [
        Figure(figures.curves(f"Learning curves of {arm}", arm, data, float(last[data.axis])))
        for arm, data in drawn.items()
    ]
    text = (
        f"Means over the runs of an arm. Reward is that of the rollouts, which are sampled; the accuracies are of "
        f"{probe(ablation)}. A mark is where at least half of the runs were measured; between marks lines are "
        "straight, and dashed where two measurements are more than a quarter of the run apart. Shaded where runs had "
        "an SFT phase after that RL step: the stronger, the more runs."
    )
    sources = sorted({source for data in drawn.values() for source in data.accuracy})
    legend = Legend("Share correct, and reward", [*keys(sources), Key("reward", INK)])
    text += f" {left}" if left else ""
    ended = {arm: float(x[np.isfinite(x)][-1]) for arm, d in drawn.items() if np.isfinite(x := d.reward).any()}
    answer = [f"The mean reward of the last rollouts is {ends(ended)}."] if ended else []
    return Section(question, answer, blocks=[Gallery(pictures, [legend], [text], "small")])


def updates(ablation: Ablation) -> Section:
    """Size of the updates by layer and kind of phase."""
    question = "How large were the updates, and where?"
    if not ablation.recorded("layer_updates"):
        return Section(question, monitor="layer_updates")

    def sizes(kind: Kind) -> dict[str, Measure]:
        def length(cell: Cell) -> float | None:
            found = [update_norm(phase) for phase in cell.phases("layer_updates", kind)]
            return float(np.mean(found)) if found else None

        return {"steps": lambda cell: mean_of(cell.phases("layer_updates", kind), "steps"), "L2 norm": length}

    columns = {f"{kind.upper()}: {name}": measure for kind in KINDS for name, measure in sizes(kind).items()}
    label = "L2 norm of a phase's update, all weights"
    rows = strips(ablation, {RL: sizes("rl")["L2 norm"], SFT: sizes("sft")["L2 norm"]})
    picture = Figure(figures.dots(label, rows, label, log=True, bold=ablation.reference), MARKS)
    found = {kind.upper(): means(ablation, sizes(kind)["L2 norm"]) for kind in KINDS}
    answer = [
        f"The L2 norm of the update of an {kind} phase is {ends(norms)} on average." for kind, norms in found.items()
        if norms
    ]  # fmt: skip
    text = (
        "What a phase did to the weights: the L2 norm of their change, which grows with the number of weights and of "
        "steps, so that parts of different size and phases of different length are not alike."
    )
    panels, constant = _layers(ablation)
    by_layer = Gallery(panels, [RL_AND_SFT], kind="small")
    sizes_table = table("Mean of a phase", ablation, columns)
    blocks: list[Table | Gallery] = [sizes_table, Gallery([picture], [RL_AND_SFT]), by_layer]
    return Section(question, answer, [text, *constant], blocks)


def _layers(ablation: Ablation) -> tuple[list[Figure], list[str]]:
    """A panel per arm, and a sentence on the changed shares that are the same in all layers, in place of a picture."""
    layers = {
        arm: {kind: found for kind in KINDS if (found := layer_means(ablation.done(arm), kind))}
        for arm in ablation.names
    }
    norms = [l2 for by_kind in layers.values() for groups in by_kind.values() for l2, _ in groups.values()]
    span = min((l2 for l2 in norms if l2 > 0), default=0.0), max(norms)
    panels, constant = [], dict[tuple[str, Kind], list[str]]()
    for arm, by_kind in layers.items():
        shares = {kind: [share for _, share in groups.values()] for kind, groups in by_kind.items()}
        same = all(max(values) - min(values) <= CONSTANT for values in shares.values())
        if shares:
            panels.append(Figure(figures.layers(f"Update by layer of {arm}", arm, by_kind, span, not same)))
        for kind, values in shares.items() if same else ():
            constant.setdefault((number(float(np.mean(values))), kind), []).append(repr(arm))
    listed = [f"{share} in {kind.upper()} phases of {', '.join(arms)}" for (share, kind), arms in constant.items()]
    text = "The share of weights that a phase changed is the same in all layers: "
    return panels, [f"{text}{'; '.join(listed)}."] if listed else []


def overlap(ablation: Ablation) -> Section:
    """Share of the SFT gradient on frozen coordinates, against chance."""
    question = "Does freezing hold what SFT wants to move?"
    if not ablation.recorded("overlap"):
        return Section(question, monitor="overlap")
    names = {
        "frozen": "chance (share of coordinates frozen)",
        "gradient": "L1 mass",
        "gradient_squared": "squared mass",
    }
    colors = dict(zip(names, (INK, *PALETTE), strict=False))
    rows = strips(ablation, {color: _overlap(key) for key, color in colors.items()})
    label = "share of SFT's gradient on frozen coordinates"
    picture = Figure(figures.dots(label, rows, label, bold=ablation.reference), MARKS)
    found = [means(ablation, _overlap(key)) for key in names]  # of the runs that had an SFT phase
    cells = [[arm, *(number(of.get(arm, np.nan)) for of in found)] for arm in rows]
    held = "; ".join(f"{arm!r} {share} (chance {chance})" for arm, chance, share, _ in cells)
    answer = [f"Of the L1 mass of SFT's gradient, this share was on frozen coordinates: {held}."]
    text = (
        "Share of the gradient of SFT steps that fell on frozen coordinates, before it was masked. Above chance, "
        "freezing stops more of SFT than a random choice would. Runs without an SFT phase are in no mean."
    )
    legend = Legend("Measured", [Key(name, colors[key]) for key, name in names.items()])
    shown = Table("Mean over SFT phases and runs", ["arm", *names.values()], cells)
    return Section(question, answer, [text], [shown, Gallery([picture], [legend])])


def table(caption: str, ablation: Ablation, columns: dict[str, Measure], folded: bool = False) -> Table:
    """Means over runs, a column for each measure."""
    found = [means(ablation, measure) for measure in columns.values()]
    rows = [[arm, *(large(column.get(arm, np.nan)) for column in found)] for arm in ablation.names]
    return Table(caption, ["arm", *columns], rows, folded)


def _overlap(key: str) -> Measure:
    return lambda cell: mean_of(cell.phases("overlap"), key)
