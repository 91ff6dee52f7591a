"""Corrections for an engine that draws from other numerics than those that train, such as another dtype or kernel."""

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor

from mifo_lightning.common.errors import require


class Correction(ABC):
    """What multiplies the advantage of each token that an engine drew; a subclass says how."""

    @abstractmethod
    def __call__(self, logp_old: Tensor, logp_sampler: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The factors, and which of them are cut off.

        Args:
            logp_old: [B, L] log-probabilities in nats under the policy that trains, before its updates.
            logp_sampler: [B, L] the same as the engine had them where it drew.
            mask: [B, L] bool, tokens that the engine drew.

        Returns:
            [B, L] or [B, 1] factors without gradient, and bool of the same shape.
        """


class TruncatedImportance(Correction):
    """`min(exp(logp_old - logp_sampler), cap)`, of each token or of the whole response (truncated importance sampling).

    Args:
        level: One factor a token, or one a response, the product over its tokens.
        cap: Largest factor.
    """

    def __init__(self, level: Literal["token", "sequence"] = "token", cap: float = 2.0) -> None:
        require("model.loss.correction.level", repr(level), level in ("token", "sequence"), "token or sequence")
        require("model.loss.correction.cap", cap, cap > 0, "above 0")
        self.level, self.cap = level, cap

    def __call__(self, logp_old: Tensor, logp_sampler: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        difference = (logp_old - logp_sampler) * mask
        if self.level == "sequence":
            difference = difference.sum(-1, keepdim=True)
        factor = difference.exp()
        return factor.clamp_max(self.cap), factor > self.cap
