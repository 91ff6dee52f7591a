"""SRFT (arXiv 2506.19767)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mifo_lightning.common.errors import require
from mifo_lightning.losses.sft import mean_over
from mifo_lightning.losses.sft_weights import SFTWeight, SFTWeightName
from mifo_lightning.methods.luffy import Luffy
from mifo_lightning.methods.mixing import as_token_weight

if TYPE_CHECKING:
    from mifo_lightning.rollout.graded import Graded


class SRFT(Luffy):
    """SFT and off-policy RL on demonstrations at once; own rollouts are pushed by the sign of their correctness.

    A correct rollout counts `positive_weight exp(H)`, another one -1, H the mean entropy of the response; take the
    reinforce surrogate with it.

    Args:
        positive_weight: Factor of correct rollouts.
        sft: Weight of the SFT loss on the demonstrations.
        shape: The constant in `f(x) = x / (x + shape)`, as in LUFFY.
        token_weight: `low_entropy`, exp(-H), as in the paper; `high_entropy`, exp(+H), as in its code.
    """

    def __init__(
        self,
        positive_weight: float = 0.1,
        sft: float = 0.5,
        shape: float = 0.1,
        token_weight: SFTWeightName | SFTWeight = "low_entropy",
    ) -> None:
        super().__init__(shape)
        self.token_weight = as_token_weight(token_weight)
        require("model.mixing.positive_weight", positive_weight, positive_weight >= 0, "at least 0")
        require("model.mixing.sft", sft, sft >= 0, "at least 0")
        self.positive_weight, self.sft = positive_weight, sft

    def push(self, advantages: Tensor, graded: "Graded") -> Tensor:
        return torch.where(graded.correct, 1.0, -1.0)

    def scales(self, step: int) -> tuple[float, float]:
        return 1.0, self.sft

    def reweigh(self, advantages: Tensor, entropy: Tensor, own: Tensor) -> Tensor:
        factor = self.positive_weight * mean_over(entropy, own)[:, 0].exp()
        return torch.where(own.any(-1) & (advantages > 0), advantages * factor, advantages)
