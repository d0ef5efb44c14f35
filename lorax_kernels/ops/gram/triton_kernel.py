# SPDX-License-Identifier: Apache-2.0
"""Gram matrices from 16-bit pieces, each pair of tiles computed once."""

import torch

from ..thin_matmul.triton_kernel import launch_split_matmul


def gram_triton(X: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`X^T X` of each block in float32; same arguments as the reference."""
    del dtype
    return launch_split_matmul(X.mT, X, 3, symmetric=True)
