"""Random changes of a matrix that are as large as a given one: what *any* small change does to a spectrum or a model.

All take a change D [m, n] and return fp64 [m, n] of the same Frobenius norm; the same generator state, the same change.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Generator, Tensor

Change = Callable[[Tensor, Generator], Tensor]


def gauss(change: Tensor, draw: Generator) -> Tensor:
    """Independent normal entries."""
    return as_large(torch.randn(change.shape, generator=draw, dtype=torch.float64), change)


def permuted(change: Tensor, draw: Generator) -> Tensor:
    """The same entries at random places."""
    order = torch.randperm(change.numel(), generator=draw)
    return change.double().flatten()[order].view(change.shape)


def rotated(change: Tensor, draw: Generator) -> Tensor:
    """The same singular values in random directions, uniform on both sides."""
    values = torch.linalg.svdvals(change.double())
    u, v = (orthonormal(size, len(values), draw) for size in change.shape)
    return as_large((u * values) @ v.T, change)


CHANGES: Mapping[str, Change] = {"gauss": gauss, "permuted": permuted, "rotated": rotated}


def next_layer(changes: Sequence[Tensor]) -> list[Tensor]:
    """Changes of matrices of one kind, in order of layers: each that of the next layer, scaled to its own norm."""
    return [as_large(other.double(), own) for own, other in zip(changes, [*changes[1:], *changes[:1]], strict=True)]


def as_large(direction: Tensor, change: Tensor) -> Tensor:
    """`direction` scaled to the Frobenius norm of `change`; zeros if it is 0 itself."""
    own, wanted = (torch.linalg.vector_norm(each.double()) for each in (direction, change))
    return direction * (wanted / own) if own > 0 else direction


def orthonormal(size: int, k: int, draw: Generator) -> Tensor:
    """An orthonormal basis of a uniformly random k-dimensional subspace: fp64 [size, k]."""
    q, r = torch.linalg.qr(torch.randn(size, k, generator=draw, dtype=torch.float64))
    return q * r.diagonal().sign()
