# SPDX-License-Identifier: Apache-2.0
"""A block of columns times a small matrix, in plain PyTorch."""

import torch


def rotate_reference(X: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """`X @ R` for each `(n, l)` block and `(l, k)` matrix, to float32 accuracy."""
    return torch.bmm(X, R.to(torch.float32))
