# SPDX-License-Identifier: Apache-2.0
"""Product of a weight matrix with a thin block, in plain PyTorch."""

import torch


def thin_matmul_reference(
    W: torch.Tensor, X: torch.Tensor, transpose: bool, pieces: int
) -> torch.Tensor:
    """`W @ X`, or `W^T @ X` with `transpose`, in float32.

    `pieces` is how many bfloat16 parts a tensor-core backend may split its operands in; here the
    product is a float32 one, which meets every such accuracy.
    """
    del pieces
    W = W.to(torch.float32)
    return torch.bmm(W.mT if transpose else W, X)
