"""Small collectives that also work in one process."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def ranks() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_ranks(value: Any) -> list[Any]:
    """The value of every rank, in rank order; values must pickle."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_ranks(values: list[Tensor]) -> list[Tensor]:
    """Each scalar summed over all ranks, in one reduction."""
    if not (dist.is_available() and dist.is_initialized()) or not values:
        return values
    stacked = torch.stack([value.detach().float() for value in values])
    dist.all_reduce(stacked)
    return list(stacked)


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank, if it is sharded; collective then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mean_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Each number averaged over all ranks, in one reduction."""
    sums = sum_ranks([torch.tensor(value, device=device) for value in values.values()])
    return {name: float(total) / ranks() for name, total in zip(values, sums, strict=True)}
