"""What was logged, as a file: the same for a run that was killed and resumed as for an undisturbed one."""

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from mifo_callbacks.ownership import claim, renew
from mifo_lightning.common.errors import InputError, require
from mifo_lightning.monitors.run_dir import run_dir

# not `rollout/tokens_per_s`: speed varies from run to run
ROLLOUT = ("reward", "correct", "length", "truncated", "entropy", "groups_without_signal", "groups_trained")
KEYS = (
    *("phase/*", "rl/*", "sft/*", "buffer/*", "forgetting/*", "phase_kl/*", "overlap/*", "retention/*"),
    *(f"rollout/{name}" for name in ROLLOUT),
)


class History(Callback):
    """Keeps chosen metrics and writes them to `history.jsonl` in the run's directory when training ends.

    One line per logging event that has a chosen key: the metrics, `step` (optimizer steps begun) and `rl_step` (RL
    steps begun). Lines live in the checkpoint until the file is written. Costs no more than the list.

    Args:
        keys: Patterns of metric names, with * and ?; null takes those of phases, rollouts, losses,
            buffer, forgetting, KL, overlap and retention.

    Raises:
        InputError: If there is no pattern.
    """

    def __init__(self, keys: list[str] | None = None) -> None:
        texts = keys is None or (isinstance(keys, list | tuple) and all(isinstance(key, str) and key for key in keys))
        require("history.keys", repr(keys), texts, "a list of patterns of metric names")
        if keys is not None and not keys:
            raise InputError("history.keys: [] keeps nothing; give patterns of metric names, or history: null")
        self.keys = list(KEYS if keys is None else keys)
        self.lines: list[dict[str, float]] = []
        self._where = {"step": 0, "rl_step": 0}
        self._end: int | None = None  # lines before the step under way, or the end: later ones are no part of the state
        self._recorder = _Recorder(self)

    def keep(self, metrics: Mapping[str, float]) -> None:
        """Add a line, if one of the metrics is wanted."""
        wanted = {k: float(v) for k, v in metrics.items() if any(fnmatchcase(k, pattern) for pattern in self.keys)}
        if wanted:
            self.lines.append({**self._where, **wanted})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen from now on: what is logged before a resumed run goes on has been logged before."""
        claim(self, pl_module)
        self._end = None
        self._detach(trainer)
        trainer.loggers = [*trainer.loggers, self._recorder]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note where the run is."""
        self._where["step"] = trainer.global_step + 1
        if batch["phase"] == "rl":
            self._where["rl_step"] = batch["rollout"] + 1
        self._end = len(self.lines)  # what others have measured before the step stays; the step may be done anew

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The optimizer step is done."""
        self._end = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the monitors log from here on, at the end of training, a run that goes on logs at another place."""
        self._end = len(self.lines)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        self._detach(trainer)
        if trainer.is_global_zero:
            path = run_dir(trainer) / "history.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        self._detach(trainer)

    def _detach(self, trainer: Trainer) -> None:
        trainer.loggers = [logger for logger in trainer.loggers if logger is not self._recorder]

    def state_dict(self) -> dict[str, Any]:
        """Lines so far and where the run is."""
        return {"lines": self.lines[: self._end], "where": dict(self._where)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        renew(self)
        self.lines, self._where = list(state_dict["lines"]), dict(state_dict["where"])


class _Recorder(Logger):
    """Hands everything logged on to a `History`; attached only while training runs, so that it names no directory."""

    immediate = True  # a line says where the run was when it was logged, also between two optimizer steps
    name: str | None = None
    version: str | None = None

    def __init__(self, history: History) -> None:
        super().__init__()
        self.history = history

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.history.keep(metrics)
