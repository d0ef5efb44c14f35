# SPDX-License-Identifier: Apache-2.0
"""How far the next cycle of an iteration goes: a few numbers of each matrix, on the CPU."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

# Degrees a cycle may have. Few, because matrices that need the same degree run as one batch.
_DEGREES = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24)
# Degrees of the first cycles at most. The interval that they damp is a guess from a nearly random
# block, and degrees spent on a wrong interval are lost; a glance at what they made is cheap.
SHORT_CYCLES = (6, 8)
# A cycle aims well below the tolerance, so that it rarely ends just above it; it stops as far below
# because the estimate is of first order, and low by up to a half where the block's end is not yet
# at the eigenvalues outside.
_AIM = 0.5
ENOUGH = 0.65
# With a Gram matrix a degree more costs a tenth of another cycle, which would be made with weights.
_AIM_GRAM = 0.3
# On a GPU a batch goes on as a whole while at least this share of it is not done: to leave the rest
# out means to copy the weights of those that go on, which costs as much as two products and needs
# memory.
_STAYS_WHOLE = 0.25
# Where a block holds all there is, its last Ritz value is rounding and may be zero: the damped
# interval ends at this share of the first one at least.
LEAST_END = 1e-8


class Facts(NamedTuple):
    """What a look or a glance saw of one matrix."""

    first: float  # the largest Ritz value
    last: float  # the one at the cut
    end: float  # the least of the block
    planned: float  # error to be damped
    mixed: float  # error that goes with the square of what is damped
    error: float  # error to be judged by


@dataclass(frozen=True)
class Cycle:
    """The next cycle of one matrix; no factors where it is done."""

    coarse: int  # factors with the block rounded to one piece
    fine: int  # factors after those, with the block in two pieces
    gain: float  # how much a leading direction gains on the rest in one factor, at most

    @property
    def work(self) -> int:
        """Factors, those in two pieces counted twice."""
        return self.coarse + 2 * self.fine

    def cut(self, degree: int) -> "Cycle":
        """No more than `degree` factors, and none of them fine where there would be more."""
        is_longer = self.coarse + self.fine > degree
        return replace(self, coarse=degree, fine=0) if is_longer else self

    def clamp(self, most: int) -> "Cycle":
        """The same with `most` factors at most."""
        fine = min(self.fine, most)
        return replace(self, coarse=min(self.coarse, most - fine), fine=fine)


def next_cycles(
    matrices: Sequence[Facts],
    tol: float,
    *,
    rounding: float,
    gram_rounding: Sequence[float],
    is_look: bool,
    together: bool,
) -> list[Cycle]:
    """Smallest listed degree that should bring the error under the tolerance, for each matrix.

    Factors in one piece leave an error of about their rounding over `theta_k - theta_l`. Where that
    is above the tolerance, the last factors take two: as many as would bring the error from there
    under it.

    Args:
        matrices: what was seen of each.
        tol: projector error to reach.
        rounding: relative rounding of a block multiplied in one piece.
        gram_rounding: what rounding its Gram matrix to one piece mixes into a direction of each;
            0 for products with weights.
        is_look: whether a look saw it, rather than a glance.
        together: give all the same degree, unless few are left, and those only after a look: on a
            GPU products cost little, and small eigenproblems the same for a few matrices as for
            many.
    """
    # After a glance two degrees more cost less than a look too early.
    enough = (ENOUGH if is_look else _AIM) * tol
    degrees = []
    for x, mixes in zip(matrices, gram_rounding, strict=True):
        aim = (_AIM_GRAM if mixes > 0 else _AIM) * tol
        rate = math.acosh(max(1 + 1e-9, 2 * x.last / max(x.end, 1e-300) - 1))
        floor = max(rounding * x.last, mixes) / max(x.last - x.end, 1e-9 * x.last + 1e-300)
        # The order of arguments lets what is not a number through, to the longest cycle.
        planned = max(x.planned, math.sqrt(max(aim * x.mixed, 0.0)))
        needed = min(_DEGREES[-1], math.acosh(max(planned / aim, 1.0)) / rate)
        fine = min(_DEGREES[-1], math.acosh(max(min(planned, floor), aim) / aim) / rate)
        is_done = x.error <= enough or needed == 0
        total = 0 if is_done else _DEGREES[bisect_left(_DEGREES, needed)]
        degrees.append((total, 0 if is_done else math.ceil(fine)))
    if together:
        going_on = sum(total > 0 for total, _ in degrees)
        longest = max(total for total, _ in degrees), max(fine for _, fine in degrees)
        if going_on > _STAYS_WHOLE * len(degrees):
            degrees = [longest] * len(degrees)
        else:
            # After a glance the few others come along to the look, which then tells them apart.
            degrees = [longest if total > 0 and is_look else (0, 0) for total, _ in degrees]
    cycles = []
    for x, (total, fine) in zip(matrices, degrees, strict=True):
        end = max(x.end, LEAST_END * x.first, 1e-30)
        fine = min(fine, total)
        cycles.append(Cycle(total - fine, fine, max(2.0, 2 * x.first / end)))
    return cycles


def batches(cycles: Sequence[Cycle]) -> dict[tuple[int, int], list[int]]:
    """Indices of the matrices with the same degrees."""
    found: dict[tuple[int, int], list[int]] = {}
    for i, cycle in enumerate(cycles):
        found.setdefault((cycle.coarse, cycle.fine), []).append(i)
    return found
