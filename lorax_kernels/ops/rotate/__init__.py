# SPDX-License-Identifier: Apache-2.0
"""Rotation of a basis by a small matrix."""

import torch

from ... import _backends, _ops
from .reference import rotate_reference

_backends.register_reference("rotate", rotate_reference)


def _triton(X: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    from .triton_kernel import rotate_triton

    return rotate_triton(X, R)


_backends.register(
    "cuda",
    "rotate",
    _backends.Kernel(torch.ops.lorax_kernels.rotate, "any size; cuBLAS products of float16 pieces"),
)
_backends.register(
    "triton", "rotate", _backends.Kernel(_triton, "any size; three bfloat16 pieces in registers")
)


def rotate(X: torch.Tensor, R: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Blocks of columns times small matrices, to float32 accuracy.

    Args:
        X: `(b, n, l)`; float32.
        R: `(b, l, k)`; float32 or float64.
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        `X @ R`, `(b, n, k)`; float32.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
        RuntimeError: a backend named explicitly cannot run here; the message says why.

    Example:
        >>> rotate(torch.ones(1, 4, 2), torch.eye(2)[None]).shape
        torch.Size([1, 4, 2])
    """
    _ops.check_rotate(X, R)
    return _backends.select("rotate", backend, X, R)(X, R)
