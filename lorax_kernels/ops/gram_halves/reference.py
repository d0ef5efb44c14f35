# SPDX-License-Identifier: Apache-2.0
"""Gram matrices as float16 pieces, through PyTorch's own products."""

import torch

# A float16 holds 11 bits: what the first piece leaves is scaled up by as many.
PIECE = 2.0**11
# Gram matrices, and what their first pieces leave, are held in float32 a few at a time.
_SCRATCH_BYTES = 256 << 20


def split(X: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> None:
    """Writes float32 `X` as two float16 pieces, `X = high + low / 2^11`."""
    high.copy_(X)
    low.copy_((X - high).mul_(PIECE))


def gram_halves_reference(X: torch.Tensor) -> torch.Tensor:
    """`X^T X` of each `(m, n)` matrix in a `(b, m, n)` batch, in two pieces `(2, b, n, n)`."""
    batch, _, n = X.shape
    pieces = torch.empty(2, batch, n, n, dtype=torch.float16, device=X.device)
    step = max(1, _SCRATCH_BYTES // (8 * max(n, 1) ** 2))
    for start in range(0, batch, step):
        some = X[start : start + step]
        if X.is_cuda:
            G = torch.bmm(some.mT, some, out_dtype=torch.float32)
        else:
            G = torch.bmm(some.float().mT, some.float())
        split(G, *pieces[:, start : start + step])
    return pieces
