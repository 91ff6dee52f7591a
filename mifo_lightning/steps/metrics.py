"""Metrics of one optimizer step, collected over its micro-batches and over ranks."""

import math
from collections.abc import Mapping

from torch import Tensor

from mifo_callbacks.collectives import sum_ranks


class StepMetrics:
    """Sums what the micro-batches of an optimizer step report, until it is logged."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor | float] = {}

    def add(self, prefix: str, shares: Mapping[str, Tensor]) -> None:
        """Add scalars that sum to the step's value over micro-batches and ranks; collective."""
        for name, value in zip(shares, sum_ranks(list(shares.values())), strict=True):
            key = f"{prefix}/{name}"
            self._values[key] = self._values.get(key, 0.0) + value

    def put(self, prefix: str, values: Mapping[str, Tensor | float]) -> None:
        """Set values that are the same on every rank and that one micro-batch knows."""
        self._values.update({f"{prefix}/{name}": value for name, value in values.items()})

    def broken(self) -> list[str]:
        """Names of the values that are not finite; the same on every rank, since all of them are."""
        return [name for name, value in self._values.items() if not math.isfinite(float(value))]

    def take(self) -> dict[str, float]:
        """All values as numbers; begins the next step."""
        values, self._values = self._values, {}
        return {name: float(value) for name, value in values.items()}
