"""How far do singular values and singular subspaces of one matrix move? Everything is computed in fp64 on the CPU.

Vectors that belong to close singular values are arbitrary, and so is every sign: only subspaces are compared.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Svd(NamedTuple):
    """W = u diag(s) v^T: u [m, r], s [r] descending, v [n, r], all fp64; r = min(m, n)."""

    u: Tensor
    s: Tensor
    v: Tensor

    def product(self) -> Tensor:
        """The matrix, [m, n] fp64."""
        return (self.u * self.s) @ self.v.T


@dataclass(frozen=True)
class Turn:
    """The subspaces of the k largest singular values of W against those of W + D.

    Attributes:
        k: Their dimension.
        left_mean, left_max, right_mean, right_max: Principal angles, degrees.
        left_distance, right_distance: sqrt(k - |A^T B|_F^2) of orthonormal bases A and B.
        energy: |U U^T D V V^T|^2 / |D|^2 over k^2 / (m n), what it is for a random D.
        gap: s_k - s_(k+1) of W.
        bound: |D|_2 / gap; above 1 the theorems of Davis-Kahan and Wedin say nothing about these angles.
    """

    k: int
    left_mean: float
    left_max: float
    right_mean: float
    right_max: float
    left_distance: float
    right_distance: float
    energy: float
    gap: float
    bound: float


@dataclass(frozen=True)
class Movement:
    """One matrix before and after.

    Attributes:
        relative_median, relative_max: Of |ds_i| / s_i, singular values paired by rank.
        values: |ds|_2 / |D|_F: how much of the change the singular values show; at most 1.
        norm: |D|_F.
        turns: By the name of k.
    """

    relative_median: float
    relative_max: float
    values: float
    norm: float
    turns: dict[str, Turn]


def svd(weight: Tensor) -> Svd:
    """The thin SVD of [m, n] in fp64, whatever the dtype and device of `weight`."""
    u, s, vt = torch.linalg.svd(weight.detach().cpu().double(), full_matrices=False)
    return Svd(u, s, vt.T)


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles between the spans of orthonormal a and b, both fp64 [m, k]: [k] ascending, radians.

    By the arcsine of the residual below 45 degrees and the arccosine above (Bjorck and Golub, 1973): near 0 the cosine
    is flat, so that its inverse turns rounding of size e into an angle of sqrt(2 e).
    """
    overlap = a.T @ b
    cosines = torch.linalg.svdvals(overlap).clamp(max=1.0)
    sines = torch.linalg.svdvals(b - a @ overlap).clamp(max=1.0).flip(0)
    return torch.where(cosines**2 >= 0.5, sines[: len(cosines)].arcsin(), cosines.arccos())


def movement(before: Tensor, after: Tensor, ranks: Mapping[str, int], known: Svd | None = None) -> Movement:
    """How far [m, n] moves, at each named rank; `known` is the SVD of `before`, if there is one already.

    A rank above min(m, n) / 2 is left out: at min(m, n) one side spans everything and its angles are 0 by construction.
    """
    old, new = known or svd(before), svd(after)
    change = after.detach().cpu().double() - before.detach().cpu().double()
    norm = float(torch.linalg.vector_norm(change))
    shift = (new.s - old.s).abs()
    relative = shift / old.s.clamp(min=torch.finfo(torch.float64).tiny)
    spectral = float(torch.linalg.matrix_norm(change, 2))
    turns = {name: _turn(old, new, change, k, norm, spectral) for name, k in ranks.items() if 1 <= k <= len(old.s) // 2}
    values = float(torch.linalg.vector_norm(shift)) / norm if norm else 0.0
    return Movement(float(relative.median()), float(relative.max()), values, norm, turns)


def _turn(old: Svd, new: Svd, change: Tensor, k: int, norm: float, spectral: float) -> Turn:
    left, right = principal_angles(old.u[:, :k], new.u[:, :k]), principal_angles(old.v[:, :k], new.v[:, :k])
    inside = float((old.u[:, :k].T @ change @ old.v[:, :k]).square().sum())
    gap = float(old.s[k - 1] - old.s[k])
    chance = k * k / change.numel()
    return Turn(
        k=k,
        left_mean=float(left.rad2deg().mean()),
        left_max=float(left.rad2deg().max()),
        right_mean=float(right.rad2deg().mean()),
        right_max=float(right.rad2deg().max()),
        left_distance=float(torch.linalg.vector_norm(left.sin())),
        right_distance=float(torch.linalg.vector_norm(right.sin())),
        energy=inside / norm**2 / chance if norm else float("nan"),
        gap=gap,
        bound=spectral / gap if gap else float("inf"),
    )
