# SPDX-License-Identifier: Apache-2.0
"""Gram matrices of thin blocks and of weights."""

import torch

from ... import _backends, _ops
from .reference import gram_reference

_backends.register_reference("gram", gram_reference)


def _triton(X: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from .triton_kernel import gram_triton

    # Triton's float64 products run beside the tensor cores that torch's run on.
    wide = torch.float64 in (dtype, X.dtype)
    return gram_reference(X, dtype) if wide else gram_triton(X, dtype)


_backends.register(
    "cuda",
    "gram",
    _backends.Kernel(torch.ops.lorax_kernels.gram, "any dtype; cuBLAS products, float64 as such"),
)
_backends.register(
    "triton",
    "gram",
    _backends.Kernel(_triton, "any dtype; float64 through torch's products"),
)


def gram(
    X: torch.Tensor, *, dtype: torch.dtype = torch.float32, backend: str = "auto"
) -> torch.Tensor:
    """Gram matrices `X^T X` of a batch of blocks.

    Args:
        X: `(b, n, l)`; bfloat16, float16, float32 or float64.
        dtype: float32 or float64: the precision of products, sums and result.
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        `(b, l, l)` in `dtype`, symmetric to the last bit.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
        RuntimeError: a backend named explicitly cannot run here; the message says why.

    Example:
        >>> gram(torch.ones(1, 4, 2))
        tensor([[[4., 4.],
                 [4., 4.]]])
    """
    _ops.check_gram(X, dtype)
    return _backends.select("gram", backend, X, dtype)(X, dtype)
