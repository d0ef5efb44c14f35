# SPDX-License-Identifier: Apache-2.0
"""`svd_product` on a GPU: the batched route with the compiled eigensolver, and the plain one."""

import pytest
import torch

import lorax_kernels as lk

pytestmark = pytest.mark.gpu
EPS = torch.finfo(torch.float32).eps


def factors(shapes, r, spread=0.0):
    generator = torch.Generator("cuda").manual_seed(3)
    scale = 10.0 ** torch.linspace(-spread, spread, r, device="cuda")
    left = [torch.randn(m, r, device="cuda", generator=generator) * scale for m, _ in shapes]
    return left, [torch.randn(r, n, device="cuda", generator=generator) for _, n in shapes]


def check(svd, B, A):
    """As tests/kernels/test_product.py judges it: rounding of the results to float32 is left."""
    exact = B.double() @ A.double()
    U, S, V = svd.U.double(), svd.S.double(), svd.V.double()
    values = torch.linalg.svdvals(exact.cpu())[: S.shape[0]].cuda()
    scale = values[0].clamp(min=torch.finfo(torch.float32).tiny)
    assert (S - values).abs().max() < 2 * EPS * scale
    for X in (U, V):
        assert (X.mT @ X - torch.eye(X.shape[1], device="cuda")).abs().max() < 8 * EPS
    assert ((U * S) @ V.mT - exact).norm() < 8 * EPS * S.shape[0] ** 0.5 * scale


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("r", "spread"), [(1, 0), (16, 0), (64, 0), (64, 6), (128, 0)])
def test_mixed_shapes(backend, r, spread):
    B, A = factors([(320, 200), (640, 129), (320, 200)], r, spread)
    for svd, b, a in zip(lk.svd_product(B, A, backend=backend), B, A, strict=True):
        assert svd.U.is_cuda
        check(svd, b, a)


def test_dependent_columns_and_zeros():
    B, A = factors([(300, 200)] * 4, 12)
    B[0][:, 6:] = B[0][:, :6]
    A[1][1:] = A[1][:1] + 1e-7 * A[1][1:]
    B[2].zero_()
    for svd, b, a in zip(lk.svd_product(B, A), B, A, strict=True):
        check(svd, b, a)


def test_more_columns_than_rows():
    B, A = factors([(5, 90)], 32)
    check(lk.svd_product(B[0], A[0]), B[0], A[0])
