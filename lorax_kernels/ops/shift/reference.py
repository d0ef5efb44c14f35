# SPDX-License-Identifier: Apache-2.0
"""One factor of a polynomial filter, in plain PyTorch."""

import torch


def shift_reference(
    Z: torch.Tensor, X: torch.Tensor, a: torch.Tensor, s: torch.Tensor
) -> torch.Tensor:
    """`(Z - a X) s` for each block, with one `a` a matrix and one `s` a column."""
    return (Z - a[:, None, None] * X) * s[:, None]
