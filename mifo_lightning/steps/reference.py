"""Weights that follow the policy's, the reference's of the KL and a teacher's, and what a checkpoint holds of them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mifo_callbacks.sharding import local, shard_like


@torch.no_grad()
def follow(kept: Mapping[str, Tensor], new: Mapping[str, Tensor], share: float) -> None:
    """Mix new weights into those kept, in place: share * new + (1 - share) * kept (TR-DPO, arXiv 2404.09656).

    Args:
        kept: By name, laid out as the policy's.
        new: The policy's, of all names that are kept.
        share: In (0, 1].
    """
    for name, weight in kept.items():
        local(weight).mul_(1 - share).add_(local(new[name]), alpha=share)


@torch.no_grad()
def take(kept: Mapping[str, Tensor], full: Mapping[str, Tensor]) -> None:
    """Copy full weights into those kept, sharded as these are."""
    for name, weight in kept.items():
        weight.copy_(shard_like(full[name], weight))
