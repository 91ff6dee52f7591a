"""What multiplies each demonstration token's cross-entropy; a weight of one's own is a subclass of `SFTWeight`."""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from mifo_lightning.common.errors import require
from mifo_lightning.losses.named import named
from mifo_lightning.losses.sft import mean_over


class SFTWeight(ABC):
    """A weight of demonstration tokens or of whole demonstrations; nothing flows through it.

    Attributes:
        needs_initial_losses: Whether the loss of each demonstration before training is to be measured for it.
        top_k: How many of each position's largest log-probabilities are to be kept for it.
    """

    needs_initial_losses = False
    top_k = 0

    @abstractmethod
    def __call__(self, logp: Tensor, entropy: Tensor, mask: Tensor, initial: Tensor | None = None) -> Tensor:
        """The weights of the optimizer step under way.

        A weight with `top_k` above 0 takes one argument more, `top`: [B, L, K] the K largest log-probabilities of each
        position, nats, the largest first, without gradient; K is `top_k`, or the vocabulary if that is smaller.

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


class EAFT(SFTWeight):
    """(H / 3)^alpha, H the entropy of the softmax over the 20 largest logits (EAFT, arXiv 2601.02151).

    What the model is sure of weighs little, above all where the demonstration says otherwise. H is at most ln 20, which
    3 stands for; a vocabulary of fewer than 20 tokens is all in H, over its own ln V.

    Args:
        alpha: The power; 0 weighs all tokens alike.
    """

    top_k = 20

    def __init__(self, alpha: float = 1.0) -> None:
        require("model.sft_loss.weight.alpha", alpha, 0 <= alpha < math.inf, "at least 0")
        self.alpha = alpha

    def __call__(
        self, logp: Tensor, entropy: Tensor, mask: Tensor, initial: Tensor | None = None, top: Tensor | None = None
    ) -> Tensor:
        assert top is not None, "eaft needs the largest log-probabilities"
        k = top.shape[-1]
        highest = 3.0 if k == self.top_k else math.log(k)
        # unlike p log p it is 0, and no NaN, where p is
        h: Tensor = torch.special.entr(top.softmax(-1)).sum(-1)
        return (h / highest).pow(self.alpha)


SFTWeightName = Literal["uniform", "dft", "chord", "low_entropy", "high_entropy", "flow", "eaft"]
SFT_WEIGHTS: dict[str, type[SFTWeight]] = {
    "uniform": Uniform,
    "dft": DFT,
    "chord": ChordPhi,
    "low_entropy": LowEntropy,
    "high_entropy": HighEntropy,
    "flow": Flow,
    "eaft": EAFT,
}


def as_sft_weight(choice: SFTWeightName | SFTWeight, key: str = "model.sft_loss.weight") -> SFTWeight:
    """The weight that the configuration names at `key`."""
    return named(choice, SFT_WEIGHTS, SFTWeight, key)
