"""How the callbacks report: straight to the trainer's loggers, once per event."""

from collections.abc import Mapping
from contextlib import AbstractContextManager

from lightning.pytorch import Trainer


def log_metrics(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Write `metrics` to every logger of `trainer` at the step Lightning itself logs at.

    `Trainer.log` would repeat a value of one phase at every step of the other phases of the epoch, so the
    callbacks do not use it. The loggers themselves keep all ranks but the first silent.
    """
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)


def profiled(trainer: Trainer, callback: object, what: str) -> AbstractContextManager[None]:
    """Account for work outside Lightning's hooks in the trainer's profiler, named as hooks are."""
    name = f"[Callback]{type(callback).__name__}.{what}"
    return trainer.profiler.profile(name)  # type: ignore[attr-defined]
