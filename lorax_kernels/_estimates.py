# SPDX-License-Identifier: Apache-2.0
"""What rounding does to subspaces that were computed exactly otherwise."""

import torch

from .ops.subspace_error import noise_floor

_TINY = 1e-300


def rounding_error(theta: torch.Tensor, k: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
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
