# SPDX-License-Identifier: Apache-2.0
"""`torch.svd_lowrank`'s algorithm for a GPU: the same products, fewer and cheaper steps between.

On a GPU a low-rank SVD of one matrix is latency: PyTorch's takes 1.2 ms at 512 x 512 and at
4096 x 4096, most of it in Householder QRs and in the SVD of a long thin matrix. Here blocks are
orthonormalised by Cholesky QR in float64, and the end is one small float64 eigenproblem: three
small kernels each, and one wait for the device at the very end. Columns are nearly free, so that
the block is wider.
"""

import torch

from . import ops
from .ops.ritz import DONE, NOT_FINITE

# Columns iterated along beyond those asked for, at least, and what widths are rounded up to.
_EXTRA = 16
_TILE = 32
# Entries from which all products but the last three read the matrix in bfloat16. Rounding by 2^-9
# hides only directions whose energy is below 4e-6 of the matrix's, and the last three find these.
_LARGE = 1 << 26


def block_powers(
    A: torch.Tensor,
    q: int,
    niter: int,
    generator: torch.Generator | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leading `q` triplets from `2 niter + 2` products with a block of more than `q` columns.

    Args:
        A: `(..., m, n)`; float32, bfloat16 or float16.
        q: triplets, `1 <= q <= min(m, n)`.
        niter: subspace iterations.
        generator: source of the starting block, None for a fixed seed.
        backend: passed to the ops.

    Returns:
        `U`, `S`, `V` in float32.

    Raises:
        ValueError: a NaN or Inf in A.

    Source: algorithms 4.4 and 5.1 of Halko, Martinsson and Tropp, SIAM Review 53 (2011).
    """
    m, n = A.shape[-2:]
    flipped = m < n
    width = min(-(-(q + _EXTRA) // _TILE) * _TILE, m, n)
    if generator is None:
        generator = torch.Generator(A.device).manual_seed(0)
    X = torch.randn(
        min(m, n), width, dtype=torch.float32, device=generator.device, generator=generator
    ).to(A.device)
    W = A.reshape(-1, m, n)
    X = X.expand(len(W), *X.shape)
    count = 2 * niter + 1
    is_rounded = A.dtype == torch.float32 and count > 4 and m * n >= _LARGE
    early = W.bfloat16() if is_rounded else W
    for i in range(count):
        near = early if i < count - 2 else W
        Y = _times(near, X, (i % 2 == 1) != flipped, backend)
        X = ops.cholesky_qr(Y, backend=backend)
    del early, near
    B = _times(W, X, not flipped, backend)
    U, S, V, status = ops.ritz(X, B, q, backend=backend)
    worst = max(status.tolist())
    if worst == NOT_FINITE:
        raise ValueError("A holds NaN or Inf, or numbers whose products do; no SVD exists")
    if worst != DONE:
        Q = torch.linalg.qr(X).Q
        U, S, V = _by_householder(Q, _times(W, Q, not flipped, backend), q)
    if flipped:
        U, V = V, U
    batch = A.shape[:-2]
    return U.view(*batch, m, q), S.view(*batch, q), V.view(*batch, n, q)


def _times(W: torch.Tensor, X: torch.Tensor, transpose: bool, backend: str) -> torch.Tensor:
    """`W X` or `W^T X`; 16-bit matrices as they lie."""
    if W.dtype == torch.float32:
        W = W.mT if transpose else W
        # A batch of one is a plain product, for which cuBLAS has more kernels to choose from.
        return (W[0] @ X[0])[None] if len(W) == 1 else W @ X
    return ops.thin_matmul(W, X, transpose=transpose, backend=backend)


def _by_householder(
    Q: torch.Tensor, B: torch.Tensor, q: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SVD of `Q B^T` with orthonormal `Q`; orthonormal factors whatever the rank of `B`."""
    P, R = torch.linalg.qr(B)
    left, S, right = torch.linalg.svd(R.double())
    return Q @ right.mT.float()[..., :q], S[..., :q].float(), P @ left.float()[..., :q]
