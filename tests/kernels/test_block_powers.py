# SPDX-License-Identifier: Apache-2.0
"""The GPU's way of `svd_lowrank`, on a CPU: against torch's own, and where blocks degenerate."""

import pytest
import torch

from lorax_kernels import _block_powers, testing


def solve(A, q, niter=2, generator=None):
    return _block_powers.block_powers(A, q, niter, generator, "reference")


def missed(A, S, V):
    """Share of the energy of the leading triplets that a basis does not hold."""
    return float(1 - (A.double() @ V.double()).square().sum() / (S[: V.shape[1]] ** 2).sum())


def turned(*bases):
    eye = torch.eye(bases[0].shape[-1], dtype=torch.float64)
    return max(float((V.double().mT @ V.double() - eye).abs().max()) for V in bases)


@pytest.mark.parametrize(
    ("niter", "rounded"),
    [(0, False), (2, False), (2, True), (4, True)],
    ids=["niter0", "niter2", "niter2 early bfloat16", "niter4 early bfloat16"],
)
@pytest.mark.parametrize("q", [1, 24], ids=lambda x: f"q{x}")
@pytest.mark.parametrize("shape", [(400, 320), (320, 400)], ids=["tall", "wide"])
@pytest.mark.parametrize("spectrum", testing.SPECTRA)
def test_never_less_accurate_than_torch(spectrum, shape, q, niter, rounded, monkeypatch):
    if rounded:
        monkeypatch.setattr(_block_powers, "_LARGE", 1)
    A = testing.matrix(spectrum, *shape, q, generator=torch.Generator().manual_seed(7))
    S = torch.linalg.svdvals(A.double())
    torch.manual_seed(0)
    theirs, ours = torch.svd_lowrank(A, q, niter), solve(A, q, niter)
    # 2e-6: sixteen float32 roundings, where both have converged; 2 %: torch's start is random.
    for side, matrix in ((2, A), (0, A.T)):
        assert missed(matrix, S, ours[side]) <= 1.02 * missed(matrix, S, theirs[side]) + 2e-6
    off = [float((x[1].double() - S[:q]).abs().max() / S[0]) for x in (ours, theirs)]
    assert off[0] <= 1.02 * off[1] + 2e-6
    assert turned(ours[0], ours[2]) < 2e-6


@pytest.mark.parametrize(
    ("values", "q"),
    [
        ([0.0] * 40, 5),
        ([3.0] + [0.0] * 39, 5),
        ([3.0, 2.0, 1.0] + [0.0] * 37, 40),
        ([10.0**-j for j in range(40)], 12),
        ([1e30 / (j + 1) for j in range(40)], 40),
        ([1e-30 / (j + 1) for j in range(40)], 3),
    ],
    ids=["zero", "one entry", "few entries", "steep", "huge", "tiny"],
)
def test_degenerate_blocks(values, q):
    A = torch.zeros(60, 40)
    A[:40] = torch.diag(torch.tensor(values))
    U, S, V = solve(A, q)
    assert turned(U, V) < 2e-6
    core = (U.T.double() @ A.double() @ V.double()).float()
    for found in (S, torch.diagonal(core)):
        exact = torch.tensor(values[:q])
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=2e-6 * values[0])


def test_a_stack_is_its_matrices():
    generator = torch.Generator().manual_seed(1)
    A = torch.stack([testing.matrix("power", 90, 120, 6, generator=generator) for _ in range(3)])
    A[1] = 0
    stacked = solve(A, 6)
    for i, matrix in enumerate(A):
        U, S, V = solve(matrix, 6)
        torch.testing.assert_close(stacked[1][i], S, rtol=1e-5, atol=1e-6)
        assert turned(stacked[0][i], stacked[2][i], U, V) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_read_as_it_lies(dtype):
    A = testing.matrix("steep", 90, 120, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    U, S, V = solve(A, 6, 4)
    torch.testing.assert_close(S.double(), torch.linalg.svdvals(A.double())[:6], rtol=1e-5, atol=0)
    assert {x.dtype for x in (U, S, V)} == {torch.float32}


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_refuses_what_is_not_finite(value):
    A = torch.ones(9, 7)
    A[3, 4] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        solve(A, 2)


def test_generator_and_width_beyond_the_host():
    A = testing.matrix("power", 300, 260, 150, generator=torch.Generator().manual_seed(3))
    one, same, other = (solve(A, 150, 1, torch.Generator().manual_seed(s))[1] for s in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert missed(A, torch.linalg.svdvals(A.double()), solve(A, 150)[2]) < 0.02
