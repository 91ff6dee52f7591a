"""What a method that mixes demonstrations into RL steps may decide; the methods are its subclasses, one a file."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mifo_lightning.common.errors import InputError
from mifo_lightning.losses.sft_weights import SFTWeight, SFTWeightName, as_sft_weight

if TYPE_CHECKING:
    from mifo_lightning.rollout.graded import Graded


def as_token_weight(weight: SFTWeightName | SFTWeight) -> SFTWeight:
    """The weight that is named; raises an InputError for one of SFT phases alone."""
    found = as_sft_weight(weight, "model.mixing.token_weight")
    if found.needs_initial_losses:
        raise InputError(f"model.mixing.token_weight: {weight!s:.80} is not allowed; it is one of SFT phases")
    return found


class Mixing:
    """Demonstrations inside RL steps: here those of all questions stand beside their groups and weigh nothing.

    A method overrides what it does otherwise. Q questions have R rollouts each; H are entropies in nats. The SFT loss
    is the mean over the demonstration tokens of the optimizer step.

    Args:
        token_weight: What multiplies each demonstration token's cross-entropy, as `model.sft_loss.weight`.

    Attributes:
        in_group: Whether a demonstration is graded like a rollout, in the place of one of its group, and trained on
            with an advantage of its own.
    """

    in_group = False

    def __init__(self, token_weight: SFTWeightName | SFTWeight = "uniform") -> None:
        self.token_weight = as_token_weight(token_weight)

    def lends(self, graded: "Graded") -> Tensor:
        """[Q] bool: which questions lend their demonstration, if they have one."""
        return torch.ones(len(graded.questions), dtype=torch.bool)

    def trains(self, lent: Tensor) -> Tensor:
        """[Q] bool: whose own rollouts train.

        Args:
            lent: [Q] bool, which questions lend a demonstration.
        """
        return torch.ones_like(lent)

    def push(self, advantages: Tensor, graded: "Graded") -> Tensor:
        """[Q, R] fp32: what pushes own rollouts, given their `advantages` [Q, R]."""
        return advantages

    def share(self, lent: float, asked: float) -> float:
        """What the mean over demonstration tokens counts in an optimizer step.

        Args:
            lent: Questions of the step that lend a demonstration.
            asked: All its questions.
        """
        return lent / asked

    def scales(self, step: int) -> tuple[float, float]:
        """Weights of the policy loss and of the SFT loss in RL step number `step`, from 0."""
        return 1.0, 0.0

    def reweigh(self, advantages: Tensor, entropy: Tensor, own: Tensor) -> Tensor:
        """[B] advantages at the running forward.

        Args:
            advantages: [B] fp32.
            entropy: [B, L] entropies in nats, without gradient.
            own: [B, L] bool, tokens of own rollouts that count.
        """
        return advantages

    def lent_objective(self, advantage: Tensor, p: Tensor) -> Tensor:
        """[B, L] objective of the tokens of demonstrations in a group, which no policy has drawn.

        Args:
            advantage: [B, 1].
            p: [B, L] probabilities of the tokens, with gradient.
        """
        return advantage * p
