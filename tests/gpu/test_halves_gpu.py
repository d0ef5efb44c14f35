# SPDX-License-Identifier: Apache-2.0
"""Weights and Gram matrices as float16, on a GPU."""

import op_cases as cases
import pytest
import torch
from torch.testing import assert_close

from lorax_kernels import _batching, ops

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("flip", [False, True], ids=["rows apart", "columns apart"])
@pytest.mark.parametrize("shape", [*cases.GRAM_SHAPES, (3, 4096, 2048)], ids=cases.label)
def test_gram_halves(backend: str, shape: tuple[int, ...], flip: bool) -> None:
    X = torch.randn(shape, device="cuda").half()
    X = X.mT.contiguous().mT if flip else X
    junk = torch.full((1 << 24,), float("nan"), device="cuda")
    del junk  # what the allocator hands out next is full of NaN
    pieces = ops.gram_halves(X, backend=backend)
    exact = X.double().mT @ X.double()
    assert cases.relative(cases.weigh_halves(pieces), exact) < cases.HALVES_TOLERANCE
    assert torch.equal(pieces, pieces.mT) or backend == "triton"


def test_gram_halves_of_strides(backend: str) -> None:
    X = torch.randn(2, 63, 199, device="cuda").half()
    exact = X.double().mT @ X.double()
    for view in (cases.awkward(X), torch.cat([X, X], dim=2)[:, :, :199]):
        found = cases.weigh_halves(ops.gram_halves(view, backend=backend))
        assert cases.relative(found, exact) < cases.HALVES_TOLERANCE
    assert ops.gram_halves(X[:0], backend=backend).shape == (2, 0, 199, 199)


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (63, 64), (1025, 200)], ids=str)
@pytest.mark.parametrize(("exponent", "low", "high"), cases.STACKED)
def test_stack_halves(
    backend: str, shape: tuple[int, int], exponent: int, low: float, high: float
) -> None:
    matrices = [cases.scaled_matrix(*shape, low, high, "cuda") for _ in range(3)]
    unaligned = cases.awkward(matrices[0][None])[0]
    matrices += [matrices[0].mT.contiguous().mT, unaligned]
    stacked, largest = ops.stack_halves(matrices, [exponent] * 5, backend=backend)
    exact = torch.stack(matrices).double()
    assert torch.equal(stacked.double(), exact * 2.0**exponent)
    assert torch.equal(largest.double(), exact.abs().amax((1, 2)))


@pytest.mark.parametrize("dtype", cases.STACKED_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (63, 64), (1025, 200), (4099, 2048)], ids=str)
def test_largest_magnitudes(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """In vectors and, behind one address that is not aligned, element by element."""
    matrices, expected = cases.extremes(*shape, dtype, "cuda")
    unaligned = torch.empty(1 + matrices[0].numel(), dtype=dtype, device="cuda")[1:]
    unaligned = unaligned.view(shape).copy_(matrices[0])
    columns_apart = matrices[1].mT.contiguous().mT
    for some, largest in (
        (matrices, expected),
        ([*matrices, unaligned, columns_apart], torch.cat([expected, expected[:2]])),
    ):
        _, found = ops.stack_halves(some, [2] * len(some), backend=backend)
        assert_close(found, largest, rtol=0, atol=0, equal_nan=True)


def test_matrices_without_entries(backend: str) -> None:
    matrices = [torch.ones(0, 3, device="cuda").half()] * 2
    stacked, largest = ops.stack_halves(matrices, [0, 1], backend=backend)
    assert (tuple(stacked.shape), largest.tolist()) == ((2, 0, 3), [0.0, 0.0])


def test_a_wrong_guess_is_made_good(backend: str) -> None:
    """Entries beyond the sample that are far larger, one beyond float16 as guessed."""
    matrices = [cases.scaled_matrix(1025, 1024, 2.0**-10, 2.0**-5, "cuda") for _ in range(4)]
    matrices[1][-1, -1] = 3
    matrices[3][-1, 0] = -(2.0**30)
    stack, scale = _batching.stack(matrices, list(range(4)), False, True, backend)
    largest = stack.double().abs().amax((1, 2))
    assert bool(((largest >= 0.125) & (largest < 0.5)).all())
    back = stack.double() * scale[:, None, None]
    assert torch.equal(back[:3], torch.stack(matrices[:3]).double())
    assert back[3, -1, 0] == -(2.0**30)
    matrices[2][-1, -1] = float("nan")
    with pytest.raises(ValueError, match="matrix 2 holds NaN or Inf"):
        _batching.stack(matrices, list(range(4)), False, True, backend)


def test_copies_are_made_a_few_at_a_time(backend: str) -> None:
    """2 GB of matrices that lie column after column: their copies take 256 MB and one more."""
    base = torch.randn(2048, 4096, device="cuda").bfloat16()
    matrices = [base.clone().mT for _ in range(128)]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    stacked, largest = ops.stack_halves(matrices, [0] * 128, backend=backend)
    extra = torch.cuda.max_memory_allocated() - before - stacked.nbytes
    assert extra <= (256 << 20) + base.nbytes
    assert torch.equal(stacked, torch.stack(matrices).half())
    assert bool((largest == base.abs().max()).all())


def test_thousands_of_matrices(backend: str) -> None:
    """More than one launch takes."""
    matrices = list(torch.arange(4096.0, device="cuda").half().view(-1, 1, 1))
    exponents = [i % 3 for i in range(4096)]
    stacked, largest = ops.stack_halves(matrices, exponents, backend=backend)
    expected = torch.tensor([i * 2 ** (i % 3) for i in range(4096)])
    assert torch.equal(stacked.flatten().cpu(), expected.half())
    assert torch.equal(largest.cpu(), torch.stack(matrices).flatten().float().cpu())
