# SPDX-License-Identifier: Apache-2.0
"""Truncated SVD of a stack of matrices by Chebyshev-filtered subspace iteration.

A block `Q` of `l > k` orthonormal columns is filtered by a polynomial in `A = W^T W` that is small
on `[0, b]` and grows as fast as a polynomial can beyond it (a Chebyshev polynomial; `b` is the
least the block holds, about the largest eigenvalue that it cannot hold). The polynomial is applied
as a product of shifts by its roots, in Leja order, so that the block can be orthonormalised between
any two factors: the three-term recurrence would overflow on spectra with outliers. The first cycles
are steered by Rayleigh quotients of the block's columns; after them a Rayleigh-Ritz step reads off
the singular triplets, and the residual, which the next factor needs anyway, gives the error left.

Sources: Halko, Martinsson, Tropp, SIAM Review 53 (2011), for the range finder; Zhou, Saad, Tiago,
Chelikowsky, J. Comput. Phys. 219 (2006), for the filter; Feng, Yu, Xie, arXiv 2404.09276 (2024),
for shifts between orthonormalisations. The error estimate is first-order perturbation theory.
"""

import functools
import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from . import _backends, ops
from ._operator import Operator, Stack
from ._steering import ENOUGH, LEAST_END, SHORT_CYCLES, Cycle, Facts, batches, next_cycles

# Between two orthonormalisations the leading directions may outgrow the rest by this factor: Ritz
# vectors hold little of each other's directions, so that float32 has digits left for the smallest.
_GROWTH_CAP = 1e6
# The most that a column may hold of the leading directions, by the estimate of `_filter`, where
# blocks are orthonormalised from 16-bit pieces: what is there 300 times over its own direction is
# lost in the Gram matrix, and six times the estimate were seen.
_GROWTH_CAP_ROUNDED = 50.0
# Factors that bring as much of the leading directions back into an orthonormal column as it has of
# its own: none for a random block, and one more after each orthonormalisation, up to here, where
# rounding holds as much as they do.
_PURE = 2
# Cycles that start with a glance; on a CPU a warm start has none.
_GLANCES = 3
# Degrees after which a block's random columns show where the eigenvalues outside begin.
_FILTERED = 4
# Error to assume of vectors while nothing shows that.
_UNKNOWN_ERROR = 1.0
# Products that must be left for a glance to be followed by a look that judges.
_ENOUGH_LEFT = 8
# Spread of the Ritz values from which float32 rounding shows in residuals.
_STEEP = 1e3


@functools.cache
def chebyshev_roots(degree: int) -> tuple[float, ...]:
    """Roots of the Chebyshev polynomial of `[0, 1]` in Leja order.

    In that order every partial product stays of moderate size over the whole interval.
    """
    if degree == 0:
        return ()
    left = [(1 + math.cos(math.pi * (j + 0.5) / degree)) / 2 for j in range(degree)]
    order = [min(left)]
    left.remove(order[0])
    while left:
        best = max(left, key=lambda x: sum(math.log(abs(x - y)) for y in order))
        order.append(best)
        left.remove(best)
    return tuple(order)


@functools.cache
def _roots(degree: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(chebyshev_roots(degree), dtype=torch.float32, device=device)


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
    """What a block holds, for a stack."""

    is_look: bool  # or else a glance
    Q: torch.Tensor  # (b, n, l) Ritz vectors, or the block itself where R is yet to be applied
    Y: torch.Tensor | None  # (b, m, l) W Q; None after a glance that a look cannot follow at once
    Z: torch.Tensor | None  # (b, n, l) A Q; None where R is yet to be applied
    rho: torch.Tensor | None  # (b, n, l) residuals A Q - Q theta, where they were kept
    R: torch.Tensor | None  # (b, l, l) turns Q and Y into Ritz vectors, where that was put off
    quotients: torch.Tensor  # (b, l) Rayleigh quotients of A, column by column
    theta: torch.Tensor  # (b, l) the same in descending order: Ritz values, or near them
    error: torch.Tensor  # (b,) estimated projector error of the leading k
    planned: torch.Tensor  # (b,) what is left to damp of it, not capped at a right angle
    mixed: torch.Tensor  # (b,) the part of it that goes with the square of what is damped

    def with_unknown(self, is_bounded: bool, tol: float) -> "_Ritz":
        """The same where the last columns are random, so that their values hide what is outside.

        Where the known columns reach beyond the cut, the error counts from the last of them; the
        plan, which does not, is to filter at all where that is too much. Where they end at the cut,
        nothing is known of what lies outside, and the error is taken for a large one.
        """
        if is_bounded:
            short_of = self.error > ENOUGH * tol
            return replace(
                self, planned=torch.where(short_of, self.planned.clamp_min(tol), self.planned)
            )
        large = self.planned.clamp_min(_UNKNOWN_ERROR)
        return replace(self, error=large, planned=large)

    def __getitem__(self, index: torch.Tensor) -> "_Ritz":
        """The entries of the stack that `index` names."""
        values = [getattr(self, f.name) for f in fields(self)[1:]]
        some: list[Any] = [None if value is None else value[index] for value in values]
        return _Ritz(self.is_look, *some)

    def block(self, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and product with `A` for a filter to start from."""
        Q, Z = self.Q, self.Z
        if self.R is not None and self.rho is not None:
            Q = ops.rotate(Q, self.R, backend=backend)
            Z = torch.addcmul(self.rho, Q, self.theta.float()[:, None])
        return Q, Z  # type: ignore[return-value]

    def leading(self, k: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `k` Ritz vectors of a look and their products with `W`."""
        Q, Y = self.Q, self.Y
        if self.R is None:
            return Q[:, :, :k].contiguous(), Y[:, :, :k].contiguous()  # type: ignore[index]
        R = self.R[:, :, :k].contiguous()
        Q = ops.rotate(Q, R, backend=backend)
        return Q, ops.rotate(Y, R, backend=backend)  # type: ignore[arg-type]


def _glance(
    A: Operator, Q: torch.Tensor, k: int, known: int, *, is_hopeful: bool, is_first: bool
) -> _Ritz:
    """What steers a cycle, without an eigenproblem: Rayleigh quotients for Ritz values.

    The columns of an orthonormalised block are in the order of what they hold, nearly, so that the
    quotients are near the Ritz values. Of a block that is still nearly random the least of them is
    the better place to end the damped interval: the least Ritz value is low by a factor of two.

    With `is_hopeful` the products are those of a look, which can go on from here. With `is_first`
    the block is that of a random start, whose residuals are large.
    """
    Y = rho = None
    if A.G is None and is_hopeful:
        Y = A.forward(Q, 2)
        Z = A.backward(Y, 2)
    else:
        Z = A.apply(Q, 2 if is_hopeful else 1)
    H = A.inner(Q, Z, 1 if is_first else 2)
    quotients = torch.diagonal(H, dim1=1, dim2=2).clamp_min(0)
    theta, order = quotients.sort(dim=1, descending=True)
    if is_first:
        # By Pythagoras; what cancels is little beside residuals of this size.
        lengths = [torch.linalg.vector_norm(X, dim=1).square() for X in (Z, H)]
        squares = (lengths[0] - lengths[1]).clamp_min(0)
    else:
        rho = Z - ops.rotate(Q, H, backend=A.backend)
        squares = torch.linalg.vector_norm(rho, dim=1).square()
    squares = squares.gather(1, order)
    # Of the columns beyond k, the last ones hold the block's end between them.
    theta[:, -1] = theta[:, -max(1, theta.shape[1] // 16) :].mean(dim=1)
    width = theta.shape[1]
    error, planned, mixed = ops.subspace_error(squares, theta, width, k, A.rows, backend=A.backend)
    if known < width:
        error = ops.subspace_error(squares, theta, known, k, A.rows, backend=A.backend)[0]
    values = (quotients, theta, error, planned, mixed)
    return _Ritz(False, Q, Y, Z, None if Y is None else rho, None, *values)


def _rayleigh_ritz(
    A: Operator, Q: torch.Tensor, k: int, known: int, glance: _Ritz | None = None
) -> _Ritz:
    """Singular triplets of `W` within span(Q), from two products with `W` or those of a glance."""
    backend = A.backend
    Y, rho = (None, None) if glance is None else (glance.Y, glance.rho)
    if Y is None:
        Y = A.forward(Q, 2)
    # On a CPU float64 costs a small eigenproblem little, and it keeps a steep spectrum's end.
    dtype = torch.float64 if Q.device.type == "cpu" else torch.float32
    H = ops.gram(Y, dtype=dtype, backend=backend)
    theta, R = ops.symmetric_eigh(H, backend=backend)
    theta = theta.clamp_min(0)
    Z = put_off = None
    if rho is not None:
        # Mostly the last look, of which only the leading vectors are needed.
        rho, put_off = ops.rotate(rho, R, backend=backend), R
    else:
        Q = ops.rotate(Q, R, backend=backend)
        Y = ops.rotate(Y, R, backend=backend)
        Z = A.backward(Y, 2)
        if bool((theta[:, 0] > _STEEP * theta[:, -1]).any()):
            # Rounding in Y points along the leading vectors, which the block holds: project it out.
            rho = Z - ops.rotate(Q, torch.bmm(Q.mT, Z), backend=backend)
        else:
            rho = torch.addcmul(Z, Q, theta.float()[:, None], value=-1)
    C = ops.gram(rho, backend=backend)
    error, planned, mixed = ops.subspace_error(C, theta, known, k, A.rows, backend=backend)
    values = (theta.float(), theta, error, planned.clamp_max(1), mixed)
    return _Ritz(True, Q, Y, Z, None if put_off is None else rho, put_off, *values)


def _next_cycles(A: Operator, ritz: _Ritz, k: int, tol: float) -> list[Cycle]:
    """The next cycle of each matrix."""
    values = (ritz.theta[:, 0], ritz.theta[:, k - 1], ritz.theta[:, -1])
    facts = torch.stack([*values, ritz.planned, ritz.mixed, ritz.error]).double()
    # Once for all that steers: a GPU is idle from here to the next product.
    return next_cycles(
        [Facts(*row) for row in facts.T.tolist()],
        tol,
        rounding=A.rounding,
        gram_rounding=A.gram_rounding,
        is_look=ritz.is_look,
        together=A.on_gpu,
    )


def _filter(
    A: Operator, ritz: _Ritz, coarse: int, fine: int, gain: float, pure: int
) -> torch.Tensor:
    """Applies the polynomial of degree `coarse + fine` to the block and orthonormalises it.

    A leading direction gains on the rest by `gain` in one factor, at most, over the stack; it takes
    `pure` of them to be as much of a column as the column's own direction.
    """
    b = torch.maximum(ritz.theta[:, -1], LEAST_END * ritz.theta[:, 0]).float().clamp_min(1e-30)
    roots = _roots(coarse + fine, b.device)
    shifts = roots[:, None] * b
    # A factor's own size for a column above b, which keeps the block in float16's range.
    sizes = torch.maximum(ritz.quotients - shifts[:, :, None], b[:, None] / 2)
    cap, purest = (_GROWTH_CAP, 0) if A.rounding == 0 else (_GROWTH_CAP_ROUNDED, _PURE)
    pure = min(pure, purest)
    (X, Z), held = ritz.block(A.backend), gain**-pure
    for j, (shift, scale) in enumerate(zip(shifts, 1 / sizes, strict=True)):
        pieces = 1 if j < coarse else 2
        if j:
            Z = A.apply(X, pieces)
        X = ops.shift(Z, X, shift, scale, backend=A.backend)
        held *= gain
        if j + 1 < len(roots) and held * gain > cap:
            pure = min(pure + 1, purest)
            X, held = ops.orthonormalize(X, quick=True, backend=A.backend), gain**-pure
    return ops.orthonormalize(X, backend=A.backend)


def _finish(backend: str, ritz: _Ritz, k: int) -> Triplets:
    """Triplets of the leading `k` Ritz vectors, on the tall side as orthonormal as on the short."""
    V, Y = ritz.leading(k, backend)
    S, order = torch.linalg.vector_norm(Y, dim=1).sort(dim=1, descending=True, stable=True)
    Y = Y.gather(2, order[:, None].expand_as(Y))
    V = V.gather(2, order[:, None].expand_as(V))
    U = ops.orthonormalize(Y, backend=backend)
    return Triplets(U, S, V, ritz.error, torch.zeros(len(S), dtype=torch.long))


def _is_glance(stage: int, left: int) -> bool:
    """Whether a stage with so many products left starts with a glance, or else with a look."""
    return stage < _GLANCES and left >= _ENOUGH_LEFT


def _solve(
    A: Operator,
    Q: torch.Tensor,
    k: int,
    tol: float,
    left: int,
    stage: int,
    known: int,
    *,
    is_cold: bool = False,
    is_hopeful: bool = False,
    is_quick: bool = False,
    glance: _Ritz | None = None,
) -> Triplets:
    """Looks at the block, filters it as far as each matrix needs, and goes on with what is left.

    `left` is how many products may still be made; `stage` counts the cycles made, of which the
    first ones are short and start with a glance. The first `known` columns of the block hold the
    leading directions, nearly; the others still any direction. `is_cold` says that the block is
    that of a random start, `is_hopeful` that the last cycle should have been enough, and a `glance`
    at this block that it was. With `is_quick` the block is orthonormal as a glance takes it, not as
    a look does.
    """
    count, _, width = Q.shape
    if stage >= _GLANCES:
        # What the Gram matrix could do is done.
        A = replace(A, G=None)
    if _is_glance(stage, left):
        # A first glance sees no error as small as what a rounded Gram matrix leaves; later ones do.
        both = is_hopeful or (A.G is not None and stage > 0)
        ritz = _glance(A, Q, k, known, is_hopeful=both, is_first=is_cold)
    else:
        ritz = _rayleigh_ritz(A, Q, k, known, glance)
    if known < width:
        ritz = ritz.with_unknown(known > k, tol)
    del Q, glance
    left -= 2
    cycles = _next_cycles(A, ritz, k, tol)
    most = max(0, left // 2)
    work = max(cycle.clamp(most).work for cycle in cycles)
    if A.G is None and not ritz.is_look and work >= A.gram_from:
        A = A.with_gram()
        cycles = _next_cycles(A, ritz, k, tol)
    planned = cycles
    if stage < len(SHORT_CYCLES) and not ritz.is_look:
        cycles = [cycle.cut(SHORT_CYCLES[stage]) for cycle in cycles]
    cycles = [cycle.clamp(most) for cycle in cycles]
    is_enough = cycles == planned
    parts = []
    # Matrices with the same cycle run as one batch.
    for (coarse, fine), index in batches(cycles).items():
        whole = len(index) == count
        # What is done needs no copy of its weights.
        is_done = coarse + fine == 0 and ritz.is_look
        where = None if whole else torch.tensor(index, device=ritz.Q.device)
        some = A if where is None or is_done else A[where]
        gain = max(cycles[i].gain for i in index)
        parts.append((coarse, fine, gain, index, some, ritz if where is None else ritz[where]))
    del ritz, some
    results = []
    while parts:
        coarse, fine, gain, index, some, mine = parts.pop()
        spent = 2 * max(coarse + fine, 1)
        if coarse + fine > 0:
            block = _filter(some, mine, coarse, fine, gain, 0 if stage == 0 else _PURE)
            del mine
            is_random = known > k and coarse + fine < _FILTERED
            now_known = known if is_random else width
            then = left + 2 - spent
            found = _solve(some, block, k, tol, then, stage + 1, now_known, is_hopeful=is_enough)
        elif mine.is_look:
            found = _finish(some.backend, mine, k)
        else:
            # Nothing to damp, by what a glance can see: a look goes on from it where it can.
            again = 2 if mine.rho is not None else 0
            spent -= again
            block = ops.orthonormalize(mine.Q, backend=some.backend) if is_quick else mine.Q
            found = _solve(some, block, k, tol, left + again, _GLANCES, known, glance=mine)
        results.append((index, replace(found, passes=found.passes + spent)))
    return _merge(results, count)


def _merge(results: list[tuple[list[int], Triplets]], count: int) -> Triplets:
    """Puts the results of parts of a stack back in the stack's order."""
    if len(results) == 1:
        return results[0][1]
    merged = {}
    for f in fields(Triplets):
        first = getattr(results[0][1], f.name)
        merged[f.name] = first.new_empty(count, *first.shape[1:])
        for index, part in results:
            merged[f.name][torch.tensor(index, device=first.device)] = getattr(part, f.name)
    return Triplets(**merged)


def iterate(
    W: torch.Tensor,
    start: torch.Tensor,
    k: int,
    tol: float,
    max_passes: int,
    *,
    use_gram: bool,
    gram_from: float = math.inf,
    known: int,
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
        use_gram: filter with the Gram matrix instead of `W` as far as its rounding allows.
        gram_from: form one later where a glance sees at least so many degrees left, those in two
            pieces counted twice.
        known: leading columns of the start that are those of a matrix like this one, at least `k`;
            0 for a random start.
        backend: passed to the ops.

    Returns:
        Triplets; it is for the caller to compare their error with the tolerance.
    """
    count, m, n = W.shape
    flipped = n > m
    halves = W.is_cuda and _backends.requested(backend) != "reference"
    A = Operator(Stack.of(W, halves), flipped, None, backend, gram_from)
    if use_gram and not known:
        A = A.with_gram()
    Q = start.expand(count, -1, -1).contiguous()
    spent = 0
    if not known:
        Q, spent = A.apply(Q), 2
    # On a GPU a look too early costs more than a glance.
    stage = _GLANCES if known and not A.on_gpu else 0
    left = max_passes - spent
    quick = _is_glance(stage, left)
    Q = ops.orthonormalize(Q, quick=quick, backend=backend)
    is_cold = not known
    known = known or Q.shape[2]
    found = _solve(A, Q, k, tol, left, stage, known, is_cold=is_cold, is_quick=quick)
    found = replace(found, passes=found.passes + spent)
    return replace(found, U=found.V, V=found.U) if flipped else found
