"""How the callbacks report: to the trainer's loggers, once per event or, with `StepRows`, once per optimizer step."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


def log_metrics(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Write `metrics` to every logger of `trainer` at the step Lightning itself logs at, and to `callback_metrics`.

    So `ModelCheckpoint(monitor=..., every_n_train_steps=...)` can go by them. `Trainer.log` would repeat a value of one
    phase at every step of the other phases of the epoch, so the callbacks do not use it. The loggers themselves keep
    all ranks but the first silent.
    """
    trainer.callback_metrics.update({name: torch.tensor(float(value)) for name, value in metrics.items()})
    rows = next((c for c in getattr(trainer, "callbacks", ()) if isinstance(c, StepRows) and c.collecting), None)
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        if rows is None or getattr(logger, "immediate", False):
            logger.log_metrics(dict(metrics), step=step)
    if rows is not None:
        rows.add(trainer, metrics, step)


class StepRows(Callback):
    """Joins all that `log_metrics` is given during one optimizer step into one row; stands after what logs.

    Loggers such as W&B make a row of every call. What is logged before a phase's first step belongs to that step's row;
    what is logged when training ends makes the last one. A logger with `immediate = True` gets every call as it comes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collecting = False
        self._row: dict[str, float] = {}
        self._step = 0

    def add(self, trainer: Trainer, metrics: Mapping[str, float], step: int) -> None:
        """Keep `metrics` for the row of `step`; a row of another step is written."""
        if step != self._step:
            self._write(trainer)
        self._step = step
        self._row.update(metrics)

    def _write(self, trainer: Trainer) -> None:
        row, self._row = self._row, {}
        for logger in trainer.loggers:
            if row and not getattr(logger, "immediate", False):
                logger.log_metrics(dict(row), step=self._step)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._row = {}  # of a run that broke off; what a checkpoint holds comes later

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.collecting = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.fit_loop._should_accumulate():
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.collecting = False
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.collecting, row = False, dict(self._row)
        with suppress(Exception):  # the first exception is the one to be read
            self._write(trainer)
        self._row = row  # a checkpoint of this moment holds what was measured at its edge, which is not measured anew

    def state_dict(self) -> dict[str, Any]:
        """The row that is not done yet, and its step."""
        return {"row": dict(self._row), "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self._row, self._step = dict(state_dict["row"]), state_dict["step"]


def profiled(trainer: Trainer, callback: object, what: str) -> AbstractContextManager[None]:
    """Account for work outside Lightning's hooks in the trainer's profiler, named as hooks are."""
    name = f"[Callback]{type(callback).__name__}.{what}"
    account: AbstractContextManager[None] = trainer.profiler.profile(name)  # type: ignore[attr-defined]
    return account
