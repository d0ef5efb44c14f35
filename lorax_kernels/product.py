# SPDX-License-Identifier: Apache-2.0
"""Exact SVD of a product of two thin factors, which is never formed."""

from collections.abc import Sequence
from typing import overload

import torch

from . import _signs, ops
from .svd_types import SVD

# Bytes of float64 factors that are worked on at once; intermediates take about three times that.
_BATCH_BYTES = 2**31
# Singular values under this share of the largest: where the eigenvectors of the symmetric form
# stop telling +s from -s (2^-53 / 1e-9 is 1e-7), and a hundredth of float32's resolution.
_NULL = 1e-9


@overload
def svd_product(
    lora_B: torch.Tensor, lora_A: torch.Tensor, rank: int | None = ..., *, backend: str = ...
) -> SVD: ...
@overload
def svd_product(
    lora_B: Sequence[torch.Tensor],
    lora_A: Sequence[torch.Tensor],
    rank: int | None = ...,
    *,
    backend: str = ...,
) -> list[SVD]: ...
def svd_product(
    lora_B: torch.Tensor | Sequence[torch.Tensor],
    lora_A: torch.Tensor | Sequence[torch.Tensor],
    rank: int | None = None,
    *,
    backend: str = "auto",
) -> SVD | list[SVD]:
    """SVD of `B @ A` in `O((m + n) r^2)` operations.

    `B = Q_B R_B` and `A^T = Q_A R_A` are factored, and the `r x r` matrix `R_B R_A^T` is
    decomposed, all in float64: exact to float32 however ill-conditioned the factors are. Layers of
    one shape are worked on together, which on a GPU takes a whole adapter in a few launches.

    Args:
        lora_B: `(m, r)`, or a stack `(b, m, r)`, or a list of matrices; any floating dtype.
        lora_A: `(r, n)`, or a stack `(b, r, n)`, or a list of matrices.
        rank: triplets to keep; None for all, `min(m, r, n)`.
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        An `SVD`, stacked for a stack; a list of them for a list.

    Raises:
        ValueError: factors that do not multiply, a NaN or Inf, or a rank out of range.
        TypeError: not floating-point.
        RuntimeError: a backend named explicitly cannot run here; the message says why.

    Example:
        >>> svd_product(torch.ones(4, 1), torch.ones(1, 9)).S
        tensor([6.])
    """
    if isinstance(lora_B, torch.Tensor) and isinstance(lora_A, torch.Tensor):
        rank = _check(lora_B, lora_A, rank, "")
        if lora_B.dim() == 3:
            return _decompose(lora_B, lora_A, rank, backend, "")
        return _decompose(lora_B[None], lora_A[None], rank, backend, "").unbind()[0]
    if isinstance(lora_B, torch.Tensor) or isinstance(lora_A, torch.Tensor):
        raise TypeError("lora_B and lora_A must be both tensors or both lists of tensors")
    return _decompose_list(list(lora_B), list(lora_A), rank, backend)


def _check(B: torch.Tensor, A: torch.Tensor, rank: int | None, where: str) -> int:
    """The rank to keep, if these factors can be decomposed."""
    if not (B.is_floating_point() and A.is_floating_point()):
        raise TypeError(
            f"{where}lora_B and lora_A must both be floating-point, got {B.dtype} and {A.dtype}"
        )
    if B.dim() not in (2, 3) or B.shape[:-2] != A.shape[:-2]:
        raise ValueError(
            f"{where}factors must be (m, r) and (r, n), or stacks of them, got {tuple(B.shape)} "
            f"and {tuple(A.shape)}"
        )
    if B.shape[-1] != A.shape[-2]:
        raise ValueError(f"{where}factors do not multiply: {tuple(B.shape)} and {tuple(A.shape)}")
    if B.device != A.device:
        raise ValueError(f"{where}factors must be on one device, got {B.device} and {A.device}")
    full = min(B.shape[-2], B.shape[-1], A.shape[-1])
    rank = full if rank is None else rank
    if not 1 <= rank <= full:
        raise ValueError(f"{where}rank must be between 1 and {full}, got {rank}")
    return rank


def _decompose_list(
    lora_B: list[torch.Tensor], lora_A: list[torch.Tensor], rank: int | None, backend: str
) -> list[SVD]:
    """Layers of one shape and dtype are stacked."""
    if len(lora_B) != len(lora_A):
        raise ValueError(
            f"lora_B and lora_A must be lists of one length, got {len(lora_B)} and {len(lora_A)}"
        )
    groups: dict[tuple, list[int]] = {}
    for i, (B, A) in enumerate(zip(lora_B, lora_A, strict=True)):
        kept = _check(B, A, rank, f"layer {i}: ")
        if B.dim() != 2:
            raise ValueError(f"layer {i}: a list holds matrices, got shape {tuple(B.shape)}")
        groups.setdefault((B.shape, A.shape, B.dtype, A.dtype, B.device, kept), []).append(i)
    results: dict[int, SVD] = {}
    for (left, right, *_, kept), layers in groups.items():
        most = max(1, _BATCH_BYTES // (8 * (left.numel() + right.numel())))
        for start in range(0, len(layers), most):
            some = layers[start : start + most]
            B, A = (torch.stack([x[i] for i in some]) for x in (lora_B, lora_A))
            where = f"layers {', '.join(map(str, some))}: "
            svd = _decompose(B, A, kept, backend, where)
            results.update(zip(some, svd.unbind(), strict=True))
    return [results[i] for i in range(len(lora_B))]


def _decompose(
    lora_B: torch.Tensor, lora_A: torch.Tensor, rank: int, backend: str, where: str
) -> SVD:
    """Of a stack."""
    for name, factor in (("lora_B", lora_B), ("lora_A", lora_A)):
        if not bool(factor.isfinite().all()):
            bad = (~factor.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
            raise ValueError(
                f"{where}{name} holds NaN or Inf (entries {bad} of the stack); no SVD exists"
            )
    B, A = lora_B.double(), lora_A.double().mT
    if B.shape[-1] > min(B.shape[-2], A.shape[-2]) or _runs_lapack(B, backend):
        (left, R_B), (right, R_A) = torch.linalg.qr(B), torch.linalg.qr(A)
        X, S, Yh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
        U, V = left @ X[..., :rank], right @ Yh.mT[..., :rank]
    else:
        (left, turn_B, R_B), (right, turn_A, R_A) = _orthogonal_factor(B), _orthogonal_factor(A)
        X, S, Y = _small_svd(R_B @ R_A.mT, backend)
        U, V = left @ (turn_B @ X[..., :rank]), right @ (turn_A @ Y[..., :rank])
    U, V = U.float(), V.float()
    sign = _signs.canonical(U)
    count = B.shape[0]
    return SVD(
        U * sign,
        S[..., :rank].float(),
        V * sign,
        torch.full((count,), torch.finfo(torch.float32).eps),
        torch.zeros(count).long(),
        ("exact",) * count,
    )


def _runs_lapack(B: torch.Tensor, backend: str) -> bool:
    """On a CPU the loops inside torch.linalg cost nothing; on a GPU, a millisecond a layer."""
    return backend == "reference" or (backend == "auto" and not B.is_cuda)


def _orthogonal_factor(
    X: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`X = Q T R` of a stack of tall float64 matrices, with `Q T` orthonormal.

    CholeskyQR2 with columns scaled to unit length (Yamamoto et al., ETNA 44, 2015), whose second
    triangle `T` is left for the caller to multiply on the small side. It works up to a condition
    number of about 1e7 after scaling; whatever is worse takes Householder's QR.
    """
    size = X.square().sum(-2)
    # A column of zeros keeps its place, and the factorisation of its Gram matrix fails.
    scale = torch.where(size > 0, size, 1.0).rsqrt()
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    gram = (X.mT @ X) * (scale[..., None] * scale[..., None, :])
    first, info = torch.linalg.cholesky_ex(gram)
    inverse = torch.linalg.solve_triangular(first, eye.expand_as(first), upper=False)
    Q = X @ (scale[..., None] * inverse.mT)
    again = Q.mT @ Q
    second, info_again = torch.linalg.cholesky_ex(again)
    T = torch.linalg.solve_triangular(second, eye.expand_as(second), upper=False).mT
    R = second.mT @ first.mT / scale[..., None, :]
    # Close to orthonormal after one round, orthonormal to rounding after two; NaN is not close.
    is_close = (again - eye).abs().amax((-2, -1)) < 0.1
    bad = ~(is_close & (info == 0) & (info_again == 0))
    if bool(bad.any()):
        Q[bad], R[bad] = torch.linalg.qr(X[bad])
        T = torch.where(bad[:, None, None], eye, T)
    return Q, T.contiguous(), R


def _small_svd(M: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`M = X diag(S) Y^T` of a stack of square float64 matrices, batched where SVD would loop.

    The positive eigenpairs of the symmetric `[[0, M], [M^T, 0]]` are `S` and `[X; Y] / sqrt 2`:
    backward stable, where the Gram matrix would lose singular values under 1e-8 of the largest.
    """
    r = M.shape[-1]
    unit = M.abs().amax((-2, -1), keepdim=True)
    M = M / torch.where(unit > 0, unit, 1.0)
    H = M.new_zeros(M.shape[0], 2 * r, 2 * r)
    H[:, :r, r:] = M
    H[:, r:, :r] = M.mT
    values, vectors = ops.symmetric_eigh(H, backend=backend)
    S = values[:, :r].clamp(min=0)
    pairs = vectors[:, :, :r] * 2**0.5
    X, Y = pairs[:, :r], pairs[:, r:]
    head = S.gt(_NULL * S[:, :1])
    if not bool(head.all()):
        X, Y = _completed(X, head, backend), _completed(Y, head, backend)
    return X, S * unit[:, 0], Y


def _completed(X: torch.Tensor, head: torch.Tensor, backend: str) -> torch.Tensor:
    """`X` with the columns outside `head`, which come last, completing an orthonormal basis."""
    span = X * head[:, None, :]
    # Eigenvalues 1 first, one for each column of the head, then the complement's zeros.
    _, basis = ops.symmetric_eigh(span @ span.mT, backend=backend)
    return torch.where(head[:, None, :], X, basis)
