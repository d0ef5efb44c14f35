# SPDX-License-Identifier: Apache-2.0
"""Gram matrices as float16 pieces, through PyTorch's own products."""

import torch

# A float16 holds 11 bits: what the first piece leaves is scaled up by as many.
PIECE = 2.0**11
# Gram matrices are held in float32 a few at a time.
_SCRATCH_BYTES = 256 << 20


def gram_halves_reference(X: torch.Tensor) -> torch.Tensor:
    """`X^T X` of each `(m, n)` matrix in a `(b, m, n)` batch, in two pieces `(2, b, n, n)`."""
    batch, _, n = X.shape
    pieces = torch.empty(2, batch, n, n, dtype=torch.float16, device=X.device)
    step = max(1, _SCRATCH_BYTES // (4 * max(n, 1) ** 2))
    for start in range(0, batch, step):
        some = X[start : start + step]
        if X.is_cuda:
            G = torch.bmm(some.mT, some, out_dtype=torch.float32)
        else:
            G = torch.bmm(some.float().mT, some.float())
        high, low = pieces[:, start : start + step]
        high.copy_(G)
        low.copy_(G.sub_(high).mul_(PIECE))
    return pieces
