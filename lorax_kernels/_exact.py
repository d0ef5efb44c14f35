# SPDX-License-Identifier: Apache-2.0
"""Truncated SVD of a stack through the full eigendecomposition of its Gram matrices.

On a CPU first in float32, which is twice as fast and enough where the singular values at the cut
are not small against the largest; what rounding leaves undecided there is done again in float64,
where squaring the singular values of a float32 matrix costs nothing.
"""

from dataclasses import fields

import torch

from . import ops
from ._subspace import Triplets
from .ops.subspace_error import noise_floor

_TINY = 1e-300


def decompose(W: torch.Tensor, k: int, tol: float, *, backend: str) -> Triplets:
    """Leading `k` singular triplets of each matrix in a stack, with nothing iterated.

    Args:
        W: `(b, m, n)`, scaled so that squares of its entries neither overflow nor vanish.
        k: triplets wanted, at most `min(m, n)`.
        tol: projector error under which float32 will do.
        backend: passed to the ops.

    Returns:
        Triplets; `passes` is zero, and the error says how well the cut at `k` is determined.
    """
    flipped = W.shape[2] > W.shape[1]
    if W.device.type != "cpu" or W.dtype == torch.float64:
        found = _from_gram(W, flipped, k, torch.float64, backend)
    else:
        found = _from_gram(W, flipped, k, torch.float32, backend)
        again = torch.nonzero(found.error > tol).flatten()
        if len(again):
            precise = _from_gram(W[again], flipped, k, torch.float64, backend)
            for f in fields(Triplets):
                getattr(found, f.name)[again] = getattr(precise, f.name)
    if flipped:
        return Triplets(found.V, found.S, found.U, found.error, found.passes)
    return found


def _from_gram(
    W: torch.Tensor, flipped: bool, k: int, dtype: torch.dtype, backend: str
) -> Triplets:
    """Triplets with `U` on the tall side, from the Gram matrix of the short side in `dtype`."""
    tall = W.mT if flipped else W
    G = ops.gram(tall, dtype=dtype, backend=backend)
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
    eps = torch.finfo(torch.float32).eps
    error = _rounding_error(theta, k, max(W.shape[1:]), dtype).clamp_min(eps)
    if dtype == torch.float32:
        # Singular values under 1e-2 sigma_1 have lost two more digits than float32 output shows.
        error = torch.where(theta[:, k - 1] < 1e-4 * theta[:, 0], 1.0, error)
    return Triplets(U, S, V, error, torch.zeros(len(S), dtype=torch.long))


def _rounding_error(theta: torch.Tensor, k: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Projector error from rounding of a Gram matrix in `dtype`.

    An entry of that rounding in the basis of the eigenvectors was measured at 0.02 to 0.6 eps
    theta_1 over the spectra of `testing.SPECTRA`. Where the values at the cut are within the noise
    of float32 input no subspace is determined, and nothing is counted.

    Args:
        theta: eigenvalues `(b, l)`, descending.
        k: where the cut is.
        rows: the longer side of the matrices.
        dtype: of the Gram matrix.

    Returns:
        `(b,)`, float64.
    """
    theta = theta.double().clamp_min(0)
    distance = (theta[:, :k, None] - theta[:, None, k:]).clamp_min(_TINY)
    entry = 0.75 * torch.finfo(dtype).eps * theta[:, :1, None]
    turned = ((entry / distance) ** 2).sum(2).clamp_max(1)
    turned = torch.where(theta[:, :k] > noise_floor(theta, rows), turned, 0.0)
    return (2 / k * turned.sum(1)).sqrt()
