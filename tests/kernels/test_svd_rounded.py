# SPDX-License-Identifier: Apache-2.0
"""The iteration as a GPU makes it, on the CPU: one degree for a batch, blocks rounded to float16.

The rounding is emulated where blocks meet weights, as csrc/kernels/split.cuh does it: one piece
keeps 11 bits of every element, scaled so that the largest of a block fits.
"""

import math

import pytest
import torch

from lorax_kernels import _operator, _subspace, truncated_svd
from lorax_kernels import svd as svd_module
from lorax_kernels._planning import Plan
from lorax_kernels.ops.gram_halves import PIECE
from lorax_kernels.testing import matrix

TOL = 2e-3
SPECTRA = ("power", "flat", "marchenko_pastur", "steep", "clustered")


@pytest.fixture
def on_tensor_cores(monkeypatch):
    exact = _operator.Stack.times

    def times(self, X, transpose, pieces, backend):
        if pieces == 1:
            largest = X.abs().amax((1, 2), keepdim=True).clamp_min(1e-30)
            scale = torch.exp2(14 - largest.log2().floor())
            X = (X * scale).half().float() / scale
        return exact(self, X, transpose, pieces, backend)

    monkeypatch.setattr(_operator.Stack, "times", times)
    monkeypatch.setattr(_operator.Operator, "on_gpu", property(lambda self: True))
    monkeypatch.setattr(_operator.Operator, "rounding", property(lambda self: 2.0**-12))


@pytest.fixture
def gram_in_halves(monkeypatch):
    def gram(tall, backend):
        G = torch.bmm(tall.mT, tall)
        high = G.half().float()
        return _operator.Stack((high, ((G - high) * PIECE).half().float()), (1.0, 1 / PIECE))

    monkeypatch.setattr(_operator.Stack, "gram", staticmethod(gram))


def decompose(matrices, k, width, monkeypatch, max_passes=64, use_gram=False, gram_from=math.inf):
    forced = Plan("randomized", width, use_gram, max_passes, gram_from)
    monkeypatch.setattr(svd_module, "plan", lambda *_, **__: forced)
    return truncated_svd(matrices, k, tol=TOL)


def true_error(V, W, k):
    wanted = torch.linalg.svd(W.double(), full_matrices=False).Vh[:k].T
    V = V.double()
    return float(torch.linalg.matrix_norm(V @ V.T - wanted @ wanted.T) / k**0.5)


@pytest.mark.parametrize("shape", [(300, 260), (160, 400)], ids=str)
def test_spectra_of_one_batch(on_tensor_cores, monkeypatch, shape):
    matrices = [matrix(spectrum, *shape, 20) for spectrum in SPECTRA]
    found = decompose(matrices, 20, 48, monkeypatch)
    for spectrum, W, svd in zip(SPECTRA, matrices, found, strict=True):
        assert svd.path == "randomized", spectrum
        assert svd.error <= TOL, spectrum
        # Twice the estimate, and what the float32 results of the oracle's matrix leave.
        assert true_error(svd.V, W, 20) <= 2 * svd.error + 1e-4, spectrum


def test_degenerate_matrices_among_others(on_tensor_cores, monkeypatch):
    """A batch that goes on as a whole takes matrices along that were done at once."""
    m, n, k = 200, 160, 12
    ones = torch.ones(m, 1) @ torch.arange(1.0, n + 1)[None] / n
    matrices = [torch.zeros(m, n), ones, matrix("low_rank", m, n, k)]
    matrices += [matrix("power", m, n, k) * scale for scale in (1e-20, 1e20)]
    matrices += [matrix("flat", m, n, k)] * 4
    found = decompose(matrices, k, 36, monkeypatch)
    for W, svd in zip(matrices, found, strict=True):
        for factor in (svd.U, svd.V):
            eye = torch.eye(k)
            # A float32 sum of 200 squares.
            torch.testing.assert_close(factor.T @ factor, eye, atol=1e-5, rtol=0)
        exact = torch.linalg.svdvals(W.double())[:k].float()
        torch.testing.assert_close(svd.S, exact, atol=2e-6 * float(exact[0]), rtol=1e-5)


def test_outliers_cost_few_passes(on_tensor_cores, monkeypatch):
    """Columns of the first blocks hold outliers too, which must not drown what else they hold.

    With orthonormalisations as rare as float32 allows, this matrix took 68 passes.
    """
    W = matrix("flat", 1024, 1024, 16)
    svd = decompose([W], 16, 48, monkeypatch, max_passes=100)[0]
    assert svd.passes <= 58
    assert true_error(svd.V, W, 16) <= TOL


@pytest.mark.parametrize("spectrum", ["power", "flat", "marchenko_pastur"])
def test_no_column_is_lost_between_orthonormalisations(on_tensor_cores, monkeypatch, spectrum):
    """What a column holds of those before it, against what it has of its own.

    A quick orthonormalisation on a GPU puts noise in place of columns from 300 on. With those of a
    filter as far apart as float16 alone would allow, that was most of a block.
    """
    held, exact = [], _subspace.ops.orthonormalize

    def orthonormalize(X, *, quick=False, backend="auto"):
        if quick:
            R = torch.linalg.qr(X).R
            before = torch.linalg.vector_norm(R.triu(1), dim=1)
            held.append(float((before / torch.diagonal(R, dim1=1, dim2=2).abs()).max()))
        return exact(X, backend=backend)

    monkeypatch.setattr(_subspace.ops, "orthonormalize", orthonormalize)
    W = matrix(spectrum, 1024, 1024, 40)
    assert decompose([W], 40, 72, monkeypatch)[0].error <= TOL
    assert held
    assert max(held) < 300


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("spectrum", ["power", "flat", "marchenko_pastur"])
def test_gram_matrix_in_halves(on_tensor_cores, gram_in_halves, monkeypatch, spectrum, late):
    """One look is enough: what rounding the Gram matrix leaves is damped with it, not with W."""
    looks, look = [], _subspace._rayleigh_ritz
    monkeypatch.setattr(
        _subspace, "_rayleigh_ritz", lambda *a: looks.append(a[0].G is None) or look(*a)
    )
    W = matrix(spectrum, 900, 512, 40).bfloat16().float()
    W = W * 2.0 ** -(2 + float(W.abs().max().log2().floor()))
    svd = decompose([W], 40, 72, monkeypatch, use_gram=not late, gram_from=2.0)[0]
    assert svd.path == "randomized"
    assert svd.error <= TOL
    assert true_error(svd.V, W, 40) <= 2 * svd.error + 1e-4
    assert looks == [True]


def test_no_gram_matrix_is_formed_for_the_last_few_products(
    on_tensor_cores, gram_in_halves, monkeypatch
):
    """What pays is what is still allowed, not what the tolerance would take."""
    formed, gram = [], _operator.Stack.gram
    monkeypatch.setattr(
        _operator.Stack, "gram", staticmethod(lambda *a: formed.append(a) or gram(*a))
    )
    W = matrix("flat", 900, 512, 40).bfloat16().float()
    W = W * 2.0 ** -(2 + float(W.abs().max().log2().floor()))
    decompose([W], 40, 72, monkeypatch, max_passes=10, gram_from=8.0)
    assert formed == []
    decompose([W], 40, 72, monkeypatch, max_passes=40, gram_from=8.0)
    assert len(formed) > 0
