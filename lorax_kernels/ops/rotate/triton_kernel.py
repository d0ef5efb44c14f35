# SPDX-License-Identifier: Apache-2.0
"""A block times a small matrix, both as three bfloat16 pieces."""

import torch

from ..thin_matmul.triton_kernel import launch_split_matmul


def rotate_triton(X: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """`X @ R` to float32 accuracy; same arguments as the reference."""
    return launch_split_matmul(X, R.to(torch.float32), 3)
