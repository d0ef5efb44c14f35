# SPDX-License-Identifier: Apache-2.0
"""Weights and Gram matrices as float16, in plain PyTorch."""

import math

import op_cases as cases
import pytest
import torch

from lorax_kernels import _operator, ops


@pytest.mark.parametrize("shape", cases.GRAM_SHAPES, ids=cases.label)
def test_gram_halves(shape: tuple[int, ...]) -> None:
    X = torch.randn(shape).half()
    pieces = ops.gram_halves(X)
    exact = X.double().mT @ X.double()
    assert cases.relative(cases.weigh_halves(pieces), exact) < cases.HALVES_TOLERANCE
    assert torch.equal(pieces, pieces.mT)
    assert torch.equal(ops.gram_halves(cases.awkward(X)), pieces)


@pytest.mark.parametrize(("exponent", "low", "high"), cases.STACKED)
def test_stack_halves_is_exact(exponent: int, low: float, high: float) -> None:
    matrices = [cases.scaled_matrix(7, 9, low, high) for _ in range(3)]
    stacked = ops.stack_halves([*matrices, matrices[0].mT.contiguous().mT], [exponent] * 4)
    exact = torch.stack([*matrices, matrices[0]]).double() * 2.0**exponent
    assert torch.equal(stacked.double(), exact)


@pytest.mark.parametrize(
    ("exponent", "size", "found"), [(-200, 2.0**127, 0.0), (200, 2.0**-126, math.inf)]
)
def test_exponents_at_the_ends(exponent: int, size: float, found: float) -> None:
    """A zero stays one, and nothing becomes NaN on the way to what float16 cannot hold."""
    stacked = ops.stack_halves([torch.tensor([[0.0, size]]).bfloat16()], [exponent])
    assert stacked.flatten().tolist() == [0.0, found]


def test_each_matrix_has_its_exponent() -> None:
    one = torch.ones(2, 3, dtype=torch.float16)
    stacked = ops.stack_halves([one, one, one], [0, -3, 15])
    assert stacked[:, 0, 0].tolist() == [1.0, 0.125, 32768.0]


BAD = {
    "no matrix": (lambda: ops.stack_halves([], []), ValueError, "a matrix, and an exponent"),
    "float32 matrices": (
        lambda: ops.stack_halves([torch.ones(1, 1)], [0]),
        TypeError,
        "bfloat16 or float16, got torch.float32",
    ),
    "two shapes": (
        lambda: ops.stack_halves([torch.ones(1, 1).half(), torch.ones(1, 2).half()], [0, 0]),
        ValueError,
        r"shapes of all matrices must agree, got \(1, 1\) and \(1, 2\)",
    ),
    "an exponent beyond float32's powers": (
        lambda: ops.stack_halves([torch.zeros(1, 1).half()] * 2, [200, -201]),
        ValueError,
        "exponents must be from -200 to 200, got -201",
    ),
    "gram of bfloat16": (
        lambda: ops.gram_halves(torch.ones(1, 1, 1).bfloat16()),
        TypeError,
        "X must be one of float16, got torch.bfloat16",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_float32_in_two_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """22 of 24 bits, also where the second pieces are made one matrix at a time."""
    W = torch.randn(3, 63, 199) / 8
    whole = _operator.Stack.of(W, True)
    monkeypatch.setattr(_operator, "_SCRATCH_BYTES", 1)
    high, low = _operator.Stack.of(W, True).parts
    assert torch.equal(torch.stack(whole.parts), torch.stack([high, low]))
    assert high.dtype == low.dtype == torch.float16
    exact = W.double()
    lost = (high.double() + low.double() * whole.factors[1] - exact).abs()
    # Under 2^-14 first pieces are in steps of 2^-24, and the second ones in steps of 2^-35.
    assert bool((lost <= 2.0**-22 * exact.abs() + 2.0**-36).all())
