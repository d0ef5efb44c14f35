# SPDX-License-Identifier: Apache-2.0
"""The iteration as a GPU makes it, on the CPU: one degree for a batch, blocks rounded to float16.

The rounding is emulated where blocks meet weights, as csrc/kernels/split.cuh does it: one piece
keeps 11 bits of every element, scaled so that the largest of a block fits. Of a pair of products
what is between them is rounded as csrc/thin_matmul.cu does it.
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


def towards(exponent, X):
    """Powers of two that bring the largest element of each matrix to this one."""
    largest = X.abs().amax((1, 2), keepdim=True).clamp_min(1e-30)
    return torch.exp2(exponent - largest.log2().floor())


def rounded(X, scale):
    return (X * scale).half().float() / scale


def block_scale(X):
    largest = X.abs().amax((1, 2), keepdim=True)
    suits = (largest == 0) | ((largest >= 2.0**-8) & (largest <= 16))
    return torch.where(suits, 2.0**11, towards(14, X))


@pytest.fixture
def on_tensor_cores(monkeypatch):
    times, apply = _operator.Stack.times, _operator.Operator.apply

    def rounded_times(self, X, transpose, pieces, backend):
        if pieces == 1:
            X = rounded(X, block_scale(X))
        return times(self, X, transpose, pieces, backend)

    def rounded_apply(self, X, pieces=1):
        if self.G is not None or pieces > 1:
            return apply(self, X, pieces)
        # Weights as they are stacked for tensor cores: their largest entry just under 1/2.
        scale = towards(-2, self.W.parts[0]) * 2.0 ** -math.ceil(math.log2(X.shape[1]) / 2)
        Y = rounded(self.forward(X, 1), block_scale(X) * scale)
        return times(self.W, Y, not self.flipped, 1, self.backend)

    monkeypatch.setattr(_operator.Stack, "times", rounded_times)
    monkeypatch.setattr(_operator.Operator, "apply", rounded_apply)
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


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)], ids=str)
def test_one_piece_of_float16_weights_takes_the_pair_of_products(monkeypatch, shape):
    calls, normal_matmul = [], _operator.ops.normal_matmul

    def noted(W, X, **options):
        calls.append(options)
        return normal_matmul(W, X, **options)

    monkeypatch.setattr(_operator.ops, "normal_matmul", noted)
    flipped = shape[0] < shape[1]
    halves = _operator.Stack.of(torch.randn(2, *shape) / 8, True)
    X = torch.randn(2, min(shape), 5)
    A = _operator.Operator(halves, flipped, None, "auto")
    assert torch.equal(A.apply(X), A.backward(A.forward(X, 1), 1))
    assert calls == [{"transpose": flipped, "backend": "auto"}]
    A.apply(X, 2)
    A.with_gram().apply(X)
    bfloat16 = _operator.Stack((halves.parts[0].bfloat16(),))
    _operator.Operator(bfloat16, flipped, None, "auto").apply(X)
    assert len(calls) == 1


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


def test_a_block_that_leaves_the_range_of_float16(on_tensor_cores, monkeypatch):
    """What is not a number has not converged: that matrix is decomposed exactly."""
    times = _operator.Stack.times

    def overflowing(self, X, transpose, pieces, backend):
        product = times(self, X, transpose, pieces, backend)
        if pieces == 1:
            product[0, 0, -1] = math.nan
        return product

    monkeypatch.setattr(_operator.Stack, "times", overflowing)
    matrices = [matrix(spectrum, 300, 200, 20) for spectrum in ("power", "flat")]
    found = decompose(matrices, 20, 48, monkeypatch)
    assert found[0].path == "exact"
    for W, svd in zip(matrices, found, strict=True):
        assert true_error(svd.V, W, 20) <= TOL


def test_a_look_that_was_hoped_to_be_the_last_goes_on(on_tensor_cores, monkeypatch):
    """Its Ritz vectors were not all formed; the next filter needs them."""
    judged, judge = [], _subspace.ops.subspace_error

    def subspace_error(C, *arguments, **options):
        errors = judge(C, *arguments, **options)
        if C.dim() == 3:
            judged.append(errors[0])
            if len(judged) == 1:
                errors[:2] = 0.5
        return errors

    monkeypatch.setattr(_subspace.ops, "subspace_error", subspace_error)
    continued, block = [], _subspace._Ritz.block

    def noted(self, backend):
        continued.append(self.R is not None)
        return block(self, backend)

    monkeypatch.setattr(_subspace._Ritz, "block", noted)
    W = matrix("power", 300, 200, 20)
    svd = decompose([W], 20, 48, monkeypatch)[0]
    assert any(continued)
    assert len(judged) > 1
    assert true_error(svd.V, W, 20) <= 2 * svd.error + 1e-4


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
