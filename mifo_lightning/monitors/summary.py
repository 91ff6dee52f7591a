"""The table at the end: every source before and after, what the monitors found, and where the seconds went."""

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from mifo_callbacks import BufferPhaseSwitch
from mifo_callbacks.ownership import claim, renew
from mifo_lightning.common.terminal import table_text
from mifo_lightning.monitors.activity import METHOD, ActivityProfiler
from mifo_lightning.monitors.run_dir import run_dir
from mifo_lightning.monitors.trained import as_trained


class RunSummary(Callback):
    """Remembers the first and the last validation of a run; `report` prints both and writes `summary.json`.

    The file also holds `callback.summary()` of every callback that has a `summary_key`, under that key, and its
    `final_metrics()`, if it has such, under `after` beside those of the last validation. The first
    validation is in the checkpoint, so a resumed run still compares with its true beginning. A run that ends on SFT is
    validated once more before that SFT, so that its damage is seen apart, unless its end is not foreseen (`max_time`).

    Attributes:
        before: Metrics of the first validation.
        after_rl: Metrics after the last RL step, if SFT follows it and there was a validation before; else empty.
        after: Metrics of the last validation.
        ends_on: Kind of the phase that was trained last; None before training.
    """

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self.after_rl: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.ends_on: str | None = None
        self._dropped = 0  # SFT phases that the loader left out

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """It is of one module's run."""
        claim(self, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the metrics."""
        values = {k[4:]: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if trainer.sanity_checking or not values:
            return
        self.before = self.before or values
        self.after = values

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Validate where the last RL step is over and SFT begins."""
        if batch["phase"] == "rl":
            self.after_rl = {}  # a finished run that is extended
        elif self.ends_on == "rl" and self.before and no_rl_follows(trainer, batch):
            self.after_rl = validate(trainer, pl_module)
        self.ends_on = batch["phase"]  # now that it is validated: a run that is interrupted meanwhile begins it anew

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what only the loader knows."""
        self._dropped = getattr(trainer.train_dataloader, "position", {}).get("dropped", 0)

    def state_dict(self) -> dict[str, Any]:
        """The validations so far that are not the last, and the phase kind."""
        return {"before": self.before, "after_rl": self.after_rl, "ends_on": self.ends_on}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        renew(self)
        self.before, self.after_rl = state_dict["before"], state_dict.get("after_rl", {})
        self.ends_on = state_dict.get("ends_on")

    @rank_zero_only
    def report(self, trainer: Trainer) -> None:
        """Print the table and write `summary.json` into the run's directory."""
        profiler = trainer.profiler  # type: ignore[attr-defined]
        seconds = profiler.by_activity(trainer.callbacks) if isinstance(profiler, ActivityProfiler) else {}  # type: ignore[attr-defined]
        switch = next((c for c in trainer.callbacks if isinstance(c, BufferPhaseSwitch)), None)  # type: ignore[attr-defined]
        monitors = [c for c in trainer.callbacks if hasattr(c, "summary_key")]  # type: ignore[attr-defined]
        record: dict[str, Any] = {
            "before": self.before,
            "after_rl": self.after_rl,
            "after": self.after | measured_at_the_end(monitors),
            "ends_on": self.ends_on,
            "optimizer_steps": trainer.global_step,
            "sft_phases": switch.switches - self._dropped if switch else 0,
            "sft_phases_dropped": self._dropped,
            "seconds": seconds,
            "fitted": getattr(trainer.datamodule, "fitted", {}),  # type: ignore[attr-defined]
            **{monitor.summary_key: monitor.summary() for monitor in monitors},
        }
        path = run_dir(trainer) / "summary.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1), encoding="utf-8")
        console = Console(width=max(120, Console().width))
        if self.after:
            console.print(before_and_after(self.before, self.after))
        if self.after_rl:
            console.print(before_and_after(self.after_rl, self.after, "after the last RL step → at the end, after SFT"))
        left_out = ", the last one dropped, since no RL step was to follow" if self._dropped else ""
        console.print(
            f"{record['optimizer_steps']} optimizer steps, {record['sft_phases']} buffer-triggered SFT phases{left_out}"
        )
        if "heldout" in record:
            console.print(heldout_line(record["heldout"]["changes"]), highlight=False)
        if retained := record.get("retention", {}).get("all"):
            console.print(retention_line(retained), highlight=False)
        if seconds:
            console.print(seconds_line(seconds), highlight=False)


def measured_at_the_end(monitors: Iterable[Any]) -> dict[str, float]:
    """What monitors have that is a metric of the trained model alone."""
    offered = (monitor.final_metrics() for monitor in monitors if hasattr(monitor, "final_metrics"))
    return {name: value for metrics in offered for name, value in metrics.items()}


def no_rl_follows(trainer: Trainer, batch: Any) -> bool:
    """Whether the SFT phase that `batch` begins is followed by no RL step, by the schedule or `max_steps`."""
    end = trainer.global_step + batch["updates"] - batch["update"]
    return getattr(trainer.train_dataloader, "rl_is_over", False) or 0 < trainer.max_steps <= end


def validate(trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
    """Metrics of a validation amid training, without the prefix `val/`; collective.

    Batches, precision and draws are those of `Trainer.validate`; nothing is logged.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    sources = {} if data is None else data.val_dataloader()
    limit = trainer.limit_val_batches
    evaluator = as_trained(pl_module, "summary").evaluator
    evaluator.reset(list(sources), pl_module.device)
    with torch.no_grad(), trainer.profiler.profile("Strategy.validation_step"):  # type: ignore[attr-defined]
        for index, batches in enumerate(sources.values()):
            most = limit if isinstance(limit, int) else int(limit * len(batches))
            for number, questions in enumerate(islice(batches, most)):
                trainer.strategy.validation_step(questions, number, index)
    return {key.removeprefix("val/"): float(value) for key, value in evaluator.compute("val").items()}


def comparison(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """The metrics, and of each source its cells by metric, `before → after`, or `after` where there is none before."""
    rows: dict[str, dict[str, str]] = {}
    for key, value in after.items():
        source, _, metric = key.rpartition("/")
        start = before.get(key)
        digits = 1 if metric.removesuffix("_macro") == "length" else 3
        cell = f"{value:.{digits}f}" if start is None else f"{start:.{digits}f} → {value:.{digits}f}"
        macro = not source and metric.endswith("_macro")
        rows.setdefault(source or ("mean of sources" if macro else "all"), {})[metric.removesuffix("_macro")] = cell
    return list(dict.fromkeys(metric for cells in rows.values() for metric in cells)), rows


def before_and_after(before: dict[str, float], after: dict[str, float], title: str = "before → after") -> Table:
    """One row per source, one column per metric, `before → after` in each cell."""
    metrics, rows = comparison(before, after)
    table = Table(title=title)
    table.add_column("source")
    for metric in metrics:
        table.add_column(table_text(metric), justify="right")
    for source, cells in rows.items():
        table.add_row(table_text(source), *(cells.get(metric, "") for metric in metrics))
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


def retention_line(found: Mapping[str, float]) -> str:
    """What was lost and gained beyond chance, and the KL to the initial model, over all questions."""
    parts = []
    if found.get("questions"):
        changes = [f"{name} {found[name]:+.3f}{_error(found, name)}" for name in ("lost", "gained")]
        parts.append(f"{' and '.join(changes)} beyond chance on {found['questions']} questions")
    if "kl" in found:
        parts.append(f"KL(initial || trained) {found['kl']:.4f} nats a token")
    return "retention: " + ", ".join(parts)


def _error(found: Mapping[str, float], name: str) -> str:
    return f" ± {found[f'{name}_se']:.3f}" if f"{name}_se" in found else ""


def seconds_line(seconds: dict[str, float]) -> str:
    """Seconds by activity in one line, and what MIFO added to the training seconds."""
    own = sum(seconds.get(name, 0.0) for name in METHOD)
    parts = ", ".join(f"{name} {value:.1f}" for name, value in sorted(seconds.items(), key=lambda x: -x[1]))
    training = seconds.get("training", 0.0)
    share = f" ({own / training:.1%} of training)" if training else ""
    return f"seconds: {parts}; buffer, selection, importance and freezing together {own:.2f}{share}"
