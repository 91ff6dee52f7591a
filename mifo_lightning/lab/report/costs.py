"""What did the arms cost? The section about data, tokens, floating-point operations and seconds."""

from mifo_lightning.lab.report.document import Measure, Section, ends, means
from mifo_lightning.lab.report.dynamics import table
from mifo_lightning.lab.report.results import KINDS, Ablation, Cell, Kind

SMALL = 0.1
"""Callbacks that take fewer seconds in every arm are summed."""


def costs(ablation: Ablation) -> Section:
    """Data, tokens, floating-point operations and seconds."""
    question = "What did it cost?"
    if not any("costs" in cell.summary for cell in ablation.cells):
        return Section(question, monitor="costs")
    columns: dict[str, Measure] = {
        "questions": lambda cell: cell.summary.get("costs", {}).get("distinct_questions"),
        "demonstrations": lambda cell: cell.summary.get("costs", {}).get("distinct_demonstrations"),
        "tokens generated": _account("generated_tokens", *KINDS),
        "scored": _account("scored_tokens", *KINDS),
        "trained": _account("trained_tokens", *KINDS),
        "FLOPs RL": _account("flops", "rl"),
        "FLOPs SFT": _account("flops", "sft"),
        "steps RL": _account("optimizer_steps", "rl"),
        "steps SFT": _account("optimizer_steps", "sft"),
        "seconds RL": _account("seconds", "rl"),
        "seconds SFT": _account("seconds", "sft"),
        "seconds of the run": lambda cell: cell.seconds,
    }
    columns = {name: measure for name, measure in columns.items() if any(means(ablation, measure).values())}
    caption = "Mean of a run; questions and demonstrations are distinct ones"
    tables = [table(caption, ablation, columns)]
    callbacks = _callbacks(ablation)
    if callbacks:
        caption = f"Seconds of a run by group of the configuration, mean; other: below {SMALL} s in every arm"
        tables.append(table(caption, ablation, callbacks, folded=True))
    text = (
        "k, M, G, T: 10^3, 10^6, 10^9, 10^12. FLOPs: 2 per weight and token forwarded, 6 per weight and token trained. "
        "Seconds depend on what else ran on the machine."
    )
    return Section(question, _range(ablation), [text], [*tables])


def _range(ablation: Ablation) -> list[str]:
    """FLOPs of the cheapest and the dearest arm."""
    flops = means(ablation, _account("flops", *KINDS))
    whole = flops.get(ablation.reference)
    if not whole:
        return []
    return [
        f"A run took {ends({arm: value / whole for arm, value in flops.items()})} times the FLOPs of one of the "
        f"reference {ablation.reference!r}."
    ]


def _callbacks(ablation: Ablation) -> dict[str, Measure]:
    """Seconds of each callback by its name in a configuration, the small ones as one."""
    recorded = {name for cell in ablation.cells for name in cell.summary.get("costs", {}).get("callbacks", {})}
    if not recorded:
        return {}
    from mifo_lightning.cli.parts import METHOD, MONITORS  # loads torch, which nothing else here needs

    keys = {callback.__name__: key for key, callback in {**METHOD, **MONITORS}.items()}
    small = {n for n in recorded if max(means(ablation, _seconds([n])).values(), default=0.0) < SMALL}
    columns = {keys.get(name, name): _seconds([name]) for name in sorted(recorded - small)}
    return {**columns, **({"other": _seconds(sorted(small))} if small else {})}


def _account(key: str, *kinds: Kind) -> Measure:
    return lambda cell: sum(cell.cost(kind, key) for kind in kinds)


def _seconds(names: list[str]) -> Measure:
    def measure(cell: Cell) -> float | None:
        found = cell.summary.get("costs", {}).get("callbacks", {})
        there = [found[name] for name in names if name in found]
        return sum(there) if there else None

    return measure
