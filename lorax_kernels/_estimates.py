# SPDX-License-Identifier: Apache-2.0
"""What is wrong with computed singular subspaces, estimated after the fact.

All of it is first-order perturbation theory of `A = W^T W`: a vector `i` among the leading `k` is
off by `e_ij / (theta_i - theta_j)` towards every other vector `j`, and only towards vectors beyond
`k` does it matter. The relative projector error is `sqrt(2/k sum e_ij^2 / (theta_i - theta_j)^2)`.
"""

import math

import torch

_TINY = 1e-300
# Entries of what rounding in `W Q` adds to a Ritz problem, in units of the values it mixes: 0.17
# eps was measured at 129 to 300 rows, and longer sums average more.
_PRODUCT_ROUNDING = 0.25 * torch.finfo(torch.float32).eps


def noise_floor(theta: torch.Tensor, rows: int) -> torch.Tensor:
    """Eigenvalues `(b, 1)` under which rounding of float32 products determines no direction."""
    eps = torch.finfo(torch.float32).eps
    return (4 * eps * math.sqrt(rows)) ** 2 * theta[:, :1].clamp_min(_TINY)


def outside_error(
    squares: torch.Tensor, theta: torch.Tensor, end: torch.Tensor, k: int, rows: int
) -> torch.Tensor:
    """Projector error of the leading `k` vectors of a block from what lies outside the block.

    Args:
        squares: of the lengths of the vectors' residuals outside the block, `(b, l)`.
        theta: Rayleigh quotients `(b, l)`, descending.
        end: where the eigenvalues outside the block begin, `(b, 1)`.
        k: where the cut is.
        rows: the longer side of the matrices.

    Returns:
        `(b,)`, float64, not capped at a right angle.
    """
    outside, _, _ = _outside(squares.double(), theta.double(), end.double(), k, rows)
    return (2 / k * outside.sum(1)).sqrt()


def _outside(
    squares: torch.Tensor, theta: torch.Tensor, end: torch.Tensor, k: int, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Squared tilts `(b, k)`, the gaps they were divided by, and which vectors count at all."""
    floor = noise_floor(theta, rows)
    counted = theta[:, :k] > floor
    gap = (theta[:, :k] - end).clamp_min(torch.finfo(torch.float32).eps * floor)
    return torch.where(counted, squares[:, :k] / gap**2, 0.0), gap, counted


def residual_error(
    C: torch.Tensor, theta: torch.Tensor, end: torch.Tensor, k: int, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Projector error of the leading `k` Ritz vectors, from their residuals outside the block.

    Three things are wrong with a Ritz vector: what lies outside the block, `|rho_i| / (theta_i -
    lambda)` with lambda from `end` down; to second order, what the outside mixes
    in from the block's other vectors beyond `k`, which matters where the spectrum is flat; and what
    rounding mixes in, which matters where values nearly coincide.

    Args:
        C: Gram matrix of the residuals `A Q - Q theta`, `(b, l, l)`.
        theta: Ritz values `(b, l)`, descending.
        end: where the eigenvalues outside the block begin, `(b, 1)`.
        k: where the cut is.
        rows: the longer side of the matrices.

    Returns:
        The error `(b,)`; the part from outside, which a filter damps, not capped at a right angle;
        and the part that is mixed within the block, of the second order of what a filter damps.
    """
    C, theta = C.double(), theta.double()
    squares = torch.diagonal(C, dim1=1, dim2=2)
    end = end.double()
    outside, gap, counted = _outside(squares, theta, end, k, rows)
    # Ritz values are themselves low by `shift`: closer ones than that are not told apart yet.
    shift = squares / (theta - end).clamp_min(gap[:, -1:])
    distance = (theta - shift)[:, :k, None] - (theta + shift)[:, None, k:]
    mixed = (C[:, :k, k:] / (gap[..., None] * distance.clamp_min(_TINY))) ** 2
    # Products in float32 leave vectors that close mixed whatever the residual says.
    entry = _PRODUCT_ROUNDING * (theta[:, :k, None] * theta[:, None, k:].clamp_min(0)).sqrt()
    rounded = (entry / (theta[:, :k, None] - theta[:, None, k:]).clamp_min(_TINY)) ** 2
    mixed = torch.where(counted, mixed.sum(2), 0.0)
    rounded = torch.where(counted, rounded.sum(2), 0.0)

    def total(squares: torch.Tensor) -> torch.Tensor:
        return (2 / k * squares.sum(1)).sqrt()

    error = total((outside + mixed + rounded).clamp_max(1))
    return error, total(outside), total(mixed.clamp_max(1))


def rounding_error(theta: torch.Tensor, k: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Projector error from rounding of a Gram matrix in `dtype`.

    An entry of that rounding in the basis of the eigenvectors was measured at 0.02 to 0.6 eps
    theta_1 over the spectra of `testing.SPECTRA`. Where the values at the cut are within the noise
    of float32 input no subspace is determined, and nothing is counted.

    Args:
        theta: eigenvalues `(b, l)`, descending.
        k: where the cut is.
        rows: the longer side of the matrices.
        dtype: of the Gram matrix.

    Returns:
        `(b,)`, float64.
    """
    theta = theta.double().clamp_min(0)
    distance = (theta[:, :k, None] - theta[:, None, k:]).clamp_min(_TINY)
    entry = 0.75 * torch.finfo(dtype).eps * theta[:, :1, None]
    turned = ((entry / distance) ** 2).sum(2).clamp_max(1)
    turned = torch.where(theta[:, :k] > noise_floor(theta, rows), turned, 0.0)
    return (2 / k * turned.sum(1)).sqrt()
