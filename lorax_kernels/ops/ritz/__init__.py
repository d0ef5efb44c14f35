# SPDX-License-Identifier: Apache-2.0
"""The end of a subspace iteration: singular triplets from an orthonormal block and its image."""

import torch

from ... import _backends, _ops
from .._shared_memory import fits
from .reference import DEPENDENT as DEPENDENT
from .reference import DONE as DONE
from .reference import NOT_FINITE as NOT_FINITE
from .reference import ritz_reference

_backends.register_reference("ritz", ritz_reference)

_MOST = 64


def _cuda(
    Q: torch.Tensor, B: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    n = Q.shape[2] + Q.shape[2] % 2
    # Three matrices and three lines in float64, and the order of the eigenvalues.
    has_kernels = n <= _MOST and fits(8 * n * (3 * n + 6) + 512, Q.device)
    return (torch.ops.lorax_kernels.ritz if has_kernels else ritz_reference)(Q, B, k)


_backends.register(
    "cuda",
    "ritz",
    _backends.Kernel(_cuda, f"any size; up to {_MOST} columns in own kernels, else on the host"),
)
_backends.register(
    "triton", "ritz", _backends.Kernel(ritz_reference, "any size; torch.linalg on the host")
)


def ritz(
    Q: torch.Tensor, B: torch.Tensor, k: int, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leading `k` singular triplets of `Q B^T` projected onto the span of `Q`.

    With `B = A^T Q` these are the best that `Q` knows of `A`. `Q` need be orthonormal only roughly:
    its own Gram matrix is taken into account. Inside, everything is float64; the squares of the
    singular values appear there, so that a range of more than 3e4 is refused by status.

    Args:
        Q: `(b, m, l)`, columns orthonormal up to some rounding; float32.
        B: `(b, n, l)`; float32.
        k: triplets, `1 <= k <= l`.
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        `U` `(b, m, k)`, `S` `(b, k)` descending, `V` `(b, n, k)` in float32, and `status` `(b,)`
        int32: `DONE`; `DEPENDENT`, where columns of `Q` are dependent or the singular values too
        far apart; `NOT_FINITE`. Zeros stand where it is not `DONE`. On a GPU nothing waits for it.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
        RuntimeError: a backend named explicitly cannot run here; the message says why.

    Example:
        >>> ritz(torch.eye(2)[None], torch.diag(torch.tensor([3.0, 2.0]))[None], 1)[1]
        tensor([[3.]])
    """
    _ops.check_ritz(Q, B, k)
    return _backends.select("ritz", backend, Q, B, k)(Q, B, k)
