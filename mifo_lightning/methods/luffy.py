"""LUFFY (arXiv 2504.14945)."""

from torch import Tensor

from mifo_lightning.common.errors import require
from mifo_lightning.methods.mixing import Mixing


class Luffy(Mixing):
    """The demonstration is one member of its group; its tokens get the objective `A f(p)`, f(x) = x / (x + shape).

    Args:
        shape: The constant in f.
    """

    in_group = True

    def __init__(self, shape: float = 0.1) -> None:
        super().__init__()
        require("model.mixing.shape", shape, shape > 0, "above 0")
        self.shape = shape

    def lent_objective(self, advantage: Tensor, p: Tensor) -> Tensor:
        return advantage * p / (p + self.shape)
