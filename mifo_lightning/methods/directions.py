"""Directions of matrices: those of the largest singular values, and as many at random."""

import torch
from torch import Tensor

from mifo_lightning.common.seeds import stable_key

SMALL = 1e-5  # of the largest singular value: smaller ones are rounding, and their directions mean nothing


@torch.no_grad()
def singular_directions(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """U_k [n, k] and V_k [m, k], fp32, of the k largest singular values of `matrix` [n, m]; fewer where it has fewer.

    The whole decomposition, in fp64: n m min(n, m) operations.
    """
    u, sizes, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = min(k, int((sizes > SMALL * sizes[0]).sum()))
    return u[:, :kept].float().contiguous(), vt[:kept].T.float().contiguous()


def at_random(u: Tensor, v: Tensor, *key: int) -> tuple[Tensor, Tensor]:
    """As many directions at random: orthonormal columns in the shape, dtype and place of each, drawn on the CPU."""
    generator = torch.Generator().manual_seed(stable_key(*key))
    left, right = (torch.linalg.qr(torch.randn(x.shape, generator=generator))[0].to(x) for x in (u, v))
    return left, right
