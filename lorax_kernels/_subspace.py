# SPDX-License-Identifier: Apache-2.0
"""Truncated SVD of a stack of matrices by Chebyshev-filtered subspace iteration.

A block `Q` of `l > k` orthonormal columns is filtered by a polynomial in `A = W^T W` that is small
on `[0, b]` and grows as fast as a polynomial can beyond it (a Chebyshev polynomial; `b` is the
smallest Ritz value, just under the eigenvalues that the block cannot hold). The polynomial is
applied as a product of shifts by its roots, in Leja order, so that the block can be orthonormalised
between any two factors: the three-term recurrence would overflow on spectra with outliers. After a
cycle of factors a Rayleigh-Ritz step reads off the singular triplets, and the residual, which the
next factor needs anyway, gives the error left.

Sources: Halko, Martinsson, Tropp, SIAM Review 53 (2011), for the range finder; Zhou, Saad, Tiago,
Chelikowsky, J. Comput. Phys. 219 (2006), for the filter; Feng, Yu, Xie, arXiv 2404.09276 (2024),
for shifts between orthonormalisations. The error estimate is first-order perturbation theory.
"""

import functools
import math
from dataclasses import dataclass, fields, replace

import torch

from . import _backends, ops
from ._estimates import residual_error, rounding_error
from ._operator import Operator, Stack

# Degrees a cycle may have. Few, because matrices that need the same degree run as one batch.
_DEGREES = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
# Before the second look the damped interval is a guess from a nearly random block, and degrees
# spent on a wrong interval are lost; on a GPU products are cheap against a look's eigenproblem.
_FIRST_DEGREE = 4
_FIRST_DEGREE_ON_GPU = 6
# There, while the error is above `_EARLY`, the interval is known to be short, and more is taken.
_EARLY = 0.1
_EARLY_MORE = 1.3
# Between two orthonormalisations the leading directions may outgrow the rest by this factor. Ritz
# vectors hold little of each other's directions, so that float32 has digits left for the smallest.
_GROWTH_CAP = 1e6
# A cycle aims well below the tolerance, so that it rarely ends just above it; it may stop a little
# below, because the estimate is of first order and can be low by some per cent.
_AIM = 0.5
_ENOUGH = 0.8
# Within this factor of what rounding of the block leaves, the block is taken in two pieces.
_NEAR_FLOOR = 8
# In place of a degree: leave the Gram matrix, whose rounding has become a visible part of the
# tolerance.
_ON_WEIGHTS = -1
_VISIBLE = 0.3
# Spread of the Ritz values from which float32 rounding shows in residuals.
_STEEP = 1e3


@functools.cache
def chebyshev_roots(degree: int) -> tuple[float, ...]:
    """Roots of the Chebyshev polynomial of `[0, 1]` in Leja order.

    In that order every partial product stays of moderate size over the whole interval.
    """
    left = [(1 + math.cos(math.pi * (j + 0.5) / degree)) / 2 for j in range(degree)]
    order = [min(left)]
    left.remove(order[0])
    while left:
        best = max(left, key=lambda x: sum(math.log(abs(x - y)) for y in order))
        order.append(best)
        left.remove(best)
    return tuple(order)


@dataclass(frozen=True)
class Triplets:
    """Leading triplets of a stack and how they were come by."""

    U: torch.Tensor  # (b, m, k)
    S: torch.Tensor  # (b, k)
    V: torch.Tensor  # (b, n, k)
    error: torch.Tensor  # (b,) estimated projector error
    passes: torch.Tensor  # (b,) products made, on the CPU


@dataclass(frozen=True)
class _Ritz:
    """Ritz vectors of a block and what their residual says, for a stack."""

    Q: torch.Tensor  # (b, n, l) Ritz vectors
    Y: torch.Tensor  # (b, m, l) W Q; no columns where the Gram matrix stood in for W
    Z: torch.Tensor  # (b, n, l) A Q
    theta: torch.Tensor  # (b, l) Ritz values of A, descending
    error: torch.Tensor  # (b,) estimated projector error of the leading k
    planned: torch.Tensor  # (b,) what is left to damp: the same, not capped at a right angle
    blur: torch.Tensor  # (b,) how much of the error is rounding of the Gram matrix

    def __getitem__(self, index: torch.Tensor) -> "_Ritz":
        """The entries of the stack that `index` names."""
        return _Ritz(*(getattr(self, f.name)[index] for f in fields(self)))


def _rayleigh_ritz(A: Operator, Q: torch.Tensor, k: int) -> _Ritz:
    """Singular triplets of `W` within span(Q), from two products with `W`."""
    backend = A.backend
    Y = A.forward(Q, 2)
    # On a CPU float64 costs a small eigenproblem little, and it keeps a steep spectrum's end.
    dtype = torch.float64 if Q.device.type == "cpu" else torch.float32
    H = ops.gram(Y, dtype=dtype, backend=backend)
    theta, R = ops.symmetric_eigh(H, backend=backend)
    theta = theta.clamp_min(0)
    Q = ops.rotate(Q, R, backend=backend)
    Y = ops.rotate(Y, R, backend=backend)
    Z = A.backward(Y, 2)
    if bool((theta[:, 0] > _STEEP * theta[:, -1]).any()):
        # Rounding in Y points along the leading vectors, which the block holds: project it out.
        rho = Z - ops.rotate(Q, torch.bmm(Q.mT, Z), backend=backend)
    else:
        rho = Z - Q * theta.float()[:, None]
    C = ops.gram(rho, backend=backend)
    error, planned = residual_error(C, theta, k, A.rows)
    return _Ritz(Q, Y, Z, theta, error, planned, torch.zeros_like(error))


def _gram_ritz(A: Operator, Q: torch.Tensor, k: int) -> _Ritz:
    """Ritz vectors from one product with the Gram matrix: good enough to steer by."""
    backend = A.backend
    Z = A.apply(Q, 2)
    H = torch.bmm(Q.mT, Z)
    theta, R = ops.symmetric_eigh((H + H.mT) / 2, backend=backend)
    theta = theta.clamp_min(0)
    Q = ops.rotate(Q, R, backend=backend)
    Z = ops.rotate(Z, R, backend=backend)
    C = ops.gram(Z - Q * theta[:, None], backend=backend)
    error, planned = residual_error(C, theta, k, A.rows)
    blur = rounding_error(theta, k, A.rows, torch.float32)
    return _Ritz(Q, Q[:, :, :0], Z, theta, (error**2 + blur**2).sqrt(), planned, blur)


@dataclass(frozen=True)
class _Cycle:
    """The next cycle of each matrix of a stack, on the CPU."""

    degree: torch.Tensor  # (b,), 0 where the matrix is done
    pieces: torch.Tensor  # (b,) that the block is rounded to


def _next_cycle(A: Operator, ritz: _Ritz, k: int, tol: float) -> _Cycle:
    """Smallest listed degree that should bring the error under the tolerance, for each matrix.

    A block in one piece leaves an error of about its rounding times `theta_k / (theta_k -
    theta_l)`. Where that is above the tolerance, a cycle in one piece goes down to it and the next,
    short one continues in two.
    """
    theta = ritz.theta.double()
    last, first_beyond = theta[:, k - 1], theta[:, -1].clamp_min(1e-300)
    rate = torch.acosh((2 * last / first_beyond - 1).clamp_min(1 + 1e-9))
    floor = A.rounding * last / (last - first_beyond).clamp_min(1e-9 * last + 1e-300)
    fine = ritz.planned < _NEAR_FLOOR * floor
    target = torch.where(fine, _AIM * tol, (2 * floor).clamp_min(_AIM * tol))
    needed = torch.acosh((ritz.planned / target).clamp_min(1)) / rate
    if ritz.Q.is_cuda:
        needed = torch.where(ritz.planned > _EARLY, _EARLY_MORE * needed, needed)
    listed = torch.tensor(_DEGREES, dtype=needed.dtype, device=needed.device)
    degree = listed[torch.bucketize(needed, listed).clamp_max(len(_DEGREES) - 1)]
    done = ritz.error <= _ENOUGH * tol
    return _Cycle(torch.where(done, 0, degree).long().cpu(), (1 + fine.long()).cpu())


def _filter(A: Operator, ritz: _Ritz, degree: int, pieces: int) -> torch.Tensor:
    """Applies the polynomial of this degree to the block and orthonormalises it."""
    # Where the block holds all there is, its last Ritz value is rounding and may be zero.
    b = torch.maximum(ritz.theta[:, -1], 1e-8 * ritz.theta[:, 0]).float().clamp_min(1e-30)
    # How much a leading direction gains on the rest in one factor, at most, over the stack.
    gain = max(2.0, float((2 * ritz.theta[:, 0].float() / b).max()))
    X, Z, growth = ritz.Q, ritz.Z, 1.0
    for j, root in enumerate(chebyshev_roots(degree)):
        if j:
            Z = A.apply(X, pieces)
        X = ops.shift(Z, X, root * b, 2 / b, backend=A.backend)
        growth *= gain
        if j + 1 < degree and growth * gain > _GROWTH_CAP:
            X, growth = ops.orthonormalize(X, quick=True, backend=A.backend), 1.0
    return ops.orthonormalize(X, backend=A.backend)


def _finish(A: Operator, ritz: _Ritz, k: int) -> Triplets:
    """Triplets of the leading `k` Ritz vectors, on the tall side as orthonormal as on the short."""
    V, Y, passes = ritz.Q[:, :, :k].contiguous(), ritz.Y[:, :, :k], 0
    if A.G is not None:
        Y, passes = A.forward(V, 2), 1
    S, order = torch.linalg.vector_norm(Y, dim=1).sort(dim=1, descending=True, stable=True)
    Y = Y.gather(2, order[:, None].expand_as(Y))
    V = V.gather(2, order[:, None].expand_as(V))
    U = ops.orthonormalize(Y, backend=A.backend)
    # Orthonormalisation may turn a column around; a pair keeps its sign.
    U = U * torch.where((U * Y).sum(1, keepdim=True) < 0, -1.0, 1.0)
    return Triplets(U, S, V, ritz.error, torch.full((len(S),), passes))


def _solve(
    A: Operator, Q: torch.Tensor, k: int, tol: float, left: int, degree: int | None
) -> Triplets:
    """Looks at the block, filters it as far as each matrix needs, and goes on with what is left.

    `left` is how many products may still be made; `degree` is the next cycle's, where it is not
    to be judged from the Ritz values.
    """
    count = Q.shape[0]
    steer = A.G is not None
    ritz = _gram_ritz(A, Q, k) if steer else _rayleigh_ritz(A, Q, k)
    del Q
    left -= 2
    cycle = _next_cycle(A, ritz, k, tol)
    degrees = cycle.degree
    if degree is not None:
        degrees = torch.where(degrees > 0, degree, 0)
    degrees = degrees.clamp_max(max(0, (left - steer) // 2))
    degrees[(ritz.blur > _VISIBLE * tol).cpu()] = _ON_WEIGHTS
    parts = []
    # Matrices with the same cycle run as one batch.
    for d, pieces in torch.stack([degrees, cycle.pieces], dim=1).unique(dim=0).tolist():
        index = torch.nonzero((degrees == d) & (cycle.pieces == pieces)).flatten()
        whole, where = len(index) == count, index.to(ritz.Q.device)
        part = (A, ritz) if whole else (A[where], ritz[where])
        parts.append((d, pieces, index, *part))
    del ritz, part
    results = []
    while parts:
        d, pieces, index, some, mine = parts.pop()
        if d == 0:
            found, spent = _finish(some, mine, k), 2
        else:
            if d == _ON_WEIGHTS:
                block, some = mine.Q, some.on_weights()
            else:
                block = _filter(some, mine, d, pieces)
            del mine
            spent = 2 * max(d, 1)
            found = _solve(some, block, k, tol, left + 2 - spent, None)
        results.append((index, replace(found, passes=found.passes + spent)))
    return _merge(results, count)


def _merge(results: list[tuple[torch.Tensor, Triplets]], count: int) -> Triplets:
    """Puts the results of parts of a stack back in the stack's order."""
    if len(results) == 1:
        return results[0][1]
    merged = {}
    for f in fields(Triplets):
        first = getattr(results[0][1], f.name)
        merged[f.name] = first.new_empty(count, *first.shape[1:])
        for index, part in results:
            merged[f.name][index.to(first.device)] = getattr(part, f.name)
    return Triplets(**merged)


def _scaled(G: torch.Tensor) -> torch.Tensor:
    """Gram matrices scaled into the range of float16; their eigenvectors do not change."""
    largest = torch.diagonal(G, dim1=1, dim2=2).amax(dim=1).clamp_min(1e-30)
    return G * torch.exp2(7 - largest.log2().floor())[:, None, None]


def iterate(
    W: torch.Tensor,
    start: torch.Tensor,
    k: int,
    tol: float,
    max_passes: int,
    *,
    use_gram: bool,
    warm: bool,
    backend: str,
) -> Triplets:
    """Leading `k` singular triplets of each matrix in a stack.

    Args:
        W: `(b, m, n)`, scaled so that squares of its entries neither overflow nor vanish.
        start: block to start from, `(b, p, l)` or `(1, p, l)` with `p = min(m, n)`, `k < l <= p`.
        k: triplets wanted.
        tol: projector error to reach.
        max_passes: products with `W` or its transpose at most; fewer than four count as four, and
            fewer than two for a warm start as two.
        use_gram: iterate on the Gram matrix instead of on `W`.
        warm: the start is a good guess: look before filtering.
        backend: passed to the ops.

    Returns:
        Triplets; it is for the caller to compare their error with the tolerance.
    """
    count, m, n = W.shape
    flipped = n > m
    halves = W.is_cuda and _backends.requested(backend) != "reference"
    G = None
    if use_gram and not warm:
        G = Stack.of(_scaled(ops.gram(W.mT if flipped else W, backend=backend)), halves)
    A = Operator(Stack.of(W, halves), flipped, G, backend)
    Q = start.expand(count, -1, -1).contiguous()
    spent = 0
    if not warm:
        Q, spent = A.apply(Q), 2
    Q = ops.orthonormalize(Q, backend=backend)
    first = _FIRST_DEGREE_ON_GPU if W.is_cuda else _FIRST_DEGREE
    found = _solve(A, Q, k, tol, max_passes - spent, None if warm else first)
    found = replace(found, passes=found.passes + spent)
    return replace(found, U=found.V, V=found.U) if flipped else found
