# SPDX-License-Identifier: Apache-2.0
"""Exact SVD of a product of two thin factors, which is never formed."""

from collections.abc import Sequence
from typing import overload

import torch

from .svd_types import SVD


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
    decomposed, all in float64: exact to float32 however ill-conditioned the factors are.

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

    Example:
        >>> svd_product(torch.ones(4, 1), torch.ones(1, 9)).S
        tensor([6.])
    """
    if not isinstance(lora_B, torch.Tensor):
        return [
            svd_product(B, A, rank, backend=backend) for B, A in zip(lora_B, lora_A, strict=True)
        ]
    if not isinstance(lora_A, torch.Tensor) or not (
        lora_B.is_floating_point() and lora_A.is_floating_point()
    ):
        raise TypeError("lora_B and lora_A must both be floating-point tensors")
    if lora_B.dim() not in (2, 3) or lora_B.shape[:-2] != lora_A.shape[:-2]:
        raise ValueError(
            f"factors must be (m, r) and (r, n), or stacks of them, got {tuple(lora_B.shape)} and "
            f"{tuple(lora_A.shape)}"
        )
    if lora_B.shape[-1] != lora_A.shape[-2]:
        raise ValueError(
            f"factors do not multiply: {tuple(lora_B.shape)} and {tuple(lora_A.shape)}"
        )
    full = min(lora_B.shape[-2], lora_B.shape[-1], lora_A.shape[-1])
    rank = full if rank is None else rank
    if not 1 <= rank <= full:
        raise ValueError(f"rank must be between 1 and {full}, got {rank}")
    if not (bool(lora_B.isfinite().all()) and bool(lora_A.isfinite().all())):
        raise ValueError("a factor holds NaN or Inf; no SVD exists")
    left, R_B = torch.linalg.qr(lora_B.double())
    right, R_A = torch.linalg.qr(lora_A.double().mT)
    X, S, Yh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    U = left @ X[..., :rank]
    V = right @ Yh.mT[..., :rank]
    largest = U.abs().argmax(dim=-2, keepdim=True)
    sign = torch.where(U.gather(-2, largest) < 0, -1.0, 1.0).double()
    factors = ((U * sign).float(), S[..., :rank].float(), (V * sign).float())
    eps = torch.finfo(torch.float32).eps
    if lora_B.dim() == 2:
        return SVD(*factors, eps, 0, "exact")
    count = lora_B.shape[0]
    return SVD(*factors, torch.full((count,), eps), torch.zeros(count).long(), ("exact",) * count)
