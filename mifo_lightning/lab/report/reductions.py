"""What did the records of the runs come to? Learning curves, retention and sizes of phases, over the runs of an arm."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mifo_lightning.lab.report.results import Cell, Kind, Record
from mifo_lightning.lab.report.statistics import Scores

Axis = Literal["rl_step", "step"]
REWARD = "rollout/reward"


@dataclass(frozen=True)
class Curves:
    """Means over the runs of an arm at `edges` of equal bins of RL steps (or optimizer steps: `axis`), float64 [edges].

    `edges[0]` is one bin before the start; `accuracy` is by source, of greedy responses to held-out questions; `sft` is
    the share of runs with an SFT phase in the bin that ends there, `measured` that of runs with accuracies measured in
    it, `far` that of runs for which it lies between two measurements more than a quarter of the run apart.
    """

    axis: Axis
    edges: Scores
    reward: Scores
    accuracy: dict[str, Scores]
    sft: Scores
    measured: Scores
    far: Scores


@dataclass(frozen=True)
class PhaseChange:
    """What one phase did: forward KL in nats per token, share of solved questions it lost, L2 norm of its update."""

    kind: Kind
    kl: float
    lost: float
    l2: float


def mean_of(records: list[Record], key: str) -> float | None:
    """Mean of a number over records; None without any."""
    return float(np.mean([record[key] for record in records])) if records else None


def retention(records: list[dict[str, Record]], source: str | None = None) -> float | None:
    """Share of the questions solved before that are solved after, over records {source: CELL}; None if none was."""
    counts = [c for record in records for name, c in record.items() if source in (None, name)]
    solved = sum(c["solved"] for c in counts)
    return sum(c["retained"] for c in counts) / solved if solved else None


def retention_by_phase(cells: list[Cell], source: str) -> list[float | None]:
    """Retention in the first, second, ... SFT phase, counts summed over the runs.

    None where fewer than half of the runs had a question to lose; as far as half of them came.
    """
    by_run = [cell.phases("forgetting", "sft") for cell in cells]
    kept: list[float | None] = []
    for i in range(max(map(len, by_run), default=0)):
        counts = [{source: phases[i]["sources"][source]} for phases in by_run if i < len(phases)]
        had = sum(count[source]["solved"] > 0 for count in counts)
        kept.append(retention(counts) if 2 * had >= len(cells) else None)
    while kept and kept[-1] is None:
        kept.pop()
    return kept


def learning_curves(cells: list[Cell], bins: int = 40) -> Curves | None:
    """Reward and accuracies of the runs of an arm over RL steps; None if no run kept a history.

    A reward is the mean of its bin; an accuracy is the last one measured. An arm without RL steps goes by optimizer
    steps.
    """
    histories = [cell.history for cell in cells if cell.history]
    if not histories:
        return None
    axis: Axis = "rl_step" if any(line["rl_step"] for history in histories for line in history) else "step"
    last = max(line[axis] for history in histories for line in history)
    bins = max(1, min(bins, int(last)))
    edges = np.linspace(-last / bins, last, bins + 2)
    names = sorted({key for history in histories for line in history for key in line if _source(key)})
    reward = _mean([_binned(history, axis, edges, REWARD) for history in histories])
    accuracy = {_source(key): _mean([_measured(history, axis, edges, key) for history in histories]) for key in names}
    in_sft = [np.isfinite(_binned([x for x in h if x.get("phase/is_sft")], axis, edges, axis)) for h in histories]
    at = [_points(history, axis, names[0])[0] if names else np.empty(0) for history in histories]
    measured = np.mean([np.histogram(x, [-np.inf, *(edges + 1e-9 * last)])[0] > 0 for x in at], 0)
    far = np.mean([_far(x, edges, last / 4) for x in at], 0)
    return Curves(axis, edges, reward, accuracy, np.mean(in_sft, 0), measured, far)


def phase_changes(cells: list[Cell]) -> list[PhaseChange]:
    """Every phase of which forward KL and forgetting were measured, and where it was, the size of its update."""
    changes = []
    for cell in cells:
        kl, layers = (
            {(p["phase"], p["number"]): p for p in cell.phases(name)} for name in ("phase_kl", "layer_updates")
        )
        for phase in cell.phases("forgetting"):
            key = (phase["phase"], phase["number"])
            kept = retention([phase["sources"]])
            if key in kl and kept is not None:
                l2 = update_norm(layers[key]) if key in layers else np.nan
                changes.append(PhaseChange(phase["phase"], kl[key]["kl"], 1 - kept, l2))
    return changes


def update_norm(phase: Record) -> float:
    """L2 norm of a phase's update of all weights, from a record of `layer_updates`."""
    return float(np.sqrt(sum(layer["l2"] ** 2 for layer in phase["layers"].values())))


def layer_means(cells: list[Cell], kind: Kind) -> dict[str, tuple[float, float]]:
    """By layer group: mean L2 norm and mean changed share of a phase's update, over phases and runs; may be empty."""
    phases = [phase["layers"] for cell in cells for phase in cell.phases("layer_updates", kind)]
    return {
        group: (float(np.mean([p[group]["l2"] for p in phases])), float(np.mean([p[group]["changed"] for p in phases])))
        for group in (phases[0] if phases else {})
    }


def _source(key: str) -> str:
    """The source of `forgetting/<source>/accuracy`, else nothing."""
    inner = key.removeprefix("forgetting/").removesuffix("/accuracy")
    return inner if key == f"forgetting/{inner}/accuracy" else ""


def _points(history: list[Record], axis: str, key: str) -> tuple[Scores, Scores]:
    points = [(line[axis], line[key]) for line in history if key in line and np.isfinite(line[key])]
    x, y = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return x, y


def _binned(history: list[Record], axis: str, edges: Scores, key: str) -> Scores:
    """Mean of the values in (edges[i-1], edges[i]]; NaN where there are none."""
    x, y = _points(history, axis, key)
    where = np.searchsorted(edges + 1e-9 * edges[-1], x, side="left").clip(max=len(edges) - 1)
    counts = np.bincount(where, minlength=len(edges))
    sums = np.bincount(where, weights=y, minlength=len(edges))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _measured(history: list[Record], axis: str, edges: Scores, key: str) -> Scores:
    """Straight lines between measurements; where there are two at once, before and after SFT, the later one counts."""
    x, y = _points(history, axis, key)
    if not x.size:
        return np.full(len(edges), np.nan)
    last = np.searchsorted(x, edges + 1e-9 * edges[-1], side="right").clip(min=1) - 1
    following = np.minimum(last + 1, len(x) - 1)
    span = x[following] - x[last]
    share = ((edges - x[last]) / np.where(span > 0, span, 1.0)).clip(0.0, 1.0) * (span > 0)
    return y[last] + share * (y[following] - y[last])


def _far(x: Scores, edges: Scores, limit: float) -> NDArray[np.bool_]:
    """Whether the middle of the bin before each edge lies between two of `x` that are more than `limit` apart."""
    following = np.searchsorted(x, edges - (edges[1] - edges[0]) / 2)
    inside = (following > 0) & (following < len(x))
    gaps = np.diff(x, prepend=-np.inf, append=np.inf)
    return inside & (gaps[following] > limit)


def _mean(rows: list[Scores]) -> Scores:
    """Mean over runs, without those that have no value there."""
    values = np.array(rows)
    counts = np.isfinite(values).sum(0)
    return np.where(counts > 0, np.nansum(values, 0) / np.maximum(counts, 1), np.nan)
