"""Responses to read: a file that keeps all of them, and a W&B table with its history."""

import json
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from mifo_lightning.common.errors import require
from mifo_lightning.monitors.kept_rows import carry, samples_before
from mifo_lightning.monitors.run_dir import run_dir

FILE = "samples.jsonl"
COLUMNS: list[str | int] = ["step", "stage", "source", "prompt", "response", "truth", "reward"]


class SampleTable(Callback):
    """Keeps graded responses of rollouts and evaluations: `samples.jsonl` in the run's directory and a W&B table.

    Args:
        every: RL rollouts between two records; 0 keeps none of them.
        per_evaluation: Responses kept per source and evaluation.

    Raises:
        InputError: If one of them is below 0.
    """

    def __init__(self, every: int = 10, per_evaluation: int = 4) -> None:
        require("samples.every", every, every >= 0, "at least 0")
        require("samples.per_evaluation", per_evaluation, per_evaluation >= 0, "at least 0")
        self.every, self.per_evaluation = every, per_evaluation
        self._kept: dict[int, int] = {}  # responses kept in the running evaluation, by data source
        self._table: Any = None
        self._fresh = False  # whether the table has rows that W&B has not

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that goes on keeps the samples from before its checkpoint: what came after will come again."""
        if trainer.ckpt_path is not None and trainer.is_global_zero:
            carry(trainer, run_dir(trainer) / FILE, Path(trainer.ckpt_path), samples_before, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the samples of a fresh rollout."""
        if self.every and "samples" in outputs and batch["rollout"] % self.every == 0:
            self._keep(trainer, "rl", outputs["samples"])
            self._show(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first responses of each source."""
        if trainer.sanity_checking:
            return
        kept = self._kept.get(dataloader_idx, 0) if batch_idx else 0
        chosen = outputs["samples"][: self.per_evaluation - kept]
        self._kept[dataloader_idx] = kept + len(chosen)
        self._keep(trainer, "test" if trainer.testing else "val", chosen)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show them beside the metrics, which Lightning logs next."""
        self._show(trainer)

    on_test_batch_end, on_test_epoch_end = on_validation_batch_end, on_validation_epoch_end

    def _keep(self, trainer: Trainer, stage: str, samples: list[dict[str, Any]]) -> None:
        if not trainer.is_global_zero or not samples:
            return
        directory = run_dir(trainer)
        rows = [{"step": trainer.global_step, "stage": stage, **sample} for sample in samples]
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / FILE, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if isinstance(trainer.logger, WandbLogger):
            import wandb

            if self._table is None:
                self._table = wandb.Table(columns=COLUMNS, log_mode="INCREMENTAL")
            for row in rows:
                self._table.add_data(*(row[str(column)] for column in COLUMNS))
            self._fresh = True

    def _show(self, trainer: Trainer) -> None:
        """Put the table into the row that W&B writes next."""
        if self._fresh and isinstance(trainer.logger, WandbLogger):
            trainer.logger.experiment.log({"samples": self._table}, commit=False)
        self._fresh = False
