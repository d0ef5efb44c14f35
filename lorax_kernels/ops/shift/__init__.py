# SPDX-License-Identifier: Apache-2.0
"""The step between two products of a polynomial filter."""

import torch

from ... import _backends, _ops
from .reference import shift_reference

_backends.register_reference("shift", shift_reference)


def _triton(Z: torch.Tensor, X: torch.Tensor, a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    from .triton_kernel import shift_triton

    return shift_triton(Z, X, a, s)


_backends.register(
    "cuda",
    "shift",
    _backends.Kernel(torch.ops.lorax_kernels.shift, "any size; two reads and one write an element"),
)
_backends.register(
    "triton", "shift", _backends.Kernel(_triton, "any size; two reads and one write an element")
)


def shift(
    Z: torch.Tensor, X: torch.Tensor, a: torch.Tensor, s: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """One factor of a polynomial filter, `(Z - a X) s`, after the product `Z = A X`.

    Args:
        Z: `(b, n, l)`; float32.
        X: `(b, n, l)`; float32.
        a: `(b,)`, the root of each matrix's factor; float32.
        s: `(b, l)`, what each column of the result is multiplied by; float32.
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        `(Z - a X) s`, `(b, n, l)`; float32.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
        RuntimeError: a backend named explicitly cannot run here; the message says why.

    Example:
        >>> Z, X = torch.full((1, 2, 1), 5.0), torch.ones(1, 2, 1)
        >>> shift(Z, X, torch.tensor([3.0]), torch.tensor([[0.5]]))
        tensor([[[1.],
                 [1.]]])
    """
    _ops.check_shift(Z, X, a, s)
    return _backends.select("shift", backend, Z, X, a, s)(Z, X, a, s)
