# SPDX-License-Identifier: Apache-2.0
"""Rotation of a basis by a small matrix."""

import torch

from ... import _backends, _ops
from .reference import rotate_reference

_backends.register_reference("rotate", rotate_reference)


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
