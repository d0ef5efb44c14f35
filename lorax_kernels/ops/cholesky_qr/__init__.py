# SPDX-License-Identifier: Apache-2.0
"""Orthonormal columns of single long blocks at the price of three small kernels."""

import torch

from ... import _backends, _ops
from .._shared_memory import fits
from .reference import cholesky_qr_reference

_backends.register_reference("cholesky_qr", cholesky_qr_reference)

_MOST = 128


def _cuda(X: torch.Tensor) -> torch.Tensor:
    l = X.shape[2]
    # The triangle, padded, and 32 rows of the block, in float64.
    has_kernels = l <= _MOST and fits(8 * l * (l + -l % 32 + 32), X.device)
    return (torch.ops.lorax_kernels.cholesky_qr if has_kernels else cholesky_qr_reference)(X)


_backends.register(
    "cuda",
    "cholesky_qr",
    _backends.Kernel(_cuda, f"any size; up to {_MOST} columns in own kernels"),
)
# The factor is dependent steps in shared memory, which Triton does not give hold of.
_backends.register(
    "triton",
    "cholesky_qr",
    _backends.Kernel(cholesky_qr_reference, "any size; torch.linalg's Cholesky"),
)


def cholesky_qr(X: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Columns that span those of each block, orthonormal where these are independent.

    Gram matrix, Cholesky factor and product in float64, once: independent columns of condition up
    to 1e5 come out orthonormal to float32's rounding. Columns that depend on those before come out
    short, and a column of zeros stays one: `orthonormalize` is the op that mends them.

    Args:
        X: `(b, n, l)`, `l <= n`; float32.
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        `(b, n, l)`; float32.

    Raises:
        ValueError, TypeError: not a batch of float32 blocks, or more columns than rows.
        RuntimeError: a backend named explicitly cannot run here; the message says why.

    Example:
        >>> cholesky_qr(torch.tensor([[[3.0], [4.0]]]))
        tensor([[[0.6000],
                 [0.8000]]])
    """
    _ops.check_cholesky_qr(X)
    return _backends.select("cholesky_qr", backend, X)(X)
