# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels under the truncated SVD in Triton's interpreter: small odd shapes, no GPU."""

import os
import subprocess
import sys

import op_cases as cases
import pytest
import torch

from lorax_kernels import ops

pytest.importorskip("triton")
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
inside = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        not interpreted, reason="needs TRITON_INTERPRET=1 before Triton is imported"
    ),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# The interpreter cuts float32 to bfloat16 where a GPU rounds, which doubles a piece's error.
CUT = 2
run_inside = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), *inside]


def _inside(test: object) -> object:
    for mark in run_inside:
        test = mark(test)
    return test


@pytest.mark.skipif(interpreted, reason="runs the tests below in a process of its own")
def test_in_the_interpreter() -> None:
    """Triton reads TRITON_INTERPRET once, so interpreted tests need their own process."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@_inside
@pytest.mark.parametrize("pieces", [1, 2, 3], ids=lambda p: f"pieces={p}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_thin_matmul(dtype: torch.dtype, pieces: int) -> None:
    W, X = torch.randn(2, 63, 199).to(dtype), torch.randn(2, 63, 7)
    X[1] *= 1e-20
    C = ops.thin_matmul(W, X, transpose=True, pieces=pieces, backend="triton")
    for i in range(2):
        exact = W[i].double().mT @ X[i].double()
        assert cases.relative(C[i], exact) < CUT * cases.PIECE_TOLERANCE[pieces]


@_inside
@pytest.mark.parametrize("transpose", [False, True], ids=["W^T W", "W W^T"])
def test_normal_matmul(transpose: bool) -> None:
    W, X = cases.half_weights(2, 63, 70), torch.randn(2, 63 if transpose else 70, 7)
    Z = ops.normal_matmul(W, X, transpose=transpose, backend="triton")
    A = W.double().mT if transpose else W.double()
    assert cases.relative(Z, A.mT @ (A @ X.double())) < CUT * cases.NORMAL_TOLERANCE


@_inside
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 63, 70), (1, 199, 5)], ids=cases.label)
def test_gram(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    X = cases.awkward(torch.randn(shape).to(dtype))
    G = ops.gram(X, backend="triton")
    assert cases.relative(G, X.double().mT @ X.double()) < cases.FLOAT32_TOLERANCE
    assert torch.equal(G, G.mT)


@_inside
def test_gram_in_float64() -> None:
    X = torch.randn(1, 63, 7)
    G = ops.gram(X, dtype=torch.float64, backend="triton")
    assert cases.relative(G, X.double().mT @ X.double()) < 1e-14


@_inside
def test_rotate() -> None:
    X, R = cases.awkward(torch.randn(2, 199, 63)), cases.awkward(torch.randn(2, 63, 9))
    C = ops.rotate(X, R, backend="triton")
    assert cases.relative(C, X.double() @ R.double()) < cases.FLOAT32_TOLERANCE


@_inside
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 63, 7), (1, 1025, 3)], ids=cases.label)
def test_shift(shape: tuple[int, ...]) -> None:
    Z, X = torch.randn(shape), torch.randn(shape)
    a, s = torch.randn(shape[0]), torch.randn(shape[0], shape[2])
    found = ops.shift(cases.awkward(Z), cases.awkward(X), a, s, backend="triton")
    exact = (Z.double() - a.double()[:, None, None] * X) * s.double()[:, None]
    assert cases.relative(found, exact) < 4 * torch.finfo(torch.float32).eps


@_inside
@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
@pytest.mark.parametrize("name", ["normal", "duplicate columns", "all zeros"])
def test_orthonormalize(name: str, quick: bool) -> None:
    Q = ops.orthonormalize(cases.hard_blocks(130, 17)[name], quick=quick, backend="triton")
    if not quick:
        assert cases.orthogonality(Q) < cases.ORTHONORMAL_TOLERANCE
    elif name == "duplicate columns":
        assert torch.linalg.svdvals(Q).min() > 0.1
    else:
        assert cases.orthogonality(Q) < cases.QUICK_TOLERANCE


@_inside
def test_orthonormalize_replaces_columns_by_independent_ones() -> None:
    Q = ops.orthonormalize(cases.hard_blocks(300, 96)["rank two"], quick=True, backend="triton")
    sizes = torch.linalg.svdvals(Q.double())
    assert sizes.max() < 3
    assert sizes.min() > 0.02
