# SPDX-License-Identifier: Apache-2.0
"""Gram matrices of blocks of columns, in plain PyTorch."""

import torch

# Columns of one tile: half of a Gram matrix is the other half transposed. Narrower tiles save more
# products until each is too narrow for a fast GEMM; 96 to 192 measured alike, 384 a third slower.
_TILE = 128


def gram_reference(X: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`X^T X` of each `(m, n)` block in a `(b, m, n)` batch, computed and returned in `dtype`."""
    X = X.to(dtype)
    n = X.shape[2]
    if n <= 2 * _TILE:
        return torch.bmm(X.mT, X)
    G = X.new_empty(X.shape[0], n, n)
    for start in range(0, n, _TILE):
        stop = min(start + _TILE, n)
        tile = torch.bmm(X[:, :, start:stop].mT, X[:, :, start:])
        G[:, start:stop, start:] = tile
        G[:, stop:, start:stop] = tile[:, :, stop - start :].mT
    return G
