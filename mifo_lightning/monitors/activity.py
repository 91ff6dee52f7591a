"""Seconds by activity, from Lightning's own profiling points."""

import time
from collections import defaultdict
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler

from mifo_callbacks.logging import log_metrics
from mifo_lightning.errors import InputError

# what an action's name contains -> activity; the first that fits counts
ACTIVITIES = {
    "[Callback]EntropyTokenSelection": "selection",
    "[Callback]ImportanceEMA": "importance",
    "[Callback]GradientFreezing": "freezing",
    "[Callback]BufferPhaseSwitch": "buffer",
    "Strategy.backward": "backward",
    "Strategy.validation_step": "evaluation",
    "Strategy.test_step": "evaluation",
    "run_training_batch": "training",
    "mifo.rollout": "rollout",
    "mifo.reward": "reward",
    "mifo.score": "scoring",
    "mifo.entropies": "selection",
    "mifo.forward": "forward",
}
METHOD = ("selection", "importance", "freezing", "buffer")  # what MIFO adds to plain RL


class ActivityProfiler(Profiler):
    """Adds up wall seconds per profiled action; give it as `Trainer(profiler=...)`."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: dict[str, list[float]] = defaultdict(list)

    def start(self, action_name: str) -> None:
        """Begin an action; the same one may be open more than once."""
        self._open[action_name].append(time.perf_counter())

    def stop(self, action_name: str) -> None:
        """End the action that was begun last under this name."""
        if self._open[action_name]:
            self.seconds[action_name] += time.perf_counter() - self._open[action_name].pop()

    def by_activity(self) -> dict[str, float]:
        """Wall seconds so far of each activity; `training` holds all of an optimizer step, rollouts included."""
        totals: dict[str, float] = defaultdict(float)
        for action, seconds in self.seconds.items():
            activity = next((a for part, a in ACTIVITIES.items() if part in action), None)
            if activity is not None:
                totals[activity] += seconds
        return dict(totals)


class SecondsByActivity(Callback):
    """Logs `seconds/<activity>`, cumulative, if the trainer has an `ActivityProfiler`.

    Args:
        every: Optimizer steps between two records.

    Raises:
        InputError: If that is not at least 1.
    """

    def __init__(self, every: int = 10) -> None:
        if every < 1:
            raise InputError(f"seconds.every: {every} is not allowed; it must be at least 1")
        self.every = every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the sums."""
        profiler = trainer.profiler  # type: ignore[attr-defined]
        if isinstance(profiler, ActivityProfiler) and trainer.global_step % self.every == 0:
            log_metrics(trainer, {f"seconds/{name}": value for name, value in profiler.by_activity().items()})
