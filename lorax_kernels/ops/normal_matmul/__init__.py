# SPDX-License-Identifier: Apache-2.0
"""The pair of products that a polynomial filter is made of."""

import torch

from ... import _backends, _ops
from .reference import normal_matmul_reference

_backends.register_reference("normal_matmul", normal_matmul_reference)


def _triton(W: torch.Tensor, X: torch.Tensor, transpose: bool) -> torch.Tensor:
    from ..thin_matmul.triton_kernel import thin_matmul_triton

    Y = thin_matmul_triton(W, X, transpose, 1)
    return thin_matmul_triton(W, Y, not transpose, 1)


_backends.register(
    "cuda",
    "normal_matmul",
    _backends.Kernel(
        torch.ops.lorax_kernels.normal_matmul,
        "float16 weights; two cuBLAS products, W X in float16",
    ),
)
_backends.register(
    "triton",
    "normal_matmul",
    _backends.Kernel(_triton, "float16 weights; two products, W X in float32 between them"),
)


def normal_matmul(
    W: torch.Tensor, X: torch.Tensor, transpose: bool = False, *, backend: str = "auto"
) -> torch.Tensor:
    """Product of thin blocks with `W^T W`: `W^T (W X)`, or `W (W^T X)`.

    To the accuracy of one float16 piece, and faster than two `thin_matmul`s of one: the block and
    `W X` are each rounded to 11 bits, relative errors of about 2^-12. The reference multiplies in
    float32.

    The compiled kernels hold `W X` in float16, scaled by a power of two that suits weights under
    1/2 in size, as for `gram_halves`, and columns of `X` of a norm up to 63 in a block whose
    largest element is between 2^-8 and 16; in other blocks, of a norm up to 3.9 times the largest
    element. Beyond that a product may leave float16's range, which takes a column along the leading
    direction of weights that are all alike in size; the result is then not finite. Elements of
    `W X` under about `2^-25 sqrt(n)`, with `n` the rows of `X`, lose bits.

    Args:
        W: weights `(b, m, n)`, float16; rows contiguous, anything else is copied.
        X: blocks `(b, n, l)`, or `(b, m, l)` with `transpose`; float32.
        transpose: multiply by `W W^T` instead of `W^T W`.
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        The shape of `X`; float32.

    Raises:
        ValueError, TypeError: arguments that do not fit together; other weights than float16 are
            for two `thin_matmul`s.
        RuntimeError: a backend named explicitly cannot run here; the message says why.

    Example:
        >>> normal_matmul(torch.full((1, 4, 3), 0.25).half(), torch.ones(1, 3, 1)).tolist()
        [[[0.75], [0.75], [0.75]]]
    """
    _ops.check_normal_matmul(W, X, transpose)
    return _backends.select("normal_matmul", backend, W, X, transpose)(W, X, transpose)
