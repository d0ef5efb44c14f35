# SPDX-License-Identifier: Apache-2.0
"""A drop-in for `torch.svd_lowrank`: the same call, more accurate at the same number of passes."""

import warnings

import torch

from . import _backends
from ._block_powers import block_powers
from .svd import ConvergenceWarning, truncated_svd

# As far as float32 factors can tell: the passes end the iteration, not the tolerance.
_TOL = 1e-6
_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)


def svd_lowrank(
    A: torch.Tensor,
    q: int | None = 6,
    niter: int | None = 2,
    M: torch.Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leading `q` singular triplets of `A`, or of `A - M`, from a fixed number of passes.

    Takes and returns what `torch.svd_lowrank` does. Its cost is set by `niter` and not by a
    tolerance: `truncated_svd` is the call that promises an error. `torch.svd_lowrank` multiplies a
    block of `q` columns `2 niter + 2` times and keeps all of them. A pass reads the whole matrix,
    so that more columns cost little: on a GPU this function makes the same products with at least
    16 columns more, and keeps the best `q`; on a CPU it makes `2 niter + 6` products with a block
    of about `1.5 q` columns and spends them on a Chebyshev filter instead of powers. The error on
    slowly decaying spectra falls several times.

    Args:
        A: `(..., m, n)`; float32, bfloat16 or float16. Unchanged. What the filter does not cover
            goes through torch's own formula in A's dtype: float64 (with more columns), complex and
            sparse tensors, and tensors that require a gradient.
        q: triplets to return, None for 6; more than `min(m, n)` counts as `min(m, n)`.
        niter: subspace iterations whose cost may be spent, None for 2.
        M: `(..., m, n)` or what broadcasts to it, subtracted from A; None for nothing. The
            difference of one call is formed in float32: multiplying A and M apart loses the
            digits in which they agree.
        generator: source of the starting block. None is a fixed seed: unlike torch's function this
            one never draws from the global generator.
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        `U` `(..., m, q)`, `S` `(..., q)` descending, `V` `(..., n, q)`, on A's device; float32 for
        bfloat16 and float16, else A's dtype.

    Raises:
        ValueError: A is no matrix or stack of them, M does not broadcast, q is negative, an
            unknown backend, or a NaN or Inf in A.
        TypeError: A is neither floating-point nor complex.
        RuntimeError: a backend named explicitly cannot run here.

    Example:
        >>> U, S, V = svd_lowrank(torch.diag(torch.tensor([3.0, 2.0, 1.0])), q=2)
        >>> S
        tensor([3., 2.])
    """
    if not (A.is_floating_point() or A.is_complex()):
        raise TypeError(f"A must be floating-point or complex, got {A.dtype}")
    _backends.check_name(backend)
    if A.dim() < 2:
        raise ValueError(f"A must be (..., m, n), got shape {tuple(A.shape)}")
    q, niter = 6 if q is None else q, 2 if niter is None else max(niter, 0)
    if q < 0:
        raise ValueError(f"q must not be negative, got {q}")
    is_sparse = A.layout != torch.strided or (M is not None and M.layout != torch.strided)
    if M is not None and not is_sparse:
        try:
            M = M.broadcast_to(A.shape)
        except RuntimeError:
            raise ValueError(
                f"M must broadcast to A's shape {tuple(A.shape)}, got {tuple(M.shape)}"
            ) from None
    q = min(q, *A.shape[-2:])
    wants_grad = torch.is_grad_enabled() and (
        A.requires_grad or (M is not None and M.requires_grad)
    )
    is_covered = A.dtype in _FLOAT32 and not (M is not None and M.dtype not in _FLOAT32)
    if is_sparse or wants_grad or not is_covered or q == 0 or A.numel() == 0:
        extra = 0 if is_sparse or wants_grad else max(16, q // 2)
        return _range_finder(A, q, extra, niter, M, generator)
    A = A.detach()
    if M is not None:
        A = A.float() - M.detach().float()
    solve = _filtered if A.device.type == "cpu" else block_powers
    return solve(A, q, niter, generator, backend)


def _filtered(
    A: torch.Tensor,
    q: int,
    niter: int,
    generator: torch.Generator | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triplets from the filtered subspace iteration of `truncated_svd`."""
    batch, (m, n) = A.shape[:-2], A.shape[-2:]
    with warnings.catch_warnings():
        # Short of float32's last digits is what a fixed number of passes means.
        warnings.simplefilter("ignore", ConvergenceWarning)
        svd = truncated_svd(
            A if A.dim() == 2 else A.reshape(-1, m, n),
            q,
            tol=_TOL,
            max_passes=2 * niter + 6,
            generator=generator,
            backend=backend,
        )
    return svd.U.view(*batch, m, q), svd.S.view(*batch, q), svd.V.view(*batch, n, q)


def _range_finder(
    A: torch.Tensor,
    q: int,
    extra: int,
    niter: int,
    M: torch.Tensor | None,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Algorithms 4.4 and 5.1 of Halko, Martinsson and Tropp (2011), as torch has them.

    Differentiable; `extra` columns are iterated along and left out of the result.
    """
    if A.dtype in (torch.float16, torch.bfloat16):
        A = A.float()
    if M is not None:
        M = M.to(A.dtype)
    m, n = A.shape[-2:]
    if m < n:
        V, S, U = _range_finder(A.mH, q, extra, niter, None if M is None else M.mH, generator)
        return U, S, V

    def forward(X: torch.Tensor) -> torch.Tensor:
        return A @ X if M is None else A @ X - M @ X

    def backward(Y: torch.Tensor) -> torch.Tensor:
        return A.mH @ Y if M is None else A.mH @ Y - M.mH @ Y

    if generator is None:
        generator = torch.Generator(A.device).manual_seed(0)
    R = torch.randn(
        n, min(q + extra, n), dtype=A.dtype, device=generator.device, generator=generator
    )
    Q = torch.linalg.qr(forward(R.to(A.device))).Q
    for _ in range(niter):
        Q = torch.linalg.qr(backward(Q)).Q
        Q = torch.linalg.qr(forward(Q)).Q
    V, S, Wh = torch.linalg.svd(backward(Q), full_matrices=False)
    U = Q @ Wh.mH
    return U[..., :q], S[..., :q], V[..., :q]
