"""A checkpoint to go on from, at any time."""

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mifo_lightning.monitors.run_dir import keep_earlier, run_dir


class LastCheckpoint(ModelCheckpoint):
    """Keeps one `last.ckpt`, written every few optimizer steps and when training ends; resuming from it is exact.

    Args:
        every: Optimizer steps between two writes.
        dirpath: Where to write; null takes `checkpoints` in the run's directory.

    Raises:
        InputError: Before training, if another run has left a checkpoint there.
    """

    def __init__(self, every: int = 100, dirpath: str | None = None) -> None:
        super().__init__(dirpath, filename="last", every_n_train_steps=every, enable_version_counter=False)
        self._mine: Path | None = None  # what this object may write over

    def check_free(self, trainer: Trainer, pl_module: LightningModule, start: Any) -> None:
        """Raise an InputError if another run's checkpoint is there; `start` is the checkpoint to go on from."""
        path = Path(self.dirpath or run_dir(trainer) / "checkpoints") / "last.ckpt"
        if path != self._mine and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            keep_earlier(trainer, path, "checkpoint.dirpath", start)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Another run's checkpoint stays as it is; what this one writes it may write over."""
        super().on_train_start(trainer, pl_module)
        self.check_free(trainer, pl_module, trainer.ckpt_path)
        self._mine = Path(self.dirpath or "") / "last.ckpt"

    def write_now(self, trainer: Trainer) -> None:
        """Write the state, whatever `every` says, unless this step's is written; collective, between optimizer steps."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the state at the end, unless the last step has just been written or this is but a trial."""
        super().on_train_end(trainer, pl_module)
        self.write_now(trainer)
