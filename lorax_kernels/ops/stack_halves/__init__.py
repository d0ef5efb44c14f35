# SPDX-License-Identifier: Apache-2.0
"""Weights as tensor cores take them: scaled into float16's range, stacked."""

from collections.abc import Sequence

import torch

from ... import _backends, _ops
from .reference import magnitudes as magnitudes
from .reference import stack_halves_reference

_backends.register_reference("stack_halves", stack_halves_reference)
_backends.register(
    "cuda",
    "stack_halves",
    _backends.Kernel(
        torch.ops.lorax_kernels.stack_halves, "bfloat16 and float16; one launch for all matrices"
    ),
)
_backends.register(
    "triton",
    "stack_halves",
    _backends.Kernel(stack_halves_reference, "bfloat16 and float16; torch's norms and copies"),
)


def stack_halves(
    matrices: Sequence[torch.Tensor], exponents: Sequence[int], *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices of one shape, each times a power of two, as one float16 stack.

    The compiled kernels read each matrix once, for both results: whoever chose the exponents
    without having seen all entries learns from the second whether they suit.

    Args:
        matrices: at least one, `(m, n)`, all bfloat16 or all float16, on one device.
        exponents: one a matrix, from -200 to 200: `e` multiplies by `2^e`. A result beyond
            float16's range is infinite; under 2^-14 it loses digits, under 2^-25 it is zero.
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        The stack `(b, m, n)`, float16, contiguous; and the largest magnitude of each matrix as it
        was given, `(b,)`, float32: NaN where it holds one, 0 where it has no entry.

    Raises:
        ValueError, TypeError: lists that do not fit together.
        RuntimeError: a backend named explicitly cannot run here; the message says why.

    Example:
        >>> stack_halves([torch.tensor([[1.0, -2.0]]).bfloat16()], [3])
        (tensor([[[  8., -16.]]], dtype=torch.float16), tensor([2.]))
    """
    matrices, exponents = list(matrices), list(exponents)
    _ops.check_stack_halves(matrices, exponents)
    return _backends.select("stack_halves", backend, matrices)(matrices, exponents)
