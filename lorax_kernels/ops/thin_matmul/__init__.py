# SPDX-License-Identifier: Apache-2.0
"""The products with the weights: where a truncated SVD spends its time."""

import torch

from ... import _backends, _ops
from .reference import thin_matmul_reference

_backends.register_reference("thin_matmul", thin_matmul_reference)


def _triton(W: torch.Tensor, X: torch.Tensor, transpose: bool, pieces: int) -> torch.Tensor:
    from .triton_kernel import thin_matmul_triton

    return thin_matmul_triton(W, X, transpose, pieces)


_backends.register(
    "cuda",
    "thin_matmul",
    _backends.Kernel(
        torch.ops.lorax_kernels.thin_matmul,
        "bfloat16, float16 and float32 weights; cuBLAS products of 16-bit pieces",
    ),
)
_backends.register(
    "triton",
    "thin_matmul",
    _backends.Kernel(_triton, "bfloat16, float16 and float32 weights; pieces split in registers"),
)


def thin_matmul(
    W: torch.Tensor,
    X: torch.Tensor,
    *,
    transpose: bool = False,
    pieces: int = 2,
    backend: str = "auto",
) -> torch.Tensor:
    """Product of weight matrices with thin blocks: `W @ X`, or `W^T @ X`.

    Args:
        W: weights `(b, m, n)`, bfloat16, float16 or float32; used in their own dtype, never copied.
        X: blocks `(b, n, l)`, or `(b, m, l)` with `transpose`; float32.
        transpose: multiply by `W^T` instead of `W`.
        pieces: 1, 2 or 3: accuracy asked of a tensor-core backend, as the number of 16-bit parts in
            which `X` (and a float32 `W`) is represented: relative errors of about 2^-9, 2^-17 and
            2^-24. Beside float16 weights parts are float16: 2^-12, 2^-22 and 2^-22, best where the
            largest element of each block is between 2^-8 and 16 (others are scaled, at the cost of
            another pass); elements under 2^-25 then lose bits. The reference always multiplies in
            float32.
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        `(b, m, l)`, or `(b, n, l)` with `transpose`; float32.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
        RuntimeError: a backend named explicitly cannot run here; the message says why.

    Example:
        >>> thin_matmul(torch.eye(3)[None], torch.ones(1, 3, 2)).shape
        torch.Size([1, 3, 2])
    """
    _ops.check_thin_matmul(W, X, transpose, pieces)
    return _backends.select("thin_matmul", backend, W, X, transpose, pieces)(
        W, X, transpose, pieces
    )
