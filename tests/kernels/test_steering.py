# SPDX-License-Identifier: Apache-2.0
"""How far a cycle goes, from a few numbers."""

import math

import pytest

from lorax_kernels._steering import Cycle, Facts, batches, next_cycles

TOL = 2e-3
# Eigenvalues at the cut and at the end of the block that one degree tells apart by e^0.89.
FLAT = {"first": 1.0, "last": 1.0, "end": 0.83}


def cycles(*seen: Facts, rounding: float = 0.0, mixes: float = 0.0, **options: bool) -> list[Cycle]:
    options = {"is_look": False, "together": False} | options
    return next_cycles(seen, TOL, rounding=rounding, gram_rounding=[mixes] * len(seen), **options)


def seen(planned: float, error: float | None = None, mixed: float = 0.0, **values: float) -> Facts:
    values = FLAT | values
    return Facts(**values, planned=planned, mixed=mixed, error=planned if error is None else error)


def test_degrees_damp_to_half_of_the_tolerance() -> None:
    for planned in (0.1, 0.01, 0.003):
        (cycle,) = cycles(seen(planned))
        needed = math.acosh(planned / (TOL / 2)) / math.acosh(2 / 0.83 - 1)
        assert needed <= cycle.coarse < needed + 2
        assert cycle.fine == 0


def test_what_is_done_has_no_factors() -> None:
    assert [c.coarse for c in cycles(seen(0.4 * TOL), seen(0.6 * TOL))] == [0, 2]
    assert cycles(seen(0.6 * TOL), is_look=True)[0].coarse == 0


def test_last_factors_are_fine_where_rounding_shows() -> None:
    (rounded,) = cycles(seen(0.1), rounding=2.0**-12)
    # 2^-12 / 0.17 is 1.4 times what is aimed for: a little more than one degree.
    assert rounded.fine == 2
    (mixed,) = cycles(seen(0.1), rounding=2.0**-12, mixes=1e-3)
    assert mixed.fine > rounded.fine
    assert mixed.coarse + mixed.fine >= rounded.coarse + rounded.fine


def test_mixing_counts_with_its_root() -> None:
    (cycle,) = cycles(seen(0.1 * TOL, error=4 * TOL, mixed=4 * TOL), is_look=True)
    assert cycle.coarse >= 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_takes_the_longest_cycle(value: float) -> None:
    for facts in (seen(value), seen(0.1, last=math.nan)):
        (cycle,) = cycles(facts)
        assert cycle.coarse + cycle.fine == 24


def test_zeros_are_done() -> None:
    zero = Facts(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert cycles(zero)[0] == Cycle(0, 0, 2.0)
    assert cycles(zero, seen(0.1), together=True)[0].coarse > 0


def test_together_all_take_the_longest_unless_few_are_left() -> None:
    matrices = [seen(0.1), seen(0.01), seen(0.1 * TOL)]
    assert len(batches(cycles(*matrices, together=True))) == 1
    few = [seen(0.1), *[seen(0.1 * TOL)] * 4]
    found = batches(cycles(*few, together=True, is_look=True))
    assert sorted(found.values()) == [[0], [1, 2, 3, 4]]
    # A glance sends them all to the look: to leave any out is to copy the weights of the others.
    assert batches(cycles(*few, together=True)) == {(0, 0): [0, 1, 2, 3, 4]}


def test_cut_and_clamp() -> None:
    cycle = Cycle(5, 4, 2.0)
    assert cycle.work == 13
    assert cycle.cut(6) == Cycle(6, 0, 2.0)
    assert cycle.cut(9) == cycle
    assert cycle.clamp(6) == Cycle(2, 4, 2.0)
    assert cycle.clamp(3) == Cycle(0, 3, 2.0)
