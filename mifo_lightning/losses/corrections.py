"""Corrections for an engine that draws from other numerics than those that train, such as another dtype or kernel."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

from torch import Tensor

from mifo_lightning.common.errors import require
from mifo_lightning.losses.named import named
from mifo_lightning.losses.policy import LOG_RATIO_LIMIT

CorrectionName = Literal["auto"]


class Corrected(NamedTuple):
    """What a `Correction` finds, without gradient: [B, L], a number a token, or [B, 1], one a response.

    Attributes:
        factor: Multiplies the advantage.
        ratio: `p_old / p_sampler`, of which the factor is made.
        cut: bool, where the factor is not the ratio because that is too large.
    """

    factor: Tensor
    ratio: Tensor
    cut: Tensor


class Correction(ABC):
    """What multiplies the advantage of each token that an engine drew; a subclass says how."""

    @abstractmethod
    def __call__(self, logp_old: Tensor, logp_sampler: Tensor, mask: Tensor) -> Corrected:
        """The factors, and what is logged of them.

        Args:
            logp_old: [B, L] log-probabilities in nats under the policy that trains, before its updates.
            logp_sampler: [B, L] the same as the engine had them where it drew.
            mask: [B, L] bool, tokens that the engine drew.
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

    def __call__(self, logp_old: Tensor, logp_sampler: Tensor, mask: Tensor) -> Corrected:
        difference = (logp_old - logp_sampler) * mask
        if self.level == "sequence":
            difference = difference.sum(-1, keepdim=True)
        ratio = difference.clamp_max(LOG_RATIO_LIMIT).exp()  # an infinite one would count as a broken step
        return Corrected(ratio.clamp_max(self.cap), ratio, ratio > self.cap)


def as_correction(choice: CorrectionName | Correction | None) -> Correction | None:
    """The correction that a configuration names; `auto` is the truncated importance of each token."""
    return None if choice is None else named(choice, {"auto": TruncatedImportance}, Correction, "model.loss.correction")
