# SPDX-License-Identifier: Apache-2.0
"""Product of a thin block with a weight matrix and its transpose, in plain PyTorch."""

import torch

from ..thin_matmul.reference import thin_matmul_reference


def normal_matmul_reference(W: torch.Tensor, X: torch.Tensor, transpose: bool) -> torch.Tensor:
    """`W^T (W X)`, or `W (W^T X)` with `transpose`, in float32."""
    Y = thin_matmul_reference(W, X, transpose, 1)
    return thin_matmul_reference(W, Y, not transpose, 1)
