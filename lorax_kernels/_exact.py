# SPDX-License-Identifier: Apache-2.0
"""Truncated SVD of a stack through the full eigendecomposition of its Gram matrices.

In float64, so that squaring the singular values costs nothing down to the rounding of the float32
input: directions are resolved to `eps64 sigma_1^2 / gap`.
"""

import math

import torch

from . import ops
from ._subspace import Triplets


def decompose(W: torch.Tensor, k: int, *, backend: str) -> Triplets:
    """Leading `k` singular triplets of each matrix in a stack, with nothing iterated.

    Args:
        W: `(b, m, n)`, scaled so that squares of its entries neither overflow nor vanish.
        k: triplets wanted, at most `min(m, n)`.
        backend: passed to the ops.

    Returns:
        Triplets; `passes` is zero, and the error says how well the cut at `k` is determined.
    """
    flipped = W.shape[2] > W.shape[1]
    tall = W.mT if flipped else W
    G = ops.gram(tall, dtype=torch.float64, backend=backend)
    theta, R = ops.symmetric_eigh(G, backend=backend)
    del G
    V = R[:, :, :k].to(torch.float32).contiguous()
    if W.dtype == torch.float64:
        Y = torch.bmm(tall, R[:, :, :k]).float()
    else:
        Y = ops.thin_matmul(W, V, transpose=flipped, pieces=3, backend=backend)
    del R
    S = torch.linalg.vector_norm(Y, dim=1).cummin(dim=1).values
    U = ops.orthonormalize(Y, backend=backend)
    U = U * torch.where((U * Y).sum(1, keepdim=True) < 0, -1.0, 1.0)
    error = _determined(theta, k, max(W.shape[1:]))
    passes = torch.zeros(len(S), dtype=torch.long)
    return Triplets(V, S, U, error, passes) if flipped else Triplets(U, S, V, error, passes)


def _determined(theta: torch.Tensor, k: int, rows: int) -> torch.Tensor:
    """First-order projector error from rounding, at the cut or where the values sink into it."""
    eps32, eps64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
    theta = theta.clamp_min(0)
    if k == theta.shape[1]:
        return torch.full_like(theta[:, 0], eps32)
    floor = (4 * eps32 * math.sqrt(rows)) ** 2 * theta[:, 0]
    gap = theta[:, k - 1] - theta[:, k]
    wrong = math.sqrt(2 / k) * eps64 * math.sqrt(rows) * theta[:, 0] / gap.clamp_min(1e-300)
    return torch.where(theta[:, k - 1] > floor, wrong.clamp(eps32, 1.0), eps32)
