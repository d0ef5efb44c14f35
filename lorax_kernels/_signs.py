# SPDX-License-Identifier: Apache-2.0
"""Which way singular vectors point: a pair may be turned around, both or neither."""

import torch


def canonical(U: torch.Tensor) -> torch.Tensor:
    """Signs `(..., 1, k)` that make the entry of each column largest in magnitude positive."""
    largest = U.abs().argmax(dim=-2, keepdim=True)
    return _signs(U.gather(-2, largest))


def like(U: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    """`U` `(b, m, k)` with every column on the side of the same column of `Y`.

    Orthonormalisation may turn a column around.
    """
    return U * _signs((U * Y).sum(1, keepdim=True)).to(U.dtype)


def _signs(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values < 0, -1.0, 1.0).to(values.dtype)
