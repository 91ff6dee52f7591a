"""Directions of matrices: those of the largest singular values, and as many at random."""

import torch
from torch import Tensor

SMALL = 1e-5  # of the largest singular value: smaller ones are rounding, and their directions mean nothing


@torch.no_grad()
def singular_directions(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """U_k [n, k] and V_k [m, k], fp32, of the k largest singular values of `matrix` [n, m]; fewer where it has fewer.

    The whole decomposition, in fp64: n m min(n, m) operations.
    """
    u, sizes, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = min(k, int((sizes > SMALL * sizes[0]).sum()))
    return u[:, :kept].float().contiguous(), vt[:kept].T.float().contiguous()


def random_directions(like: Tensor, generator: torch.Generator) -> Tensor:
    """Orthonormal columns at random, in the shape, dtype and place of `like`; drawn on the CPU."""
    columns: Tensor = torch.linalg.qr(torch.randn(like.shape, generator=generator))[0]
    return columns.to(like)
