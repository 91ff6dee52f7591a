"""The one file with collectives; in a single process each gives what it was given and communicates nothing."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_group() -> dist.ProcessGroup | None:
    """The group of all ranks, or None in a single process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def leave_group() -> None:
    """End this process's part in every group, where all ranks end: gloo's threads may abort one that just exits."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank_in(group: dist.ProcessGroup | None) -> int:
    """This process's rank in `group`; 0 without a group."""
    return 0 if group is None else dist.get_rank(group)


def rank() -> int:
    """Number of this process."""
    return rank_in(world_group())


def ranks() -> int:
    """How many processes there are."""
    group = world_group()
    return 1 if group is None else dist.get_world_size(group)


def sum_over(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`tensor` summed in place over `group`; unchanged without a group."""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def gather_over(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`tensor` [...] of every rank of `group`, in rank order: [R, ...]; R = 1 without a group."""
    if group is None:
        return tensor[None]
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, tensor.contiguous(), group=group)
    return torch.stack(rows)


def gather_ranks(value: T) -> list[T]:
    """The value of every rank, in rank order; values must pickle."""
    if world_group() is None:
        return [value]
    values: list[T | None] = [None] * ranks()
    dist.all_gather_object(values, value)
    return cast(list[T], values)


def gather_dealt(mine: Sequence[T]) -> list[T]:
    """The items of all ranks, none of them None, in the order in which they were dealt: rank r has every R-th from r.

    So deals a DistributedSampler; the order is that of a single process.
    """
    return [item for row in zip_longest(*gather_ranks(mine)) for item in row if item is not None]


def from_first_rank(value: T) -> T:
    """The first rank's value, on every rank; it must pickle."""
    values = [value]
    if world_group() is not None:
        dist.broadcast_object_list(values)
    return values[0]


def sum_ranks(values: list[Tensor]) -> list[Tensor]:
    """Each scalar summed over all ranks, in one reduction; fp32 where there are several ranks."""
    group = world_group()
    if group is None or not values:
        return values
    return list(sum_over(torch.stack([value.detach().float() for value in values]), group))


def mean_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Each number averaged over all ranks, in one reduction."""
    sums = sum_ranks([torch.tensor(value, device=device) for value in values.values()])
    return {name: float(total) / ranks() for name, total in zip(values, sums, strict=True)}
