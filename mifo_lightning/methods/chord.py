"""CHORD (arXiv 2508.11408)."""

import math

from mifo_lightning.common.errors import require
from mifo_lightning.losses.sft_weights import SFTWeight, SFTWeightName
from mifo_lightning.methods.mixing import Mixing


class Chord(Mixing):
    """`(1 - mu) L_policy + mu L_SFT` in every step, the demonstrations beside their groups.

    Args:
        mu: Weight of the SFT loss at the first RL step.
        mu_end: Weight to which it goes along half a cosine; null: it stays.
        decay_steps: RL steps that this takes; needed with `mu_end`.
        convex: Whether the policy loss weighs 1 - mu; false: 1.
        token_weight: What multiplies each demonstration token's cross-entropy; `chord` is its phi, p (1 - p).
    """

    def __init__(
        self,
        mu: float = 0.9,
        mu_end: float | None = None,
        decay_steps: int = 0,
        convex: bool = True,
        token_weight: SFTWeightName | SFTWeight = "uniform",
    ) -> None:
        super().__init__(token_weight)
        allowed = "between 0 and 1" if convex else "at least 0"
        for key, value in (("mu", mu), ("mu_end", mu if mu_end is None else mu_end)):
            require(f"model.mixing.{key}", value, 0 <= value <= (1 if convex else math.inf), allowed)
        require(
            "model.mixing.decay_steps",
            decay_steps,
            decay_steps >= (mu_end is not None),
            "at least 1 with mu_end, else 0",
        )
        self.mu, self.mu_end, self.decay_steps, self.convex = mu, mu_end, decay_steps, convex

    def mu_at(self, step: int) -> float:
        """Weight of the SFT loss in RL step number `step`, from 0."""
        if self.mu_end is None:
            return self.mu
        done = min(1.0, step / self.decay_steps)
        return self.mu_end + (self.mu - self.mu_end) * (1 + math.cos(math.pi * done)) / 2

    def scales(self, step: int) -> tuple[float, float]:
        mu = self.mu_at(step)
        return 1 - mu if self.convex else 1.0, mu
