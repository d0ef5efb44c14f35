# SPDX-License-Identifier: Apache-2.0
"""Weights and Gram matrices as float16, in plain PyTorch."""

import math

import op_cases as cases
import pytest
import torch
from torch.testing import assert_close

from lorax_kernels import _batching, _operator, ops


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
    matrices.append(matrices[0].mT.contiguous().mT)
    stacked, largest = ops.stack_halves(matrices, [exponent] * 4)
    exact = torch.stack(matrices).double()
    assert torch.equal(stacked.double(), exact * 2.0**exponent)
    assert torch.equal(largest.double(), exact.abs().amax((1, 2)))


@pytest.mark.parametrize(
    ("exponent", "size", "found"), [(-200, 2.0**127, 0.0), (200, 2.0**-126, math.inf)]
)
def test_exponents_at_the_ends(exponent: int, size: float, found: float) -> None:
    """A zero stays one, and nothing becomes NaN on the way to what float16 cannot hold."""
    stacked, largest = ops.stack_halves([torch.tensor([[0.0, size]]).bfloat16()], [exponent])
    assert stacked.flatten().tolist() == [0.0, found]
    assert largest.tolist() == [size]


def test_each_matrix_has_its_exponent() -> None:
    one = torch.ones(2, 3, dtype=torch.float16)
    stacked, largest = ops.stack_halves([one, one, one], [0, -3, 15])
    assert stacked[:, 0, 0].tolist() == [1.0, 0.125, 32768.0]
    assert largest.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", cases.STACKED_DTYPES, ids=str)
@pytest.mark.parametrize("exponent", [2, -20])
def test_largest_magnitudes(dtype: torch.dtype, exponent: int) -> None:
    for shape in [(1, 1), (7, 9), (63, 64)]:
        matrices, expected = cases.extremes(*shape, dtype)
        _, largest = ops.stack_halves(matrices, [exponent] * len(matrices))
        assert_close(largest, expected, rtol=0, atol=0, equal_nan=True)


def test_matrices_without_entries() -> None:
    stacked, largest = ops.stack_halves([torch.ones(0, 3).half()] * 2, [0, 1])
    assert (tuple(stacked.shape), largest.tolist()) == ((2, 0, 3), [0.0, 0.0])


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


def _stacked(matrices: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Every matrix as tensor cores take it, by what its leading entries say."""
    chunk = list(range(len(matrices)))
    return _batching.stack(matrices, chunk, False, True, "reference")


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A sample of eight entries; what is filled is how many matrices each conversion took."""
    counts: list[int] = []
    convert = ops.stack_halves

    def counted(
        matrices: list[torch.Tensor], exponents: list[int], *, backend: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        counts.append(len(matrices))
        return convert(matrices, exponents, backend=backend)

    monkeypatch.setattr(_batching, "_SAMPLE", 8)
    monkeypatch.setattr(ops, "stack_halves", counted)
    return counts


def _weights(dtype: torch.dtype, **rows: list[float]) -> torch.Tensor:
    """Eight rows of four; `first` are leading entries of rows from 0 on, `last` from 4 on."""
    W = torch.full((8, 4), 2.0**-10)
    for name, start in (("first", 0), ("last", 4)):
        W[start : start + len(rows.get(name, [])), 1] = torch.tensor(rows.get(name, []))
    return W.to(dtype)


GUESSES = {
    # name: (entries in the sample, entries beyond it, whether the guess suits)
    "a good sample": ([0.3], [0.4], True),
    "just under twice": ([0.375], [-0.74], True),
    "just under what is allowed": ([0.25], [-0.99], True),
    "more than is allowed": ([0.25], [1.0], False),
    "beyond float16 by the guess": ([2.0**-10], [2.0**9], False),
    "a tiny sample": ([2.0**-10], [0.5], False),
    "a negative one": ([3.0], [-900.0], False),
}


@pytest.mark.parametrize("flip", [False, True], ids=["rows apart", "columns apart"])
@pytest.mark.parametrize("dtype", cases.STACKED_DTYPES, ids=str)
@pytest.mark.parametrize("name", GUESSES)
def test_a_wrong_guess_is_made_good(
    name: str, dtype: torch.dtype, flip: bool, converted: list[int]
) -> None:
    first, last, suits = GUESSES[name]
    good = _weights(dtype, first=[0.3])
    W = _weights(dtype, first=first, last=last)
    W = W.mT if flip else W
    matrices = [good.mT if flip else good, W, W * 2]
    stack, scale = _stacked(matrices)
    assert converted == ([3] if suits else [3, 2])
    assert stack.dtype == torch.float16
    assert torch.equal(stack.double() * scale[:, None, None], torch.stack(matrices).double())
    largest = stack.double().abs().amax((1, 2))
    assert bool((largest >= (0.125 if suits else 0.25))[1:].all())
    assert bool((largest < 0.5).all())
    assert torch.equal(scale[1:] / scale[1], torch.tensor([1.0, 2.0]).double())


def test_a_sample_of_zeros(converted: list[int]) -> None:
    """It says nothing; a matrix of zeros is one, and one that suits as it is stays."""
    nothing, fine = torch.zeros(8, 4).bfloat16(), torch.zeros(8, 4).bfloat16()
    large = fine.clone()
    fine[7, 3], large[7, 3] = 0.3, 2.0**120
    matrices = [nothing, fine, large]
    stack, scale = _stacked(matrices)
    assert converted == [3, 1]
    assert scale.tolist() == [1.0, 1.0, 2.0**122]
    assert torch.equal(stack.double() * scale[:, None, None], torch.stack(matrices).double())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 7], ids=["in the sample", "beyond it"])
@pytest.mark.parametrize("dtype", cases.STACKED_DTYPES, ids=str)
def test_what_is_not_finite_is_named(
    bad: float, row: int, dtype: torch.dtype, converted: list[int]
) -> None:
    """The first of them in the order of the batch, wherever it is found out."""
    matrices = [_weights(dtype, first=[0.3]) for _ in range(6)]
    matrices[5][row, 3] = bad
    matrices[2][0, 0] = math.nan
    with pytest.raises(ValueError, match=r"^matrix 5 holds NaN or Inf; no SVD exists$"):
        _batching.stack(matrices, [0, 5, 2], False, True, "reference")
    with pytest.raises(ValueError, match=r"^matrix 5 holds NaN or Inf; no SVD exists$"):
        _batching.stack(matrices, [5], False, True, "reference")


def test_one_float16_matrix_that_suits_is_not_copied(converted: list[int]) -> None:
    W = _weights(torch.float16, first=[0.3])
    stack, scale = _stacked([W])
    assert (converted, scale.tolist()) == ([], [1.0])
    assert stack.data_ptr() == W.data_ptr()
    stack, scale = _stacked([W * 8])
    assert (converted, scale.tolist()) == ([1], [8.0])
    assert torch.equal(stack[0], W)
