"""Putting part of one matrix back: pure functions, fp64 in and out.

`tuned` = `base` + D, [m, n]; u [m, k] and v [n, k] are orthonormal. `inside` and `touching` are orthogonal projections
of D: they depend on the two subspaces alone, never on the vectors chosen in them, and what they leave of D is never
larger than D. `as_published` is neither (see there).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from experiments.heal.geometry import Svd

End = Literal["top", "tail"]


def bases(of: Svd, k: int, end: End) -> tuple[Tensor, Tensor]:
    """u [m, k] and v [n, k] of the k largest (top) or smallest (tail) singular values, k from 1 to min(m, n)."""
    part = slice(None, k) if end == "top" else slice(len(of.s) - k, None)
    return of.u[:, part], of.v[:, part]


def inside(change: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The block of a change between both subspaces: P D Q with P = u u^T and Q = v v^T."""
    return u @ (u.T @ change @ v) @ v.T


def touching(change: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """All of a change that touches either subspace: P D + D Q - P D Q; the whole of D where one is everything."""
    left = u @ (u.T @ change)
    rest = change - left
    return left + (rest @ v) @ v.T


def block(tuned: Tensor, base: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """`tuned` without what it changed inside the block; `base` itself where k = m = n."""
    return tuned - inside(tuned - base, u, v)


def either(tuned: Tensor, base: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """`tuned` without what it changed in either subspace; `base` itself where k = min(m, n)."""
    return tuned - touching(tuned - base, u, v)


def values(tuned: Svd, base: Svd) -> Tensor:
    """The tuned directions with the base's singular values, paired by rank."""
    return Svd(tuned.u, base.s, tuned.v).product()


def directions(tuned: Svd, base: Svd) -> Tensor:
    """The base's directions, all of them, with the tuned singular values, paired by rank."""
    return Svd(base.u, tuned.s, base.v).product()


class Published(NamedTuple):
    """What `as_published` makes: the matrix, max |U^T U - I| of its mixed factor, and whether it returned early."""

    weight: Tensor
    orthonormality: float
    early: bool


def as_published(tuned: Svd, base: Svd, k_top: int, k_tail: int, *, with_values: bool) -> Published:
    """The restoration of the authors' code (svd_recover.py; svd_recover_dir.py without values), fp64 in place of fp16.

    The first k_top and the last k_tail singular vectors are the base's, those in between the tuned ones. Such a mixture
    is not orthonormal, so the product can lie farther from the base than the tuned matrix. Where both numbers reach
    min(m, n) the code returns the base matrix, its values too, even when only directions are asked for.
    """
    rank = len(base.s)
    k_top = min(k_top, rank)
    k_tail = min(k_tail, rank - k_top)
    if k_top + k_tail == rank:
        return Published(base.product(), 0.0, True)
    between = slice(k_top, rank - k_tail)
    u, s, v = base.u.clone(), (base.s if with_values else tuned.s).clone(), base.v.clone()
    u[:, between], v[:, between], s[between] = tuned.u[:, between], tuned.v[:, between], tuned.s[between]
    error = float((u.T @ u - torch.eye(rank, dtype=u.dtype)).abs().max())
    return Published(Svd(u, s, v).product(), error, False)
