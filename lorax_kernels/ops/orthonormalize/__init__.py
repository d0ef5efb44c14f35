# SPDX-License-Identifier: Apache-2.0
"""Orthonormal bases of blocks."""

import torch

from ... import _backends, _ops
from .reference import orthonormalize_reference

_backends.register_reference("orthonormalize", orthonormalize_reference)


def _triton(X: torch.Tensor, quick: bool) -> torch.Tensor:
    from .triton_kernel import orthonormalize_triton

    return orthonormalize_triton(X, quick)


_backends.register(
    "cuda",
    "orthonormalize",
    _backends.Kernel(
        torch.ops.lorax_kernels.orthonormalize,
        "any size; Cholesky QR of float16 pieces, two to six passes, one if quick",
    ),
)
_backends.register(
    "triton",
    "orthonormalize",
    _backends.Kernel(_triton, "any size; shifted Cholesky QR over torch's Cholesky"),
)


def orthonormalize(X: torch.Tensor, *, quick: bool = False, backend: str = "auto") -> torch.Tensor:
    """Orthonormal columns that span the columns of each block.

    Args:
        X: `(b, n, l)` with `l <= n`; float32. Columns may differ in scale by any factor and may be
            dependent: the result is orthonormal all the same.
        quick: well-conditioned columns will do, as between two products of an iteration. One pass
            instead of two to six, and nothing waits for the device; columns of which less than
            about a three-hundredth is independent of those before them are replaced.
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        `Q` of the same shape, `Q^T Q = I` to about 1e-6; with `quick` to about 1e-2, where the
        columns of `X` are well conditioned once they are scaled to one length. Column `j` lies in
        the span of the first `j + 1` columns of `X`, on the side of column `j`, up to the backend's
        treatment of dependent columns.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
        RuntimeError: a backend named explicitly cannot run here; the message says why.

    Example:
        >>> Q = orthonormalize(torch.randn(1, 8, 3))
        >>> bool(torch.allclose(Q.mT @ Q, torch.eye(3), atol=1e-5))
        True
    """
    _ops.check_orthonormalize(X)
    return _backends.select("orthonormalize", backend, X, quick)(X, quick)
