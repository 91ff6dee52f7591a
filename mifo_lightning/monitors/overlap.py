"""Whether freezing covers the weights that SFT wants to move."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from mifo_callbacks import GradientFreezing
from mifo_callbacks.collectives import sum_over
from mifo_callbacks.logging import log_metrics
from mifo_callbacks.sharding import local, shard_group, usable
from mifo_lightning.monitors.phase_monitor import PhaseMonitor


class FrozenOverlap(PhaseMonitor):
    """Measures how much of SFT's gradient lies on the frozen weights, before they are masked.

    Logs `overlap/gradient` (share of the gradient's L1 norm), `overlap/gradient_squared` (share of its squared L2 norm)
    and `overlap/frozen` (share of weights frozen: what a gradient that knows nothing of the mask would give), each the
    mean over the optimizer steps of an SFT phase. Records nothing where nothing is frozen, also without a
    `GradientFreezing`. Costs a few passes over the gradient per SFT optimizer step.
    """

    summary_key = "overlap"

    def __init__(self) -> None:
        super().__init__()
        self._shares: list[list[float]] = []  # of each optimizer step of the running phase

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last phase."""
        self._shares = []

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the step's gradient; masks are applied later, in `on_before_optimizer_step`."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        masks = next((c.masks for c in callbacks if isinstance(c, GradientFreezing) and c.masks), None)
        if self._current == "sft" and masks is not None and usable(pl_module.parameters()):
            with self.timed():
                gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
                self._shares.append(frozen_shares(gradients, masks))

    def end(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> dict[str, Any] | None:
        """Average over the phase."""
        if not self._shares:
            return None
        means = torch.tensor(self._shares, dtype=torch.float64).mean(0).tolist()
        found = dict(zip(("frozen", "gradient", "gradient_squared"), means, strict=True))
        log_metrics(trainer, {f"overlap/{name}": value for name, value in found.items()})
        return found

    def own_state(self) -> dict[str, Any]:
        """The steps of the running phase."""
        return {"shares": list(self._shares)}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._shares = list(state["shares"])


def frozen_shares(gradients: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> list[float]:
    """Shares of the coordinates, of the gradient's L1 norm and of its squared L2 norm that are frozen, each in [0, 1].

    Args:
        gradients: By name, sharded or not; collective if sharded.
        masks: Bool, this rank's shards, True where frozen; a gradient without a mask is free.
    """
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for name, gradient in gradients.items():
        size = local(gradient).abs()
        sums = sums.to(size.device)
        sums[0] += _masses(size)
        if name in masks:
            sums[1] += _masses(size[masks[name]])
    total, frozen = sum_over(sums, shard_group(gradients.values()))
    shares: list[float] = (frozen / total.clamp_min(torch.finfo(torch.float64).tiny)).tolist()
    return shares


def _masses(size: Tensor) -> Tensor:
    """[3] fp64: how many there are, their sum, the sum of their squares."""
    count = torch.tensor(size.numel(), device=size.device, dtype=torch.float64)
    return torch.stack([count, size.sum(dtype=torch.float64), size.square().sum(dtype=torch.float64)])
