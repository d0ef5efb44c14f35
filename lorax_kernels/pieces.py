# SPDX-License-Identifier: Apache-2.0
"""Matrices as sums of bfloat16 ones, which tensor cores multiply exactly."""

import torch


def split_bfloat16(X: torch.Tensor) -> torch.Tensor:
    """Two bfloat16 pieces whose sum is `X` to 16 bits: a basis that tensor cores can multiply.

    The first piece is `X` rounded to bfloat16, the second the rounding of what that left. Together
    they take the memory of float32, are within `2^-17` of every element (bfloat16 alone: `2^-8`),
    and `ops.project` takes them in place of a basis: `ops.project(blocks, [split_bfloat16(Q)])`.

    Args:
        X: `(m, k)`, or a stack `(b, m, k)`; any floating dtype, finite.

    Returns:
        `(2, m, k)` or `(b, 2, m, k)`, bfloat16, the larger piece first.

    Raises:
        ValueError, TypeError: not a matrix or a stack of them, or not floating point.

    Example:
        >>> split_bfloat16(torch.tensor([[1.01]])).flatten().tolist()
        [1.0078125, 0.0021820068359375]
    """
    if X.dim() not in (2, 3):
        raise ValueError(f"X must be a matrix or a stack of them, got shape {tuple(X.shape)}")
    if not X.is_floating_point():
        raise TypeError(f"X must be floating point, got {X.dtype}; convert it first")
    large = X.bfloat16()
    return torch.stack((large, (X - large).bfloat16()), dim=-3)
