"""What multiplies each demonstration token's cross-entropy; a weight of one's own is a subclass of `SFTWeight`."""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from mifo_lightning.losses.named import named
from mifo_lightning.losses.sft import mean_over


class SFTWeight(ABC):
    """A weight of demonstration tokens or of whole demonstrations; nothing flows through it.

    Attributes:
        needs_initial_losses: Whether the loss of each demonstration before training is to be measured for it.
    """

    needs_initial_losses = False

    @abstractmethod
    def __call__(self, logp: Tensor, entropy: Tensor, mask: Tensor, initial: Tensor | None = None) -> Tensor:
        """The weights of the optimizer step under way.

        Args:
            logp: [B, L] log-probabilities of the demonstration tokens, nats, without gradient.
            entropy: [B, L] entropies, nats, without gradient.
            mask: [B, L] bool, all demonstration tokens.
            initial: [B] loss of each demonstration before training, in units of the median; given to a weight that
                `needs_initial_losses`, which others need not take.

        Returns:
            [B, L] or [B, 1] fp32 weights.
        """


class Uniform(SFTWeight):
    """1: plain cross-entropy."""

    def __call__(self, logp: Tensor, entropy: Tensor, mask: Tensor, initial: Tensor | None = None) -> Tensor:
        return torch.ones_like(logp[:, :1])


class DFT(SFTWeight):
    """p, the probability of the token (arXiv 2508.05629)."""

    def __call__(self, logp: Tensor, entropy: Tensor, mask: Tensor, initial: Tensor | None = None) -> Tensor:
        return logp.exp()


class ChordPhi(SFTWeight):
    """p (1 - p) (CHORD's phi, arXiv 2508.11408)."""

    def __call__(self, logp: Tensor, entropy: Tensor, mask: Tensor, initial: Tensor | None = None) -> Tensor:
        p = logp.exp()
        return p * (1 - p)


class LowEntropy(SFTWeight):
    """exp(-H), H the mean entropy of the sequence (SRFT's paper)."""

    def __call__(self, logp: Tensor, entropy: Tensor, mask: Tensor, initial: Tensor | None = None) -> Tensor:
        return (-mean_over(entropy, mask)).exp()


class HighEntropy(SFTWeight):
    """exp(+H), H the mean entropy of the sequence (SRFT's code)."""

    def __call__(self, logp: Tensor, entropy: Tensor, mask: Tensor, initial: Tensor | None = None) -> Tensor:
        return mean_over(entropy, mask).exp()


class Flow(SFTWeight):
    """exp(-l / tau), l the demonstration's loss before training, tau the median of it (FLOW, arXiv 2502.02797)."""

    needs_initial_losses = True

    def __call__(self, logp: Tensor, entropy: Tensor, mask: Tensor, initial: Tensor | None = None) -> Tensor:
        assert initial is not None, "flow needs the losses before training"
        return (-initial).exp()[:, None]


SFTWeightName = Literal["uniform", "dft", "chord", "low_entropy", "high_entropy", "flow"]
SFT_WEIGHTS: dict[str, type[SFTWeight]] = {
    "uniform": Uniform,
    "dft": DFT,
    "chord": ChordPhi,
    "low_entropy": LowEntropy,
    "high_entropy": HighEntropy,
    "flow": Flow,
}


def as_sft_weight(choice: SFTWeightName | SFTWeight, key: str = "model.sft_loss.weight") -> SFTWeight:
    """The weight that the configuration names at `key`."""
    return named(choice, SFT_WEIGHTS, SFTWeight, key)
