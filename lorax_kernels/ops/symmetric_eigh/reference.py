# SPDX-License-Identifier: Apache-2.0
"""Eigendecomposition of symmetric matrices, largest first, in plain PyTorch."""

import torch


def symmetric_eigh_reference(H: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues `(b, l)` in descending order and their eigenvectors `(b, l, l)` as columns."""
    values, vectors = torch.linalg.eigh(H)
    return values.flip(-1).contiguous(), vectors.flip(-1).contiguous()
