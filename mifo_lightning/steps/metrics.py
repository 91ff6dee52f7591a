"""Metrics of one optimizer step, collected over its micro-batches and over ranks."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mifo_callbacks.collectives import gather_over, sum_ranks, world_group


class StepMetrics:
    """Collects what the micro-batches of an optimizer step report, until it is logged."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor | float] = {}
        self._means: dict[str, Tensor] = {}  # [2] each: sum and weight

    def add(self, prefix: str, shares: Mapping[str, Tensor]) -> None:
        """Add what micro-batches and ranks make the step's value of; collective.

        Args:
            prefix: The phase.
            shares: Scalars that sum to it; or the largest of which it is, where the name ends in `_max`; or a sum and
                the weight it is divided by, [2], which both sum.
        """
        group = world_group()
        keys = {f"{prefix}/{name}": value for name, value in shares.items()}
        for key in [key for key, value in keys.items() if value.dim()]:
            (total,) = gather_over(keys.pop(key), group).sum(0, keepdim=True)
            self._means[key] = self._means.get(key, torch.zeros_like(total)) + total
        for key in [key for key in keys if key.endswith("_max")]:
            self._values[key] = max(
                self._values.get(key, -math.inf), gather_over(keys.pop(key), group).max(), key=float
            )
        for key, value in zip(keys, sum_ranks(list(keys.values())), strict=True):
            self._values[key] = self._values.get(key, 0.0) + value

    def put(self, prefix: str, values: Mapping[str, Tensor | float]) -> None:
        """Set values that are the same on every rank and that one micro-batch knows."""
        self._values.update({f"{prefix}/{name}": value for name, value in values.items()})

    def broken(self) -> list[str]:
        """Names of the values that are not finite; the same on every rank, since all of them are."""
        return [name for name, value in self._all().items() if not math.isfinite(float(value))]

    def take(self) -> dict[str, float]:
        """All values as numbers; begins the next step."""
        values = {name: float(value) for name, value in self._all().items()}
        self._values, self._means = {}, {}
        return values

    def _all(self) -> dict[str, Tensor | float]:
        # a mean of nothing is none
        return self._values | {name: total / weight for name, (total, weight) in self._means.items() if weight}
