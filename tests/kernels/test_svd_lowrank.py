# SPDX-License-Identifier: Apache-2.0
"""svd_lowrank against torch's own at the same q and niter, and svd_diff against float64.

Every spectrum, since an iteration that wins on one may lose on another; both orientations, large
enough to be iterated on, and an odd shape that is decomposed exactly.
"""

import functools
import sys

import pytest
import torch

import lorax_kernels as lk
from lorax_kernels import testing

SHAPES = {"tall": (400, 320), "wide": (320, 400), "odd": (199, 63)}


@functools.cache
def case(spectrum, shape, q):
    A = testing.matrix(spectrum, *shape, q, generator=torch.Generator().manual_seed(7))
    return A, torch.linalg.svdvals(A.double())


def quality(A, exact, U, S, V):
    """What an SVD misses: of the whole, of the energy on each side, of the singular values."""
    A, U, S, V = A.double(), U.double(), S.double(), V.double()
    k = len(S)
    total, head = (A**2).sum(), (exact[:k] ** 2).sum()
    excess = (torch.linalg.norm(A - (U * S) @ V.T) ** 2 - (exact[k:] ** 2).sum()) / total
    return {
        "approximation": float(excess.clamp_min(0).sqrt()),
        "left": float(1 - (U.T @ A).square().sum() / head),
        "right": float(1 - (A @ V).square().sum() / head),
        "values": float((S - exact[:k]).abs().max() / exact[0]),
    }


@pytest.mark.parametrize("niter", [0, 1, 2, 4], ids=lambda x: f"niter{x}")
@pytest.mark.parametrize("q", [1, 6, 24], ids=lambda x: f"q{x}")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("spectrum", testing.SPECTRA)
def test_never_less_accurate_than_torch(spectrum, shape, q, niter):
    A, exact = case(spectrum, shape, q)
    theirs = quality(A, exact, *torch.svd_lowrank(A, q, niter))
    ours = quality(A, exact, *lk.svd_lowrank(A, q, niter))
    for measure, error in ours.items():
        # 2e-6: sixteen float32 roundings, where both have converged; 2 %: torch's start is random.
        assert error <= 1.02 * theirs[measure] + 2e-6, measure


def test_several_times_better_on_a_flat_spectrum():
    A, exact = case("marchenko_pastur", (400, 320), 24)
    theirs = quality(A, exact, *torch.svd_lowrank(A, 24, 4))
    ours = quality(A, exact, *lk.svd_lowrank(A, 24, 4))
    assert ours["approximation"] < theirs["approximation"] / 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_batches(dtype):
    A = testing.matrix("steep", 60, 40, 8, generator=torch.Generator().manual_seed(2))
    A = torch.stack([A, 2 * A]).view(2, 1, 60, 40).to(dtype)
    U, S, V = lk.svd_lowrank(A, 8)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    assert U.shape == (2, 1, 60, 8)
    assert S.shape == (2, 1, 8)
    assert V.shape == (2, 1, 40, 8)
    assert {U.dtype, S.dtype, V.dtype} == {working}
    exact = torch.linalg.svdvals(A.double())[..., :8]
    # A fast decay converges to rounding: of float32, or in float64 to what two iterations reach.
    torch.testing.assert_close(S.double(), exact, rtol=1e-5, atol=1e-6)


def test_minus_a_mean():
    A = testing.matrix("power", 80, 50, 6, generator=torch.Generator().manual_seed(3))
    mean = A.mean(0, keepdim=True) + 10
    U, S, V = lk.svd_lowrank(A + 10, 6, 8, mean)
    exact = torch.linalg.svdvals((A + 10).double() - mean.double())[:6]
    # Both terms are near 10, so their difference carries 10 eps.
    torch.testing.assert_close(S.double(), exact, rtol=1e-4, atol=1e-5)
    assert U.shape == (80, 6)
    assert V.shape == (50, 6)


@pytest.mark.parametrize(
    ("shape", "q"), [((4, 3), 6), ((3, 4), 6), ((1, 1), 1), ((5, 7), 0), ((0, 5, 4), 2)]
)
def test_returns_the_shapes_of_torch(shape, q):
    A = torch.randn(*shape)
    got = lk.svd_lowrank(A, q)
    m, n = shape[-2:]
    k = min(q, m, n)
    assert [tuple(x.shape) for x in got] == [
        (*shape[:-2], m, k),
        (*shape[:-2], k),
        (*shape[:-2], n, k),
    ]
    if A.numel() and q <= min(m, n):
        assert [x.shape for x in got] == [x.shape for x in torch.svd_lowrank(A, q)]


def test_defaults_are_torchs():
    A = torch.randn(20, 15)
    assert [x.shape for x in lk.svd_lowrank(A)] == [x.shape for x in torch.svd_lowrank(A)]
    for one, other in zip(lk.svd_lowrank(A), lk.svd_lowrank(A, None, None), strict=True):
        assert torch.equal(one, other)


def test_is_reproducible_and_leaves_the_global_generator_alone():
    A = testing.matrix("flat", 400, 320, 6)
    state = torch.random.get_rng_state()
    first = lk.svd_lowrank(A, 6)
    assert torch.equal(torch.random.get_rng_state(), state)
    seeded = [lk.svd_lowrank(A, 6, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert torch.equal(first[0], lk.svd_lowrank(A, 6)[0])
    assert torch.equal(seeded[0][0], seeded[1][0])
    assert not torch.equal(seeded[0][0], seeded[2][0])


def test_gradient_is_the_exact_svds():
    A = testing.matrix("low_rank", 30, 20, 4, generator=torch.Generator().manual_seed(4)).double()
    A.requires_grad_()
    U, S, V = lk.svd_lowrank(A, 4, 2)
    (gradient,) = torch.autograd.grad(S.sum(), A)
    # d sum(S) / dA is U V^T; A is of rank 4 to float32 rounding.
    torch.testing.assert_close(gradient, (U @ V.T).detach(), rtol=0, atol=1e-5)


def test_half_precision_under_autograd():
    A = torch.randn(12, 9).bfloat16().requires_grad_()
    lk.svd_lowrank(A, 3)[1].sum().backward()
    assert A.grad.dtype == torch.bfloat16
    assert bool(A.grad.isfinite().all())


@pytest.mark.parametrize("layout", ["sparse", "complex"])
def test_what_torchs_formula_covers(layout):
    A = testing.matrix("low_rank", 30, 20, 4, generator=torch.Generator().manual_seed(5))
    given = A.to_sparse() if layout == "sparse" else A.to(torch.complex64)
    U, S, V = lk.svd_lowrank(given, 4)
    torch.testing.assert_close((U * S) @ V.mH, A.to(U.dtype), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3, dtype=torch.int64),), TypeError, "floating-point or complex"),
        ((torch.ones(3),), ValueError, r"\(\.\.\., m, n\)"),
        ((torch.ones(3, 3), -1), ValueError, "negative"),
        ((torch.ones(3, 3), 1, 2, torch.ones(2, 3)), ValueError, "broadcast"),
        ((torch.full((3, 3), torch.nan), 1), ValueError, "NaN"),
    ],
    ids=["integer", "vector", "q", "M", "nan"],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        lk.svd_lowrank(*arguments)


def tuned_pair(m, n, dtype, seed=0, drift=1e-2):
    generator = torch.Generator().manual_seed(seed)
    W0 = testing.matrix("power", m, n, 8, generator=generator)
    change = testing.matrix("power", m, n, 8, generator=generator) * drift
    return (W0 + change).to(dtype), W0.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_diff_is_the_svd_of_the_difference(dtype):
    W1, W0 = tuned_pair(120, 80, dtype)
    svd = lk.svd_diff(W1, W0, 8)
    _, S, Vh = torch.linalg.svd(W1.double() - W0.double(), full_matrices=False)
    P = Vh[:8].T @ Vh[:8]
    V = svd.V.double()
    # Twice its tolerance: the estimate is of first order.
    assert torch.linalg.norm(V @ V.T - P) / 8**0.5 < 2e-3
    torch.testing.assert_close(svd.S.double(), S[:8], rtol=1e-4, atol=0)


def test_diff_of_a_list_does_not_depend_on_the_workspace():
    pairs = [tuned_pair(60, 40, torch.float32, seed) for seed in range(3)]
    pairs.append(tuned_pair(30, 50, torch.bfloat16))
    W1, W0 = zip(*pairs, strict=True)
    whole = lk.svd_diff(W1, W0, 4, generator=torch.Generator().manual_seed(1))
    tight = lk.svd_diff(W1, W0, 4, workspace=1, generator=torch.Generator().manual_seed(1))
    for one, other in zip(whole, tight, strict=True):
        torch.testing.assert_close(one.U * one.S, other.U * other.S, rtol=1e-4, atol=1e-6)
    stacked = lk.svd_diff(torch.stack(W1[:3]), torch.stack(W0[:3]), 4)
    assert stacked.U.shape == (3, 60, 4)


def test_diff_holds_a_few_differences_at_a_time(monkeypatch):
    # The package's attribute of this name is the function.
    module = sys.modules["lorax_kernels.svd_diff"]
    sizes = []
    solve = module.truncated_svd

    def counted(W, *args, **kwargs):
        sizes.append(len(W))
        return solve(W, *args, **kwargs)

    monkeypatch.setattr(module, "truncated_svd", counted)
    W1, W0 = zip(*[tuned_pair(40, 40, torch.float32, seed) for seed in range(5)], strict=True)
    module.svd_diff(W1, W0, 2, workspace=2 * 2 * 4 * 40 * 40)
    assert sizes == [2, 2, 1]


def test_diff_takes_an_energy_share():
    W0 = torch.randn(20, 20)
    W1 = W0 + torch.diag(torch.tensor([3.0, 1.0] + [0.0] * 18))
    assert lk.svd_diff(W1, W0, 5, energy=0.85).rank == 1


@pytest.mark.parametrize(
    ("W1", "W0", "error", "message"),
    [
        (torch.ones(3, 3), torch.ones(3, 4), ValueError, "one shape"),
        (torch.ones(3, 3), [torch.ones(3, 3)], TypeError, "both"),
        ([torch.ones(3, 3)], [], ValueError, "pair up"),
        (torch.ones(3, 3).int(), torch.ones(3, 3), TypeError, "floating-point"),
    ],
    ids=["shape", "kind", "count", "integer"],
)
def test_diff_refuses(W1, W0, error, message):
    with pytest.raises(error, match=message):
        lk.svd_diff(W1, W0, 1)
