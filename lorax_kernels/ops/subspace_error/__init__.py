# SPDX-License-Identifier: Apache-2.0
"""How wrong a computed subspace is, estimated after the fact."""

import torch

from ... import _backends, _ops
from .reference import noise_floor as noise_floor
from .reference import subspace_error_reference

_backends.register_reference("subspace_error", subspace_error_reference)
_backends.register(
    "cuda",
    "subspace_error",
    _backends.Kernel(torch.ops.lorax_kernels.subspace_error, "float32 and float64; one launch"),
)
_backends.register(
    "triton",
    "subspace_error",
    _backends.Kernel(subspace_error_reference, "float32 and float64; torch's own kernels"),
)


def subspace_error(
    C: torch.Tensor, theta: torch.Tensor, known: int, k: int, rows: int, *, backend: str = "auto"
) -> torch.Tensor:
    """Relative projector errors of the leading `k` Ritz vectors of blocks, from their residuals.

    First-order perturbation theory of `A = W^T W`: a vector `i` among the leading `k` is off by
    `e_ij / (theta_i - theta_j)` towards every other vector `j`, and only towards vectors beyond `k`
    does it matter. The relative projector error is `sqrt(2/k sum e_ij^2 / (theta_i - theta_j)^2)`.

    Three things are wrong with a Ritz vector: what lies outside the block; to second order, what
    the outside mixes in from the block's other vectors beyond `k`, which matters where the spectrum
    is flat; and what rounding mixes in, which matters where values nearly coincide.

    Args:
        C: Gram matrix of the residuals `A Q - Q theta`, `(b, l, l)`; or only their squared lengths
            `(b, l)`, which tell nothing of what is mixed. float32 or float64.
        theta: Ritz values, or Rayleigh quotients, `(b, l)`, descending; float32 or float64.
        known: eigenvalues outside the block begin at `theta[:, known - 1]`, or with a full `C` at
            the last value and its residual if that is more; from 1 to `l`.
        k: where the cut is; from 1 to `l`.
        rows: the longer side of the matrices, whose products' rounding it scales.
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        `(3, b)`, float64: the error (not capped at a right angle where only lengths were given),
        what of it comes from outside, which a filter damps, not capped, and what is mixed within,
        which is of the second order of what a filter damps. NaN where something was not a number.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
        RuntimeError: a backend named explicitly cannot run here; the message says why.

    Example:
        >>> theta = torch.tensor([[4.0, 2.0, 1.0]])
        >>> subspace_error(torch.tensor([[0.09, 0.0, 0.0]]), theta, 3, 1, 10)[0]
        tensor([0.1414], dtype=torch.float64)
    """
    _ops.check_subspace_error(C, theta, known, k)
    arguments = (C, theta, known, k, rows)
    return _backends.select("subspace_error", backend, *arguments)(*arguments)
