"""SED-SFT's term beside the cross-entropy (arXiv 2602.07464): where several ways on are open, p is drawn to 1/2."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mifo_callbacks.collectives import sum_over
from mifo_callbacks.thresholds import find_cuts, floor_share
from mifo_lightning.common.errors import require


@dataclass(frozen=True)
class SED:
    """`L = mean_t [CE_t + strength M_t (p_t - 1/2)^2]`, M_t = 1{the top_k largest probabilities sum to less than tau}.

    p_t, the probability of the token, has a gradient; M_t, which goes by the running model, has none. tau stands still:
    before training, the share `mask_ratio` of all demonstration tokens have a sum above tau. So it is in the authors'
    code, which sorts the sums and takes the one that this share reaches: 0.7 leaves 70 % of the tokens alone, not 30 %.

    Args:
        strength: lambda, 1 in the paper; 0 switches the term off. Up to 1 the loss of a token falls all the way to
            p = 1; above, it is least at p = (1 + sqrt(1 + 8 / strength)) / 4.
        top_k: k, how many of the largest probabilities are summed.
        mask_ratio: r, share of the tokens that the term leaves alone; 0 leaves none alone.
    """

    strength: float = 0.0
    top_k: int = 2
    mask_ratio: float = 0.7

    def check(self, key: str) -> None:
        """Raise an InputError that names the key, its value and what is allowed."""
        require(f"{key}.strength", self.strength, 0 <= self.strength < math.inf, "at least 0")
        require(f"{key}.top_k", self.top_k, self.top_k >= 1, "at least 1")
        require(f"{key}.mask_ratio", self.mask_ratio, 0 <= self.mask_ratio < 1, "in [0, 1)")


def sed_term(logp: Tensor, top: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """`M (p - 1/2)^2` of each token, before its weight.

    Args:
        logp: [B, L] log-probabilities of the tokens in nats, with gradient.
        top: [B, L, k] the k largest log-probabilities of their positions in nats, without gradient.
        threshold: tau.

    Returns:
        The term [B, L] fp32, with gradient, and M [B, L] bool.
    """
    is_open = top_sum(top) < threshold
    return is_open * (logp.exp() - 0.5).square(), is_open


def top_sum(top: Tensor) -> Tensor:
    """[...] the sum of probabilities whose logarithms are [..., k]."""
    return top.exp().sum(-1)


def sed_threshold(sums: Tensor, mask_ratio: float, group: dist.ProcessGroup | None = None) -> float:
    """tau, which the share `mask_ratio` of all sums reach, rounded down to whole tokens; collective.

    It lies halfway to the next lower sum: at one of the sums, as in their code, rounding would decide on its token.

    Args:
        sums: [n] fp32, the sum of the largest probabilities of each of this rank's tokens before training.
        mask_ratio: r.
        group: The ranks with the other tokens.

    Returns:
        tau; infinity where no token is to be left alone.
    """
    tokens = int(sum_over(torch.tensor(len(sums), device=sums.device), group))
    reaching = floor_share(mask_ratio, tokens)
    if not reaching:
        return math.inf
    around = find_cuts([sums], [reaching, min(reaching + 1, tokens)], group)
    return sum(cut.value for cut in around) / 2
