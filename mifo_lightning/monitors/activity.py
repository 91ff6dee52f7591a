"""Seconds by activity, from Lightning's own profiling points."""

import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler

from mifo_callbacks.logging import log_metrics
from mifo_callbacks.ownership import TrainerCallback
from mifo_callbacks.phase import PhaseCallback
from mifo_lightning.common.errors import require
from mifo_lightning.monitors.phase_monitor import PhaseMonitor

# configuration group, by its class -> activity
CALLBACKS = {
    "EntropyTokenSelection": "selection",
    "ImportanceEMA": "importance",
    "GradientFreezing": "freezing",
    "CumulativeFreezing": "freezing",
    "DirectionFreezing": "freezing",
    "Anchor": "freezing",
    "SoftFreezing": "freezing",
    "SignConflict": "freezing",
    "SubspaceFreezing": "freezing",
    "GradientDropping": "dropping",
    "BufferPhaseSwitch": "buffer",
}
# what the name of any other action contains -> activity; the first that fits counts
ACTIVITIES = {
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

    def by_callback(self, callbacks: Iterable[Callback]) -> dict[str, float]:
        """Wall seconds so far of each configuration group, by the name of its class.

        Args:
            callbacks: Those of the Trainer.
        """
        totals: dict[str, float] = defaultdict(float)
        for callback in callbacks:
            # Lightning names an action after the state key, `profiled` after the class
            names = {f"[Callback]{key}." for key in (callback.state_key, type(callback).__name__)}
            for action, seconds in self.seconds.items():
                if action.startswith(tuple(names)):
                    totals[group_class(callback)] += seconds
        return dict(totals)

    def by_activity(self, callbacks: Iterable[Callback]) -> dict[str, float]:
        """Wall seconds so far of each activity; `training` holds all of an optimizer step, rollouts included.

        Args:
            callbacks: Those of the Trainer.
        """
        totals: dict[str, float] = defaultdict(float)
        for name, seconds in self.by_callback(callbacks).items():
            if name in CALLBACKS:
                totals[CALLBACKS[name]] += seconds
        for action, seconds in self.seconds.items():
            activity = next((a for part, a in ACTIVITIES.items() if part in action), None)
            if activity is not None:
                totals[activity] += seconds
        return dict(totals)


def group_class(callback: Callback) -> str:
    """Name of the class of the configuration group that a callback belongs to; a user's subclass counts there too."""
    ours = (c for c in type(callback).__mro__ if c.__module__.startswith(("mifo_callbacks.", "mifo_lightning.")))
    found = next((c for c in ours if c not in (TrainerCallback, PhaseCallback, PhaseMonitor)), type(callback))
    return found.__name__


class SecondsByActivity(Callback):
    """Logs `seconds/<activity>`, cumulative, if the trainer has an `ActivityProfiler`.

    Args:
        every: Optimizer steps between two records.

    Raises:
        InputError: If that is not at least 1.
    """

    def __init__(self, every: int = 10) -> None:
        require("seconds.every", every, every >= 1, "at least 1")
        self.every = every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the sums."""
        profiler = trainer.profiler  # type: ignore[attr-defined]
        if isinstance(profiler, ActivityProfiler) and trainer.global_step % self.every == 0:
            seconds = profiler.by_activity(trainer.callbacks)  # type: ignore[attr-defined]
            log_metrics(trainer, {f"seconds/{name}": value for name, value in seconds.items()})
