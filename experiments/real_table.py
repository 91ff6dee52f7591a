"""The table of `experiments.real`: accuracy, truncation and length before and after, with their standard errors."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FITS = {"cold": "the cold start (SFT on one operation)", "mifo": "MIFO"}
METRICS: dict[str, Callable[[dict[str, Any]], float]] = {
    "accuracy": lambda row: float(row["reward"] >= 1),
    "truncated": lambda row: float(row["truncated"]),
    "tokens": lambda row: float(row["length"]),
}
NOISE = 2.0  # standard errors that a change must exceed to be called one


class Mean(NamedTuple):
    """A mean with its standard error."""

    value: float
    error: float

    def text(self, digits: int, sign: str = "") -> str:
        """`0.331 ± 0.042`."""
        return f"{self.value:{sign}.{digits}f} ± {self.error:.{digits}f}"


def mean(values: Sequence[float]) -> Mean:
    """The mean of at least two values, and the deviation of one over the root of their number."""
    return Mean(statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5)


def responses(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The graded responses of the first and of the last evaluation of a fit, in the same order of questions."""
    lines = (run / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [row for row in map(json.loads, filter(None, lines)) if row["stage"] == "val"]
    first, last = min(row["step"] for row in rows), max(row["step"] for row in rows)
    return [row for row in rows if row["step"] == first], [row for row in rows if row["step"] == last]


def rows_of(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Lines of the table, a source and metric each, and what its change of accuracy amounts to."""
    lines, verdicts = [], []
    for source in dict.fromkeys(row["source"] for row in before):
        pairs = [(b, a) for b, a in zip(before, after, strict=True) if b["source"] == source]
        for metric, of in METRICS.items():
            digits = 1 if metric == "tokens" else 3
            values = [(of(b), of(a)) for b, a in pairs]
            change = mean([a - b for b, a in values])
            cells = (mean([b for b, _ in values]).text(digits), mean([a for _, a in values]).text(digits))
            lines.append(
                f"| {source} | {metric} | {len(pairs)} | {cells[0]} | {cells[1]} | {change.text(digits, '+')} |"
            )
            if metric == "accuracy":
                verdicts.append(f"{source} {change.text(digits, '+')}, {verdict(change)}")
    return lines, verdicts


def verdict(change: Mean) -> str:
    """Whether a change exceeds its noise."""
    if abs(change.value) <= NOISE * change.error or change.value == 0:
        return f"within {NOISE:g} standard errors: not told from noise"
    return "more than noise" if change.value > 0 else "a loss, more than noise"


def cost_lines(costs: Sequence[Mapping[str, Any]]) -> list[str]:
    """CPU minutes, minutes by the clock and peak memory of each step, and of all."""
    lines = ["| step | CPU minutes | minutes | peak GiB |", "|---|---|---|---|"]
    for step in dict.fromkeys(cost["step"] for cost in costs):
        own = [cost for cost in costs if cost["step"] == step]
        lines.append(_cost_line(step, own))
    return [*lines, _cost_line("all", costs)]


def _cost_line(name: str, costs: Sequence[Mapping[str, Any]]) -> str:
    cpu, wall = (sum(cost[key] for cost in costs) / 60 for key in ("cpu", "wall"))
    return f"| {name} | {cpu:.1f} | {wall:.1f} | {max(cost['peak'] for cost in costs):.1f} |"


def table(out: Path, costs: Sequence[Mapping[str, Any]]) -> str:
    """The whole report of both fits under `out`.

    Args:
        out: Holds `cold` and `mifo`.
        costs: Of the steps: step, cpu and wall in seconds, peak in GiB.
    """
    text: list[str] = []
    for name, title in FITS.items():
        summary = json.loads((out / name / "summary.json").read_text(encoding="utf-8"))
        lines, verdicts = rows_of(*responses(out / name))
        text += ["", f"## Before and after {title}", ""]
        text += ["| questions | metric | n | before | after | change |", "|---|---|---|---|---|---|", *lines, ""]
        text += [f"{summary['optimizer_steps']} optimizer steps, {summary['sft_phases']} buffer-triggered SFT phases."]
        text += [f"Change of accuracy: {line}." for line in verdicts]
    text += ["", *(cost_lines(costs) if costs else ["nothing was left to do"])]
    text += [
        "",
        "± is one standard error over questions, of changes over pairs; one response each at temperature 1, one seed.",
    ]
    return "\n".join(
        [*text, "0 of n right is 0.000 ± 0.000 and still allows a rate of 3 / n. words1, words2: one, two operations."]
    )
