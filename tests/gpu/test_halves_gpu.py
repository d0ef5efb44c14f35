# SPDX-License-Identifier: Apache-2.0
"""Weights and Gram matrices as float16, on a GPU."""

import op_cases as cases
import pytest
import torch

from lorax_kernels import ops

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
    stacked = ops.stack_halves(matrices, [exponent] * 5, backend=backend)
    exact = torch.stack(matrices).double() * 2.0**exponent
    assert torch.equal(stacked.double(), exact)


def test_copies_are_made_a_few_at_a_time(backend: str) -> None:
    """2 GB of matrices that lie column after column: their copies take 256 MB and one more."""
    base = torch.randn(2048, 4096, device="cuda").bfloat16()
    matrices = [base.clone().mT for _ in range(128)]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    stacked = ops.stack_halves(matrices, [0] * 128, backend=backend)
    extra = torch.cuda.max_memory_allocated() - before - stacked.nbytes
    assert extra <= (256 << 20) + base.nbytes
    assert torch.equal(stacked, torch.stack(matrices).half())


def test_thousands_of_matrices(backend: str) -> None:
    """More than one launch takes."""
    matrices = list(torch.arange(4096.0, device="cuda").half().view(-1, 1, 1))
    stacked = ops.stack_halves(matrices, [i % 3 for i in range(4096)], backend=backend)
    expected = torch.tensor([i * 2 ** (i % 3) for i in range(4096)])
    assert torch.equal(stacked.flatten().cpu(), expected.half())
