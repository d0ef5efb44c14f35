# SPDX-License-Identifier: Apache-2.0
"""The kernels of `cholesky_qr` and `ritz` on a GPU against float64."""

import narrow_cases as narrow
import op_cases as cases
import pytest
import torch

from lorax_kernels import ops

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("scale", narrow.SCALES, ids=lambda s: f"scale={s:g}")
@pytest.mark.parametrize(
    "shape", [*narrow.QR_SHAPES, (1, 16384, 32), (1, 9000, 96)], ids=cases.label
)
def test_cholesky_qr(shape, scale):
    narrow.check_cholesky_qr(shape, scale, "cuda", "cuda")


@pytest.mark.parametrize("n_l", [(199, 63), (1025, 32), (130, 128)], ids=cases.label)
@pytest.mark.parametrize("name", sorted(cases.hard_blocks(9, 3)))
def test_cholesky_qr_hard(name, n_l):
    narrow.check_cholesky_qr_hard(name, *n_l, "cuda", "cuda")


def test_cholesky_qr_keeps_nan():
    X = torch.randn(2, 131, 40, device="cuda")
    X[0, 3, 5] = torch.nan
    Q = ops.cholesky_qr(X, backend="cuda")
    assert Q[0].isnan().any()
    assert Q[1].isfinite().all()


@pytest.mark.parametrize("scale", narrow.SCALES, ids=lambda s: f"scale={s:g}")
@pytest.mark.parametrize("spectrum", narrow.SPECTRA)
@pytest.mark.parametrize("shape", [*narrow.RITZ_SHAPES, (1, 16384, 4096, 32, 6)], ids=cases.label)
def test_ritz(shape, spectrum, scale):
    if spectrum == "random" and shape[2] < shape[3]:
        pytest.skip("fewer rows than columns have no full rank")
    narrow.check_ritz(shape, spectrum, scale, "cuda", "cuda")


@pytest.mark.parametrize("l", [3, 31, 64], ids=lambda l: f"l={l}")
def test_ritz_status(l):
    narrow.check_ritz_status(l, "cuda", "cuda")


def test_results_are_the_same_every_time():
    X, B = (torch.randn(2, 3000, 48, device="cuda") for _ in range(2))
    first = ops.cholesky_qr(X), *ops.ritz(ops.cholesky_qr(X), B, 20)
    again = ops.cholesky_qr(X), *ops.ritz(ops.cholesky_qr(X), B, 20)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_in_a_graph():
    """Nothing waits for the device."""
    X, B = (torch.randn(1, 3000, 32, device="cuda") for _ in range(2))

    def step():
        Q = ops.cholesky_qr(X, backend="cuda")
        return (Q, *ops.ritz(Q, B, 6, backend="cuda"))

    plain = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(plain, captured, strict=True):
        assert torch.equal(one, other)
