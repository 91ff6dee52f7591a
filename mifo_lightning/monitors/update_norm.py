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
from mifo_lightning.policy.adapter import adapters_of


class UpdateNorm(PhaseCallback):
    """Logs `rl/update_norm` and `sft/update_norm`: the L2 norm of the change of all weights in one optimizer step.

    With `model.adapter` the weights are those that the adapters change, not A and B. Needs one copy of what is trained
    during the step, and about as much time as one pass over it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Copy the weights."""
        self._before = {name: p.detach().clone() for name, p in trainable(pl_module).items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the norm of the difference; not right after the step, where frozen weights are not restored yet."""
        if not self._before:
            return
        adapter, before, self._before = adapters_of(pl_module), self._before, {}
        if adapter is not None:
            changes = adapter.changes(before, dict(pl_module.named_parameters()))
            norm = torch.stack([change.squares() for _, change in changes]).sum().sqrt()
        else:
            parameters = list(trainable(pl_module).values())
            moved = [local(p) for p in before.values()]
            torch._foreach_sub_(moved, [local(p) for p in parameters])
            squares = torch.stack(torch._foreach_norm(moved)).square().sum()
            norm = sum_over(squares, shard_group(parameters)).sqrt()
        log_metrics(trainer, {f"{self._current}/update_norm": float(norm)})
