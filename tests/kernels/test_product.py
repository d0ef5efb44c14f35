# SPDX-License-Identifier: Apache-2.0
"""`svd_product` against float64, by LAPACK and by the batched route that GPUs take."""

import pytest
import torch

import lorax_kernels as lk
from lorax_kernels import product

EPS = torch.finfo(torch.float32).eps
SHAPES = [(40, 30, 1), (64, 48, 16), (199, 63, 33), (140, 300, 128), (16, 16, 16), (1, 9, 1)]


@pytest.fixture(params=["lapack", "batched"])
def route(request, monkeypatch):
    if request.param == "batched":
        monkeypatch.setattr(product, "_runs_lapack", lambda *_: False)
    return request.param


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(11)


def factors(m, n, r, generator, batch=()):
    B = torch.randn(*batch, m, r, generator=generator)
    return B, torch.randn(*batch, r, n, generator=generator)


def check(svd, B, A):
    """Orthonormal factors that give the product back to float32, with float64's singular values."""
    exact = B.double() @ A.double()
    k = svd.S.shape[-1]
    U, S, V = svd.U.double(), svd.S.double(), svd.V.double()
    values = torch.linalg.svdvals(exact)[..., :k]
    scale = values[..., :1].clamp(min=torch.finfo(torch.float32).tiny)
    # Rounding of the results to float32 is all that is left: 2^-24 of each, a few of them in a sum.
    assert ((S - values).abs() / scale).max() < 2 * EPS
    for X in (U, V):
        assert (X.mT @ X - torch.eye(k).double()).abs().max() < 8 * EPS
    if k == min(B.shape[-2], B.shape[-1], A.shape[-1]):
        difference = (U * S[..., None, :]) @ V.mT - exact
        assert (difference.flatten(-2).norm(dim=-1) / scale[..., 0]).max() < 8 * EPS * k**0.5
    else:
        # V spans the leading right subspace: the energy of the product on it is the exact one.
        energy = (exact @ V).square().sum((-2, -1)).sqrt()
        assert (energy / values.square().sum(-1).sqrt() - 1).abs().max() < 8 * EPS
    largest = svd.U.gather(-2, svd.U.abs().argmax(-2, keepdim=True))
    assert (largest > 0).all()
    assert (svd.S[..., 1:] <= svd.S[..., :-1] + EPS * svd.S[..., :1]).all()


@pytest.mark.parametrize(("m", "n", "r"), SHAPES, ids=lambda x: str(x))
def test_shapes(route, m, n, r, generator):
    B, A = factors(m, n, r, generator)
    check(lk.svd_product(B, A), B, A)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(route, dtype, generator):
    B, A = (x.to(dtype) for x in factors(50, 40, 8, generator))
    svd = lk.svd_product(B, A)
    assert svd.U.dtype == svd.S.dtype == svd.V.dtype == torch.float32
    check(svd, B, A)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_rank(route, rank, generator):
    B, A = factors(60, 50, 12, generator, (3,))
    svd = lk.svd_product(B, A, rank)
    assert svd.S.shape == (3, rank)
    check(svd, B, A)


def test_columns_of_very_different_size(route, generator):
    B, A = factors(300, 200, 32, generator)
    check(lk.svd_product(B * 10.0 ** torch.linspace(-6, 6, 32), A), *(_scaled(B, 32), A))
    both = 10.0 ** torch.linspace(6, -6, 32)
    check(lk.svd_product(_scaled(B, 32), A * both[:, None]), _scaled(B, 32), A * both[:, None])


def _scaled(B, r):
    return B * 10.0 ** torch.linspace(-6, 6, r)


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-4, 1e-2])
def test_nearly_dependent_columns(route, gap, generator):
    """With gap 0 they are dependent; in between, the Gram matrix is singular to rounding."""
    B, A = factors(120, 90, 10, generator, (4,))
    B[1, :, 5:] = B[1, :, :5] + gap * B[1, :, 5:]
    A[2, 1:] = A[2, :1] + gap * A[2, 1:]
    check(lk.svd_product(B, A), B, A)


def test_cancelling_columns(route, generator):
    """Large terms that leave a small product."""
    B, A = factors(80, 70, 6, generator)
    B = torch.cat([B, B], 1).double()
    A = torch.cat([A, -A + 1e-3 * torch.randn(A.shape, generator=generator)]).double()
    check(lk.svd_product(B, A), B, A)


def test_zero_factors(route, generator):
    B, A = factors(30, 20, 4, generator, (3,))
    B[0], A[1] = 0, 0
    B[2, :, 1] = 0
    svd = lk.svd_product(B, A)
    assert torch.equal(svd.S[:2], torch.zeros(2, 4))
    check(svd, B, A)


@pytest.mark.parametrize(("m", "n"), [(5, 40), (40, 5), (3, 4)])
def test_more_columns_than_rows(route, m, n, generator):
    B, A = factors(m, n, 12, generator)
    svd = lk.svd_product(B, A)
    assert svd.rank == min(m, n)
    check(svd, B, A)


def test_lists_of_mixed_shapes_equal_single_calls(route, generator):
    pairs = [factors(*shape, generator) for shape in [*SHAPES[:4], SHAPES[1], SHAPES[0]]]
    pairs.append(tuple(x.bfloat16() for x in pairs[1]))
    together = lk.svd_product([B for B, _ in pairs], [A for _, A in pairs])
    for svd, (B, A) in zip(together, pairs, strict=True):
        check(svd, B, A)
        alone = lk.svd_product(B, A)
        assert isinstance(svd.error, float)
        assert svd.path == alone.path == "exact"
        # Sums of a batch may be taken in another order.
        torch.testing.assert_close(svd.S, alone.S, rtol=4 * EPS, atol=4 * EPS * float(alone.S[0]))
        update = [(x.U * x.S) @ x.V.mT for x in (svd, alone)]
        assert (update[0] - update[1]).norm() < 16 * EPS * update[0].norm()


def test_lists_are_cut_to_the_memory_at_hand(route, generator, monkeypatch):
    monkeypatch.setattr(product, "_BATCH_BYTES", 8 * 2 * (40 * 8 + 8 * 30))
    pairs = [factors(40, 30, 8, generator) for _ in range(5)]
    for svd, (B, A) in zip(
        lk.svd_product(*map(list, zip(*pairs, strict=True))), pairs, strict=True
    ):
        check(svd, B, A)


def test_empty_list():
    assert lk.svd_product([], []) == []


def test_bad_input(route):
    one = torch.ones
    with pytest.raises(ValueError, match=r"do not multiply: \(4, 2\) and \(3, 5\)"):
        lk.svd_product(one(4, 2), one(3, 5))
    with pytest.raises(ValueError, match="rank must be between 1 and 2, got 3"):
        lk.svd_product(one(4, 2), one(2, 5), rank=3)
    with pytest.raises(ValueError, match="layer 1: rank must be between 1 and 1, got 2"):
        lk.svd_product([one(4, 2), one(4, 1)], [one(2, 5), one(1, 5)], rank=2)
    with pytest.raises(TypeError, match="floating-point"):
        lk.svd_product(one(4, 2).long(), one(2, 5))
    with pytest.raises(TypeError, match="both tensors or both lists"):
        lk.svd_product(one(4, 2), [one(2, 5)])
    with pytest.raises(ValueError, match="one length, got 1 and 2"):
        lk.svd_product([one(4, 2)], [one(2, 5)] * 2)
    with pytest.raises(ValueError, match="layer 0: a list holds matrices"):
        lk.svd_product([one(1, 4, 2)], [one(1, 2, 5)])
    with pytest.raises(ValueError, match="stacks of them"):
        lk.svd_product(one(4), one(4))
    spoiled = [one(4, 2), one(4, 2)]
    spoiled[1][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"lora_B holds NaN or Inf \(entries \[1\]"):
        lk.svd_product(spoiled, [one(2, 5)] * 2)
    with pytest.raises(ValueError, match="lora_A holds NaN or Inf"):
        lk.svd_product(one(4, 2), one(2, 5) / 0)


def test_backend_that_cannot_run_here():
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
        lk.svd_product(torch.ones(4, 2), torch.ones(2, 5), backend="cuda")
    with pytest.raises(ValueError, match="backend must be one of"):
        lk.svd_product(torch.ones(4, 2), torch.ones(2, 5), backend="cpu")
