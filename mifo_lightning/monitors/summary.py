"""The table at the end: every source before and after, what the monitors found, and where the seconds went."""

import json
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from mifo_callbacks import BufferPhaseSwitch
from mifo_lightning.monitors.activity import METHOD, ActivityProfiler
from mifo_lightning.monitors.run_dir import run_dir


class RunSummary(Callback):
    """Remembers the first and the last validation of a run; `report` prints both and writes `summary.json`.

    The file also holds `callback.summary()` of every callback that has a `summary_key`, under that key. The first
    validation is in the checkpoint, so a resumed run still compares with its true beginning.
    """

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the metrics."""
        values = {k[4:]: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if trainer.sanity_checking or not values:
            return
        self.before = self.before or values
        self.after = values

    def state_dict(self) -> dict[str, Any]:
        """The first validation."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the first validation."""
        self.before = state_dict["before"]

    @rank_zero_only
    def report(self, trainer: Trainer) -> None:
        """Print the table and write `summary.json` into the run's directory."""
        profiler = trainer.profiler  # type: ignore[attr-defined]
        seconds = profiler.by_activity(trainer.callbacks) if isinstance(profiler, ActivityProfiler) else {}  # type: ignore[attr-defined]
        switch = next((c for c in trainer.callbacks if isinstance(c, BufferPhaseSwitch)), None)  # type: ignore[attr-defined]
        monitors = [c for c in trainer.callbacks if hasattr(c, "summary_key")]  # type: ignore[attr-defined]
        record: dict[str, Any] = {
            "before": self.before,
            "after": self.after,
            "optimizer_steps": trainer.global_step,
            "sft_phases": switch.switches if switch else 0,
            "seconds": seconds,
            **{monitor.summary_key: monitor.summary() for monitor in monitors},
        }
        path = run_dir(trainer) / "summary.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1), encoding="utf-8")
        console = Console(width=max(120, Console().width))
        if self.after:
            console.print(before_and_after(self.before, self.after))
        console.print(
            f"{record['optimizer_steps']} optimizer steps, {record['sft_phases']} buffer-triggered SFT phases"
        )
        if "heldout" in record:
            console.print(heldout_line(record["heldout"]["changes"]), highlight=False)
        if seconds:
            console.print(seconds_line(seconds), highlight=False)


def before_and_after(before: dict[str, float], after: dict[str, float], title: str = "before → after") -> Table:
    """One row per source, one column per metric, `before → after` in each cell."""
    rows: dict[str, dict[str, str]] = {}
    for key, value in after.items():
        source, _, metric = key.rpartition("/")
        start = before.get(key)
        digits = 1 if metric.removesuffix("_macro") == "length" else 3
        cell = f"{value:.{digits}f}" if start is None else f"{start:.{digits}f} → {value:.{digits}f}"
        macro = not source and metric.endswith("_macro")
        rows.setdefault(source or ("mean of sources" if macro else "all"), {})[metric.removesuffix("_macro")] = cell
    metrics = list(dict.fromkeys(metric for cells in rows.values() for metric in cells))
    table = Table(title=title)
    table.add_column("source")
    for metric in metrics:
        table.add_column(metric, justify="right")
    for source, cells in rows.items():
        table.add_row(source, *(cells.get(metric, "") for metric in metrics))
    return table


@rank_zero_only
def print_metrics(trainer: Trainer, prefix: str) -> None:
    """Print what `validate` or `test` measured, one row per source."""
    values = {k.removeprefix(prefix): float(v) for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}
    Console(width=max(120, Console().width)).print(before_and_after({}, values, title=prefix.strip("/")))


def heldout_line(changes: dict[str, list[float]]) -> str:
    """How the loss on held-out demonstrations changed, phase by phase."""
    kinds = [
        f"{sum(c < 0 for c in values)} of {len(values)} {kind.upper()} phases lowered it "
        f"(mean {sum(values) / len(values):+.3f})"
        for kind, values in changes.items()
        if values
    ]
    return "loss on held-out demonstrations, nats per token: " + ", ".join(kinds)


def seconds_line(seconds: dict[str, float]) -> str:
    """Seconds by activity in one line, and what MIFO added to the training seconds."""
    own = sum(seconds.get(name, 0.0) for name in METHOD)
    parts = ", ".join(f"{name} {value:.1f}" for name, value in sorted(seconds.items(), key=lambda x: -x[1]))
    share = own / max(seconds.get("training", 0.0), 1e-9)
    return f"seconds: {parts}; buffer, selection, importance and freezing together {own:.2f} ({share:.1%} of training)"
