"""The reference of the KL: how it follows the policy, and what a checkpoint holds of it once it has."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mifo_callbacks.sharding import full_on_first_rank, shard_like
from mifo_lightning.policy.policy import Policy


@torch.no_grad()
def follow(reference: Policy, policy: Policy, share: float) -> None:
    """Mix the policy into the reference: share * policy + (1 - share) * reference (TR-DPO, arXiv 2404.09656)."""
    reference.to(policy.device)
    for kept, new in zip(reference.parameters(), policy.parameters(), strict=True):
        kept.mul_(1 - share).add_(new, alpha=share)


def weights_of(references: Sequence[Policy]) -> dict[str, Tensor]:
    """Full weights by name, on the first rank; collective if they are sharded."""
    return full_on_first_rank({name: p.detach() for r in references for name, p in r.named_parameters()})


@torch.no_grad()
def load_weights(references: Sequence[Policy], weights: dict[str, Tensor]) -> None:
    """Take these full weights, sharded as the reference is."""
    for reference in references:
        for name, parameter in reference.named_parameters():
            parameter.copy_(shard_like(weights[name], parameter))
