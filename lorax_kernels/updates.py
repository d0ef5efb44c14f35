# SPDX-License-Identifier: Apache-2.0
"""Norms of factored updates, without forming them."""

import math

import torch


def update_inner(
    left_B: torch.Tensor, left_A: torch.Tensor, right_B: torch.Tensor, right_A: torch.Tensor
) -> float:
    """Frobenius inner product `<B_1 A_1, B_2 A_2>` of two updates of one shape.

    Through the `r x r` matrices `B_1^T B_2` and `A_1 A_2^T`, in float64.

    Args:
        left_B: `(m, r_1)`.
        left_A: `(r_1, n)`.
        right_B: `(m, r_2)`.
        right_A: `(r_2, n)`.

    Returns:
        The inner product.

    Raises:
        ValueError: shapes do not fit together.

    Example:
        >>> one = torch.ones(2, 1)
        >>> update_inner(one, one.T, one, one.T)
        4.0
    """
    for B, A in ((left_B, left_A), (right_B, right_A)):
        if B.dim() != 2 or A.dim() != 2 or B.shape[1] != A.shape[0]:
            raise ValueError(
                f"factors must be (m, r) and (r, n), got {tuple(B.shape)} and {tuple(A.shape)}"
            )
    if left_B.shape[0] != right_B.shape[0] or left_A.shape[1] != right_A.shape[1]:
        raise ValueError(
            f"updates must have one shape, got {(left_B.shape[0], left_A.shape[1])} and "
            f"{(right_B.shape[0], right_A.shape[1])}"
        )
    inner_B = left_B.double().mT @ right_B.double()
    inner_A = left_A.double() @ right_A.double().mT
    return float((inner_B * inner_A).sum())


def update_norm(lora_B: torch.Tensor, lora_A: torch.Tensor) -> float:
    """Frobenius norm `||B A||_F` of an update.

    Args:
        lora_B: `(m, r)`.
        lora_A: `(r, n)`.

    Returns:
        The norm.

    Raises:
        ValueError: shapes do not fit together.

    Example:
        >>> update_norm(torch.ones(2, 1), torch.ones(1, 2))
        2.0
    """
    return math.sqrt(max(0.0, update_inner(lora_B, lora_A, lora_B, lora_A)))
