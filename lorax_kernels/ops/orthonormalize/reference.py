# SPDX-License-Identifier: Apache-2.0
"""Orthonormal bases of blocks of columns, in plain PyTorch."""

import torch


def orthonormalize_reference(X: torch.Tensor, quick: bool) -> torch.Tensor:
    """Orthonormal columns that span the columns of each `(n, l)` block, `l <= n`.

    Householder QR in float32: backward stable whatever the condition, and where columns are
    dependent it still returns orthonormal ones. `quick` asks for less, and gets as much.
    """
    del quick
    Q, R = torch.linalg.qr(X)
    # A reflection may turn a column around.
    turned = torch.diagonal(R, dim1=1, dim2=2) < 0
    return Q.contiguous().mul_(torch.where(turned, -1.0, 1.0).to(Q.dtype)[:, None])
