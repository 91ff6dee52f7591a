"""A checkpoint to go on from, at any time."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.checkpoint.api import CheckpointException

from mifo_callbacks.ownership import claim
from mifo_lightning.checkpoints import interruption
from mifo_lightning.checkpoints.files import existing, free_bytes, remove_file, sync_directory, unwritten
from mifo_lightning.checkpoints.sharded import seal
from mifo_lightning.common.errors import InputError, Interrupted, TrainingError
from mifo_lightning.monitors.run_dir import keep_earlier, run_dir

LAST, PREVIOUS, NEXT = "last.ckpt", "previous.ckpt", "next.ckpt"  # next: being written
PARTS = 6  # of 4 bytes a weight: the weight, two moments of each phase kind, the importance map
SECONDS, SHARE = 600, 20  # the longest between two writes, unless a write takes more than a 20th of it


class LastCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt` and, where the disk holds three, the one before as `previous.ckpt`; resuming is exact.

    Written every few optimizer steps, when 10 minutes (or 20 times what a write takes, if that is more) have passed
    since the last, and when training ends. A write that fails is warned about and leaves what is there as it is.

    Args:
        every: Optimizer steps between two writes; 0 leaves it to the clock.
        dirpath: Where to write; null takes `checkpoints` in the run's directory.

    Attributes:
        failed: Why the last write failed, in one line; None if it went well.

    Raises:
        InputError: Before training, if another run has left a checkpoint there, or the disk cannot be written to or
            holds less than two checkpoints, one of which is the one being written.
    """

    def __init__(self, every: int = 100, dirpath: str | None = None) -> None:
        super().__init__(dirpath, filename="last", every_n_train_steps=every, enable_version_counter=False)
        self.failed: str | None = None
        self._mine: Path | None = None  # what this object may write over
        self._from: int | None = None  # the optimizer steps that training began with
        self._keep_previous = True
        self._began = 0.0  # when the last write did, on the first rank's clock
        self._seconds = 0.0  # that it took

    def check_free(self, trainer: Trainer, pl_module: Any, start: Any) -> None:
        """Raise an InputError if another run's checkpoint is there, or there is no room; `start` is gone on from."""
        directory = self._directory(trainer)
        if directory / LAST == self._mine or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for name in (LAST, PREVIOUS):
            keep_earlier(trainer, directory / name, "checkpoint.dirpath", start)
        needed = 4 * (PARTS + pl_module.averages) * pl_module.trained_size()
        there = sum(_bytes(directory / name) for name in (LAST, PREVIOUS, NEXT))
        problem, free = trainer.strategy.broadcast((disk_problem(directory, needed, there), free_bytes(directory)))
        if problem:
            raise InputError(problem)
        self._keep_previous = free + there >= 3 * needed
        if not self._keep_previous:
            rank_zero_warn(
                f"checkpoint.dirpath: the disk of {directory} does not hold three checkpoints of {needed:,} bytes: "
                "only the last one is kept"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Another run's checkpoint stays as it is; what this one writes it may write over."""
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path is None:  # Lightning keeps where and at which step it last wrote
            claim(self, pl_module)
        self.check_free(trainer, pl_module, trainer.ckpt_path)
        self._mine, self._from = self._directory(trainer) / LAST, trainer.global_step
        if trainer.is_global_zero:
            _remove(self._mine.with_name(NEXT))  # of a process that was killed while it wrote
        trainer.strategy.barrier()
        self._began = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write when it is time."""
        every = self._every_n_train_steps
        if (every and trainer.global_step % every == 0) or self._is_time(trainer):
            self.write_now(trainer)

    def write_now(self, trainer: Trainer) -> None:
        """Write the state of this step now, unless it is written; collective, between two optimizer steps."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A run that is interrupted leaves the state of its last optimizer step."""
        super().on_exception(trainer, pl_module, exception)
        if not isinstance(exception, Interrupted) or not exception.together or self._from is None:
            return
        if trainer.global_step == self._from:
            return  # nothing new, and a state that was restored by half must not be written over a whole one
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)  # of a step that is not done
        interruption.request(exception.signum)  # on ranks too that learnt of it from another
        self.write_now(trainer)
        exception.step = trainer.global_step
        if self._last_checkpoint_saved:
            exception.step, exception.checkpoint = self._last_global_step_saved, self._last_checkpoint_saved

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the state at the end, unless the last step has just been written or this is but a trial."""
        super().on_train_end(trainer, pl_module)
        self.write_now(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Nothing that a run which goes on needs: where this one writes is its own affair."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Leave what an older version wrote."""

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Write a file or directory beside, which takes the last one's name when it is whole; collective."""
        last, began, before = Path(filepath), time.monotonic(), self.failed
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()  # the rows up to here are not logged again by a run that goes on from here
        self.failed = trainer.strategy.broadcast(self._write(trainer, last))
        self._began, self._seconds = time.monotonic(), time.monotonic() - began
        if self.failed:
            if not before:
                rank_zero_warn(f"checkpoint: {self.failed}; training goes on, and what was written before is kept")
            return
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)

    def _write(self, trainer: Trainer, last: Path) -> str | None:
        """Why the first rank could not write and rename, in one line, or None; other ranks follow it."""
        try:
            trainer.save_checkpoint(last.with_name(NEXT), weights_only=False)
            return _take_place(last, self._keep_previous) if trainer.is_global_zero else None
        except (OSError, RuntimeError, CheckpointException) as error:
            ours = isinstance(error, (OSError, TrainingError, CheckpointException))
            if not ours and "inline_container" not in str(error):  # so torch's writer hides what the disk said
                raise
            trainer.strategy.barrier()  # at which the other ranks wait
            _remove(last.with_name(NEXT))
            what = " ".join(str(error).split())[:200]
            return what if isinstance(error, TrainingError) else f"{last}: {what}; {free_bytes(last):,} bytes are free"

    def _is_time(self, trainer: Trainer) -> bool:
        """Whether the last write is long ago, by the first rank's clock."""
        waited = time.monotonic() - self._began
        return bool(trainer.strategy.broadcast(waited >= max(SECONDS, SHARE * self._seconds)))

    def _directory(self, trainer: Trainer) -> Path:
        return Path(self.dirpath or run_dir(trainer) / "checkpoints")


def disk_problem(directory: Path, needed: int, there: int) -> str | None:
    """Why checkpoints cannot be written, in one line, or None.

    Args:
        directory: Where to; it need not exist.
        needed: Bytes of one.
        there: Bytes of those that may be replaced.
    """
    place = existing(directory)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return f"checkpoint.dirpath: {directory} cannot be written to; give another, or checkpoint: null"
    if free_bytes(directory) + there < 2 * needed:
        return (
            f"checkpoint.dirpath: {directory}: a checkpoint takes about {needed:,} bytes, twice that while it is "
            f"written, and {free_bytes(directory):,} are free; give another directory, or checkpoint: null"
        )
    return None


def _take_place(last: Path, keep_previous: bool) -> str | None:
    """Rename what has been written, and what it follows; at no moment is no whole one there. Why it failed, or None."""
    upcoming, previous = last.with_name(NEXT), last.with_name(PREVIOUS)
    try:
        if upcoming.is_dir():
            seal(upcoming)
        if last.exists():
            if last.is_dir() or previous.is_dir():  # a directory takes no other's place
                _remove(previous)
            os.replace(last, previous)
        os.replace(upcoming, last)
        if not keep_previous:
            _remove(previous)
        sync_directory(last.parent)
    except OSError as error:
        return unwritten(last, error, _bytes(upcoming))
    return None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        remove_file(path)


def _bytes(path: Path) -> int:
    """Of a file, of all files in a directory, or none."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
