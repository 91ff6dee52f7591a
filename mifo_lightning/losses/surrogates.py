"""Surrogate objectives: what a policy-gradient step maximises per token, in place of the return."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Surrogate(ABC):
    """The objective of each token; a subclass says which."""

    @abstractmethod
    def __call__(self, logp: Tensor, ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """The objective, and which tokens it limits.

        Args:
            logp: [B, L] log-probabilities in nats, with gradient.
            ratio: [B, L] or [B, 1] r, probability now by probability when sampled, with gradient.
            advantage: [B, 1] or [B, L].

        Returns:
            [B, L] or [B, 1] objective with gradient, and as fp32 of r's shape 1 where r is cut off.
        """


class Clipped(Surrogate):
    """`min(r A, clip(r, 1 - low, 1 + high) A)` (PPO, GRPO); where A < 0 at least `dual A` (dual clip, 1912.09729).

    Args:
        low: Lower clip range of r.
        high: Upper clip range of r.
        dual: Largest r that still pushes where A < 0, above 1 + high; None: however large.
    """

    def __init__(self, low: float = 0.2, high: float = 0.2, dual: float | None = None) -> None:
        self.low, self.high, self.dual = low, high, dual

    def __call__(self, logp: Tensor, ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        clipped = ratio.clamp(1.0 - self.low, 1.0 + self.high) * advantage
        limited = clipped < ratio * advantage
        objective = torch.minimum(ratio * advantage, clipped)
        if self.dual is not None:
            beyond = (advantage < 0) & (ratio > self.dual)
            objective, limited = torch.where(beyond, self.dual * advantage, objective), limited | beyond
        return objective, limited.float()


class Unclipped(Surrogate):
    """`r A` (ReLIFT, LUFFY, HPT)."""

    def __call__(self, logp: Tensor, ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        return ratio * advantage, torch.zeros_like(ratio)


class Truncated(Surrogate):
    """`sg[min(r, cap)] A logp` (CISPO)."""

    def __init__(self, cap: float = 5.0) -> None:
        self.cap = cap

    def __call__(self, logp: Tensor, ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        return ratio.detach().clamp_max(self.cap) * advantage * logp, (ratio > self.cap).float()


class Reinforce(Surrogate):
    """`A logp` (RLOO, SRFT)."""

    def __call__(self, logp: Tensor, ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        return advantage * logp, torch.zeros_like(ratio)
