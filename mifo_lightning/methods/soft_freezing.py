"""SoftFreezing: the more a weight matters to RL, the less of SFT's step it makes."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from mifo_callbacks.collectives import sum_over
from mifo_callbacks.contracts import Importance, importance_before, map_of
from mifo_callbacks.logging import log_metrics
from mifo_callbacks.sharding import local, shard_group, shard_like
from mifo_callbacks.thresholds import ceil_share, kth_largest
from mifo_lightning.common.errors import require
from mifo_lightning.methods.protection import AroundSteps


class SoftFreezing(AroundSteps):
    """Multiply what every SFT optimizer step moves each coordinate by 1 / (1 + C / c_0): a rate, in place of a mask.

    C is RL's importance, c_0 its quantile over all coordinates: a coordinate there makes half of the step. After the
    optimizer W = W_before + rate (W_after - W_before), so momentum and weight decay are in it. Where C = 0 the step is
    the optimizer's to the bit; where c_0 is 0 every other coordinate stands still. Gradients, their clip and the
    optimizer's moments are those of plain SFT. Needs `importance`; costs a copy of the weights during the step.

    Args:
        quantile: Of C, in (0, 1], that is c_0; a smaller one protects more.

    Raises:
        InputError: If the quantile is not allowed; when training starts, with adapters.
    """

    group = "soft"

    def __init__(self, quantile: float = 0.5) -> None:
        super().__init__()
        require("soft.quantile", quantile, 0 < quantile <= 1, "above 0 and at most 1")
        self.quantile = quantile
        self._importance: Importance | None = None
        self._known: dict[str, Tensor] = {}  # C of the running SFT phase, laid out like the weights
        self._c0 = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what it cannot go by; inside a phase, the map is still what it was."""
        super().on_train_start(trainer, pl_module)
        self.preflight(trainer)
        if self._current == "sft":
            self._look_up(trainer, pl_module)

    def preflight(self, trainer: Trainer, *rest: Any) -> None:
        """Find the importance, or raise if it is missing or late; looks at the callbacks alone."""
        self._importance = importance_before(self, trainer.callbacks, "sft", "soft")  # type: ignore[attr-defined]

    def on_phase_change(self, trainer: Trainer, pl_module: LightningModule, previous: str | None, current: str) -> None:
        """Where SFT begins, take the map as it is then."""
        super().on_phase_change(trainer, pl_module, previous, current)
        self._known = {}
        if current == "sft":
            self._look_up(trainer, pl_module)

    def _look_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._importance is not None, "found when training started"
        known, params = map_of(self._importance, pl_module), self.trained(pl_module)
        if not known:
            rank_zero_warn("soft: SFT begins before there is an importance map: nothing is held back")
            return
        self._known = {name: shard_like(known[name], params[name]) for name in known if name in params}
        self._c0 = quantile_of(self._known, self.quantile)
        log_metrics(trainer, {"soft/c0": self._c0, "soft/mean_rate": mean_rate(self._known, self._c0)})

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take back a part of the step."""
        for name, p, before in self.moves(pl_module, optimizer):
            if name in self._known:
                hold_back_(local(p), local(before), local(self._known[name]), self._c0)

    def release(self) -> None:
        """Let go of the map."""
        super().release()
        self._known = {}


def hold_back_(weight: Tensor, before: Tensor, importance: Tensor, c0: float) -> None:
    """W_before + rate (W_after - W_before) in the place of W_after = `weight`; at a rate of 1 or 0 either to the bit.

    Args:
        weight: fp32, changed in place.
        before: The same weights before the step.
        importance: C, fp32.
        c0: Where the rate is one half.
    """
    weight.copy_(torch.lerp(before, weight, rates(importance, c0)))  # lerp is exact at its ends, the sum is not


def rates(importance: Tensor, c0: float) -> Tensor:
    """1 / (1 + C / c_0) of every coordinate, fp32 in [0, 1]: 1 where C = 0, whatever c_0 is."""
    return torch.where(importance > 0, c0 / (c0 + importance), 1.0)


def quantile_of(importance: Mapping[str, Tensor], quantile: float) -> float:
    """The smallest C with at least this share of all coordinates at or below it, exact, over all shards too."""
    n = sum(c.numel() for c in importance.values())
    parts = [local(c) for c in importance.values()]
    return kth_largest(parts, n + 1 - ceil_share(quantile, n), shard_group(importance.values()))


def mean_rate(importance: Mapping[str, Tensor], c0: float) -> float:
    """The mean of `rates` over all coordinates and shards."""
    n = sum(c.numel() for c in importance.values())
    sums = [rates(local(c), c0).sum(dtype=torch.float64) for c in importance.values()]
    return float(sum_over(torch.stack(sums).sum(), shard_group(importance.values()))) / n
