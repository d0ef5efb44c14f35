# SPDX-License-Identifier: Apache-2.0
"""Cholesky QR of long blocks of few columns, in plain PyTorch."""

import torch

# A pivot is at least this share of its column's square. What is left of a column once those before
# it have been taken out is rounding of float32 below the root of it.
_PIVOT = 1e-12
# Rows of a block that are summed by one product.
_ROWS = 256


def cholesky_qr_reference(X: torch.Tensor) -> torch.Tensor:
    """`X L^-T` with `L L^T = X^T X` of each `(n, l)` block, computed in float64."""
    X = X.double()
    G = split_gram(X)
    G.diagonal(dim1=-2, dim2=-1).mul_(1 + _PIVOT).add_(1e-290)
    L = torch.linalg.cholesky_ex(G).L
    return torch.linalg.solve_triangular(L, X.mT, upper=False).mT.float().contiguous()


def split_gram(X: torch.Tensor) -> torch.Tensor:
    """`X^T X` of a long thin block: a few rows at a time, or one multiprocessor would do it all."""
    short = -X.shape[-2] % _ROWS
    if short:
        X = torch.nn.functional.pad(X, (0, 0, 0, short))
    parts = X.unflatten(-2, (-1, _ROWS))
    return (parts.mT @ parts).sum(-3)
