# SPDX-License-Identifier: Apache-2.0
"""Orthonormal bases of blocks of columns, in plain PyTorch."""

import torch


def orthonormalize_reference(X: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span the columns of each `(n, l)` block, `l <= n`.

    Householder QR in float32: backward stable whatever the condition, and where columns are
    dependent it still returns orthonormal ones.
    """
    return torch.linalg.qr(X).Q
