"""A checkpoint to go on from, at any time."""

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Keeps one `last.ckpt`, written every few optimizer steps and when training ends; resuming from it is exact.

    Args:
        every: Optimizer steps between two writes.
        dirpath: Where to write; null takes `checkpoints` in the run's directory.
    """

    def __init__(self, every: int = 100, dirpath: str | None = None) -> None:
        super().__init__(dirpath, filename="last", every_n_train_steps=every, enable_version_counter=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the state at the end, unless the last step has just been written."""
        super().on_train_end(trainer, pl_module)
        if self._last_global_step_saved != trainer.global_step:
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))
