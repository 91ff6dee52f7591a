"""HPT (arXiv 2509.04419)."""

from typing import TYPE_CHECKING

from torch import Tensor

from mifo_lightning.common.errors import require
from mifo_lightning.losses.sft_weights import SFTWeight, SFTWeightName
from mifo_lightning.methods.mixing import Mixing

if TYPE_CHECKING:
    from mifo_lightning.rollout.graded import Graded


class HPT(Mixing):
    """A failed question trains on its demonstration instead of on its rollouts.

    Args:
        gate: A question has failed if at most this many of its rollouts are correct.
        sft: Weight of the mean over the demonstrations' tokens, however many have failed.
        token_weight: As in `Mixing`.
    """

    def __init__(self, gate: int = 0, sft: float = 1.0, token_weight: SFTWeightName | SFTWeight = "uniform") -> None:
        super().__init__(token_weight)
        require("model.mixing.gate", gate, gate >= 0, "at least 0")
        require("model.mixing.sft", sft, sft >= 0, "at least 0")
        self.gate, self.sft = gate, sft

    def lends(self, graded: "Graded") -> Tensor:
        return graded.correct.sum(-1) <= self.gate

    def trains(self, lent: Tensor) -> Tensor:
        return ~lent

    def share(self, lent: float, asked: float) -> float:
        return 1.0

    def scales(self, step: int) -> tuple[float, float]:
        return 1.0, self.sft
