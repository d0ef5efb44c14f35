# SPDX-License-Identifier: Apache-2.0
"""`torch.svd_lowrank`'s algorithm for a GPU: the same products, fewer and cheaper steps between.

On a GPU a low-rank SVD of one matrix is latency: PyTorch's takes 2 ms at 512 x 512 and at 8192 x
8192, most of it in Householder QRs and in the SVD of a long thin matrix. Here blocks are
orthonormalised by Cholesky QR in float64, and the end is one small eigenproblem, in float64 and on
the host. Columns are nearly free, so that the block is wider.
"""

import torch

from . import ops

# Columns iterated along beyond those asked for, at least, and what widths are rounded up to.
_EXTRA = 16
_TILE = 32
# Entries from which all products but the last three read the matrix in bfloat16. Rounding by 2^-9
# hides only directions whose energy is below 4e-6 of the matrix's, and the last three find these.
_LARGE = 1 << 26
# A pivot is at least this share of its column's square. What is left of a column once those before
# it have been taken out is rounding of float32 below the root of it.
_PIVOT = 1e-12
# Rows of a block that are summed by one product.
_ROWS = 256
# Where the diagonal of the Cholesky factor of `Q^T Q` is above this, the columns of `Q` are far
# from dependent.
_NEARLY = 0.5
# Down to here the squares of the wanted singular values are known well enough to divide by.
_STEEP = 1e-9
# Up to this size a float64 eigenproblem takes LAPACK less time than a round of small kernels.
_ON_HOST = 128


def block_powers(
    A: torch.Tensor,
    q: int,
    niter: int,
    generator: torch.Generator | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leading `q` triplets from `2 niter + 2` products with a block of more than `q` columns.

    Args:
        A: `(m, n)` or `(b, m, n)`; float32, bfloat16 or float16.
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
    X = torch.randn(min(m, n), width, generator=generator, device=generator.device).to(A.device)
    X = X.expand(*A.shape[:-2], *X.shape)
    count = 2 * niter + 1
    is_rounded = A.dtype == torch.float32 and count > 4 and m * n >= _LARGE
    early = A.bfloat16() if is_rounded else A
    for i in range(count):
        W = early if i < count - 2 else A
        X = _cholesky_qr(_times(W, X, (i % 2 == 1) != flipped, backend))
    del early, W
    B = _times(A, X, not flipped, backend)
    found = _ritz(X, B, q)
    if found is None:
        Q = torch.linalg.qr(X).Q
        found = _by_householder(Q, _times(A, Q, not flipped, backend), q)
    U, S, V = found
    return (V, S, U) if flipped else (U, S, V)


def _times(W: torch.Tensor, X: torch.Tensor, transpose: bool, backend: str) -> torch.Tensor:
    """`W X` or `W^T X`; 16-bit matrices as they lie."""
    if W.dtype == torch.float32:
        return (W.mT if transpose else W) @ X
    found = ops.thin_matmul(
        W.reshape(-1, *W.shape[-2:]),
        X.reshape(-1, *X.shape[-2:]),
        transpose=transpose,
        backend=backend,
    )
    return found.view(*X.shape[:-2], *found.shape[-2:])


def _cholesky_qr(Y: torch.Tensor) -> torch.Tensor:
    """Columns that span those of `Y`, orthonormal up to rounding where these are independent.

    Columns that depend on the ones before them come out short, and a column of zeros stays one.
    """
    Y = Y.double()
    G = _gram(Y)
    G.diagonal(dim1=-2, dim2=-1).mul_(1 + _PIVOT).add_(1e-290)
    L = torch.linalg.cholesky_ex(G).L
    return torch.linalg.solve_triangular(L, Y.mT, upper=False).mT.float()


def _gram(Y: torch.Tensor) -> torch.Tensor:
    """`Y^T Y` of a long thin block: a few rows at a time, or one multiprocessor would do it all."""
    short = -Y.shape[-2] % _ROWS
    if short:
        Y = torch.nn.functional.pad(Y, (0, 0, 0, short))
    parts = Y.unflatten(-2, (-1, _ROWS))
    return (parts.mT @ parts).sum(-3)


def _ritz(
    Q: torch.Tensor, B: torch.Tensor, q: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """SVD of `Q B^T`, projected onto the span of `Q`, through the Gram matrices of both.

    None where these do not tell enough: dependent columns, singular values far apart.
    """
    Q, B = Q.double(), B.double()
    grams = torch.stack([_gram(Q), _gram(B)])
    device = grams.device
    small = grams.cpu() if grams.shape[-1] <= _ON_HOST else grams
    if not bool(small.isfinite().all()):
        raise ValueError("A holds NaN or Inf, or numbers whose products do; no SVD exists")
    K, H = small
    L, info = torch.linalg.cholesky_ex(K)
    if bool(info.any()) or not bool((L.diagonal(dim1=-2, dim2=-1) > _NEARLY).all()):
        return None
    identity = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    C = torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False)
    theta, W = torch.linalg.eigh(C @ H @ C.mT)
    theta, W = theta.flip(-1)[..., :q], W.flip(-1)[..., :q]
    if not bool((theta[..., -1] > _STEEP * theta[..., 0]).all()):
        return None
    S = theta.sqrt()
    turn = C.mT @ W
    left, right = torch.stack([turn, turn / S[..., None, :]]).to(device)
    return (Q @ left).float(), S.float().to(device), (B @ right).float()


def _by_householder(
    Q: torch.Tensor, B: torch.Tensor, q: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SVD of `Q B^T` with orthonormal `Q`; orthonormal factors whatever the rank of `B`."""
    P, R = torch.linalg.qr(B)
    left, S, right = torch.linalg.svd(R.double())
    return Q @ right.mT.float()[..., :q], S[..., :q].float(), P @ left.float()[..., :q]
