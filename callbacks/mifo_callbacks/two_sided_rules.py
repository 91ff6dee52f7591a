"""Freezing rules that weigh what RL needs against what SFT would gain, each seen by the ranks of its coordinates."""

import torch
from torch import Tensor

from mifo_callbacks.freezing_rules import Coordinates, FreezingRule, Scope
from mifo_callbacks.sharding import full


class LowGain(FreezingRule):
    """Freeze where importance is high and SFT's first gradient small: rank(C) - rank(abs g), within the tensor.

    Ranks, since C and g^2 have no common scale, and a quotient C / g^2 would go to coordinates whose one noisy gradient
    happens to be near 0, whatever their importance. Coordinates with C = 0 come last: there is nothing to protect. The
    size of g and g^2 rank alike, so this is the gain to first order of a step along the gradient as of one along its
    sign.
    """

    needs_gradient = True

    def score(self, at: Coordinates) -> Tensor:
        """[shape] fp32, whole also where the parameter is sharded; collective then."""
        importance, gain = full(at.importance), full(at.gradient).abs()
        ranks = count_below(importance) - count_below(gain)  # as integers: equal sums of ranks stay equal
        return torch.where(importance > 0, (ranks / gain.numel() + 1).float(), 0.0)


class OverlapShares(FreezingRule):
    """Freeze the most important of each tensor, more of them where SFT's gradient lies elsewhere.

    The score is (1 - o) times the share of the tensor's coordinates that matter less; o is the mean of that share over
    the energy g^2 of SFT's first gradient: 1/2 if gradient and importance know nothing of each other, near 1 where SFT
    would move just what RL moved. One threshold t over all tensors then freezes a share 1 - t / (1 - o) of each, and
    the given share of all: dear tensors stay free, cheap ones are frozen, and with equal overlaps all get the same.
    """

    needs_gradient = True
    scope: Scope | None = "global"

    def score(self, at: Coordinates) -> Tensor:
        """[shape] fp32, whole also where the parameter is sharded; collective then."""
        importance = full(at.importance)
        below = count_below(importance) / importance.numel()
        return (below * (1 - energy_overlap(below, full(at.gradient)))).float()


def count_below(values: Tensor) -> Tensor:
    """For each of `values` how many of them are smaller, fp64 in their shape; equal ones have equal counts."""
    flat = values.reshape(-1)
    return torch.searchsorted(flat.sort().values, flat).double().view(values.shape)


def energy_overlap(below: Tensor, gradient: Tensor) -> Tensor:
    """Mean of `below`, shares in fp64, over the energy of `gradient`, of that shape: fp64 scalar; 1/2 without."""
    energy = gradient.double().square()
    total = energy.sum()
    return torch.where(total > 0, (below * energy).sum() / total, 0.5)
