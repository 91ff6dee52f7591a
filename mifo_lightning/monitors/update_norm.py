"""How far each optimizer step moves the weights."""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from mifo_callbacks.collectives import sum_over
from mifo_callbacks.logging import log_metrics
from mifo_callbacks.phase import PhaseCallback
from mifo_callbacks.sharding import local, shard_group, trainable


class UpdateNorm(PhaseCallback):
    """Logs `rl/update_norm` and `sft/update_norm`: the L2 norm of the change of all weights in one optimizer step.

    Needs one copy of the weights during the step, and about as much time as one pass over them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._before: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Copy the weights."""
        self._before = [local(p).clone() for p in trainable(pl_module).values()]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the norm of the difference; not right after the step, where frozen weights are not restored yet."""
        if not self._before:
            return
        parameters = list(trainable(pl_module).values())
        torch._foreach_sub_(self._before, [local(p) for p in parameters])
        squares = torch.stack(torch._foreach_norm(self._before)).square().sum()
        self._before = []
        norm = sum_over(squares, shard_group(parameters)).sqrt()
        log_metrics(trainer, {f"{self._current}/update_norm": float(norm)})
