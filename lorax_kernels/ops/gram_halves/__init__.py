# SPDX-License-Identifier: Apache-2.0
"""Gram matrices of weights, in the form in which tensor cores multiply with them."""

import torch

from ... import _backends, _ops
from .reference import PIECE as PIECE
from .reference import gram_halves_reference
from .reference import split as split

_backends.register_reference("gram_halves", gram_halves_reference)
_backends.register(
    "cuda",
    "gram_halves",
    _backends.Kernel(
        torch.ops.lorax_kernels.gram_halves, "float16; cuBLAS products of half the matrix"
    ),
)
_backends.register(
    "triton", "gram_halves", _backends.Kernel(gram_halves_reference, "float16; torch's products")
)


def gram_halves(X: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Gram matrices `X^T X` of a batch as two float16 pieces, `G = P_0 + P_1 / 2^11`.

    Sums are made as tensor cores make them: the diagonal loses about `1.5 * 2^-24` of itself a step
    of 16 rows, 6.5e-5 at 11008. Enough for a filter, which is what they are for; `gram` is the
    accurate one.

    Args:
        X: `(b, m, n)`, float16; rows or columns contiguous, anything else is copied. Entries under
            1/2 in size and at most 2^17 rows cannot leave float16's range; what does is not
            finite.
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        `(2, b, n, n)`, float16; from the compiled kernels, each piece symmetric to the last bit.

    Raises:
        ValueError, TypeError: not a batch of float16 matrices.
        RuntimeError: a backend named explicitly cannot run here; the message says why.

    Example:
        >>> gram_halves(torch.ones(1, 3, 1, dtype=torch.float16)).tolist()
        [[[[3.0]]], [[[0.0]]]]
    """
    _ops.check_gram_halves(X)
    return _backends.select("gram_halves", backend, X)(X)
