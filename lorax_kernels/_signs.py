# SPDX-License-Identifier: Apache-2.0
"""Which way singular vectors point: a pair may be turned around, both or neither."""

import torch


def canonical(U: torch.Tensor) -> torch.Tensor:
    """Signs `(..., 1, k)` that make the entry of each column largest in magnitude positive."""
    least, most = torch.aminmax(U, dim=-2, keepdim=True)
    return torch.where(most < -least, -1.0, 1.0).to(U.dtype)
