# SPDX-License-Identifier: Apache-2.0
"""Shifted Cholesky QR over Triton's products; the factorisation itself is torch's batched one."""

import torch

from ..gram.triton_kernel import gram_triton
from ..rotate.triton_kernel import rotate_triton

# What is added to the unit diagonal before each factorisation. The first must stand clear of the
# error of off-diagonal sums (about 1e-5 for nearly parallel columns), so that none fails; the last
# bounds how far from orthonormal the result is left.
_SHIFTS = (4e-5, 1e-6, 0.0)
# A pivot up to this many shifts says that nothing but rounding is left of its column.
_DEAD_PIVOTS = 4.0


def orthonormalize_triton(X: torch.Tensor, quick: bool) -> torch.Tensor:
    """Orthonormal columns that span the columns of each block; same arguments as the reference.

    Three passes of Cholesky QR, the first two shifted (Fukaya et al., SIAM J. Sci. Comput. 42,
    2020), of which `quick` makes the first only. Columns without a direction of their own become
    noise after the first pass, which the next ones orthogonalise. Nothing is decided on the host.
    """
    rows, columns = X.shape[1:]
    noise = _noise(rows, columns, X.device)
    identity = torch.eye(columns, device=X.device)
    for shift in _SHIFTS[:1] if quick else _SHIFTS:
        largest = X.abs().amax(1, keepdim=True)
        X = X / torch.where(largest == 0, 1.0, largest)
        X = torch.where(largest == 0, noise, X)
        X = X / torch.linalg.vector_norm(X, dim=1, keepdim=True)
        G = gram_triton(X, torch.float32)
        G.diagonal(dim1=1, dim2=2).fill_(1.0 + shift)
        L = torch.linalg.cholesky_ex(G).L
        R = torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False)
        pivots = L.diagonal(dim1=1, dim2=2).square()
        X = rotate_triton(X, R.mT)
        if shift:
            # A pivot that is an error of the Gram matrix betrays itself by the length it leads to.
            length = torch.linalg.vector_norm(X, dim=1)
            lost = (pivots <= _DEAD_PIVOTS * shift) | (length < 0.8) | (length > 1.25)
            X = torch.where(lost[:, None], noise, X)
    return X


def _noise(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """A fixed `(rows, columns)` block without structure, of columns of about unit length."""
    mask = 0xFFFFFFFF
    i = torch.arange(rows, device=device)[:, None] * 0x9E3779B1
    j = (torch.arange(columns, device=device) + 0x7F4A7C15) * 0x85EBCA77
    h = (i ^ j) & mask
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = ((h ^ (h >> shift)) * factor) & mask
    uniform = (h ^ (h >> 16)).double() * 2.0**-31 - 1
    return (uniform * (3 / rows) ** 0.5).float()
