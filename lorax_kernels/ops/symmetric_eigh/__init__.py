# SPDX-License-Identifier: Apache-2.0
"""Batched symmetric eigenproblems."""

import torch

from ... import _backends, _ops
from .reference import symmetric_eigh_reference

_backends.register_reference("symmetric_eigh", symmetric_eigh_reference)


_backends.register(
    "cuda",
    "symmetric_eigh",
    _backends.Kernel(
        torch.ops.lorax_kernels.symmetric_eigh,
        "float32 and float64; cuSOLVER's XsyevBatched, torch.linalg.eigh before CUDA 12.6.2",
    ),
)
# A tridiagonalisation is latency and memory traffic, where Triton has nothing to win.
_backends.register(
    "triton",
    "symmetric_eigh",
    _backends.Kernel(symmetric_eigh_reference, "float32 and float64; torch.linalg.eigh"),
)


def symmetric_eigh(H: torch.Tensor, *, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Eigendecomposition of a batch of symmetric matrices, largest eigenvalue first.

    Args:
        H: `(b, l, l)`; float32 or float64, symmetric.
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        Eigenvalues `(b, l)`, descending, and eigenvectors `(b, l, l)`, one a column.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
        RuntimeError: a backend named explicitly cannot run here; the message says why.

    Example:
        >>> symmetric_eigh(torch.diag_embed(torch.tensor([[1.0, 3.0]])))[0]
        tensor([[3., 1.]])
    """
    _ops.check_symmetric_eigh(H)
    return _backends.select("symmetric_eigh", backend, H)(H)
