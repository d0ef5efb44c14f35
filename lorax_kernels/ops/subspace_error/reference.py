# SPDX-License-Identifier: Apache-2.0
"""What is wrong with computed singular subspaces, estimated after the fact, in plain PyTorch."""

import math

import torch

_TINY = 1e-300
_EPS = torch.finfo(torch.float32).eps
# Entries of what rounding in `W Q` adds to a Ritz problem, in units of the values it mixes: 0.17
# eps was measured at 129 to 300 rows, and longer sums average more.
_PRODUCT_ROUNDING = 0.25 * _EPS


def noise_floor(theta: torch.Tensor, rows: int) -> torch.Tensor:
    """Eigenvalues `(b, 1)` under which rounding of float32 products determines no direction."""
    return (4 * _EPS * math.sqrt(rows)) ** 2 * theta[:, :1].clamp_min(_TINY)


def subspace_error_reference(
    C: torch.Tensor, theta: torch.Tensor, known: int, k: int, rows: int
) -> torch.Tensor:
    """The error, what of it lies outside, and what is mixed within: `(3, b)`, float64."""
    is_full = C.dim() == 3
    C, theta = C.double(), theta.double()
    squares = torch.diagonal(C, dim1=1, dim2=2) if is_full else C
    end = theta[:, known - 1 : known]
    if is_full:
        # There is an eigenvalue within the residual of a Ritz value.
        end = torch.maximum(end, theta[:, -1:] + squares[:, -1:].clamp_min(0).sqrt())
    # Not a number where the first value is infinite, and what is not a number counts.
    floor = noise_floor(theta, rows) + (theta[:, :1] - theta[:, :1])
    counted = ~(theta[:, :k] <= floor)
    gap = torch.maximum(theta[:, :k] - end, _EPS * floor)
    outside = torch.where(counted, squares[:, :k] / gap**2, 0.0)

    def total(squares: torch.Tensor) -> torch.Tensor:
        return (2 / k * squares.sum(1)).sqrt()

    planned = total(outside)
    if not is_full:
        return torch.stack([planned, planned, torch.zeros_like(planned)])
    # Ritz values are themselves low by `shift`: closer ones than that are not told apart yet.
    shift = squares / torch.maximum(theta - end, gap[:, -1:])
    distance = (theta - shift)[:, :k, None] - (theta + shift)[:, None, k:]
    mixed = (C[:, :k, k:] / (gap[..., None] * distance.clamp_min(_TINY))) ** 2
    # Products in float32 leave vectors that close mixed whatever the residual says.
    entry = _PRODUCT_ROUNDING * (theta[:, :k, None] * theta[:, None, k:].clamp_min(0)).sqrt()
    rounded = (entry / (theta[:, :k, None] - theta[:, None, k:]).clamp_min(_TINY)) ** 2
    mixed = torch.where(counted, mixed.sum(2), 0.0)
    rounded = torch.where(counted, rounded.sum(2), 0.0)
    error = total((outside + mixed + rounded).clamp_max(1))
    return torch.stack([error, planned, total(mixed.clamp_max(1))])
