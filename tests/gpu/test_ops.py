# SPDX-License-Identifier: Apache-2.0
"""The ops on a GPU against float64, on every backend that can run there."""

import op_cases as cases
import pytest
import torch

import lorax_kernels
from lorax_kernels import ops

pytestmark = pytest.mark.gpu
BACKENDS = ("cuda", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(params=BACKENDS, ids=[f"backend={b}" for b in BACKENDS])
def backend(request: pytest.FixtureRequest) -> str:
    row = next(r for r in lorax_kernels.backends() if r.name == request.param)
    if not row.available:
        pytest.skip(f"backend {row.name}: {row.reason}")
    return row.name


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda")


def _exact(W: torch.Tensor, X: torch.Tensor, transpose: bool) -> torch.Tensor:
    W = W.double()
    return (W.mT if transpose else W) @ X.double()


@pytest.mark.parametrize("transpose", [False, True], ids=["W", "W^T"])
@pytest.mark.parametrize("pieces", [1, 2, 3], ids=lambda p: f"pieces={p}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", [*cases.THIN_SHAPES, (4, 512, 768, 128)], ids=cases.label)
def test_thin_matmul(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, pieces: int, transpose: bool
) -> None:
    b, m, n, l = shape
    W = _normal(b, m, n).to(dtype)
    X = _normal(b, m if transpose else n, l)
    before = W.clone(), X.clone()
    C = ops.thin_matmul(W, X, transpose=transpose, pieces=pieces, backend=backend)
    assert cases.relative(C, _exact(W, X, transpose)) < cases.PIECE_TOLERANCE[pieces]
    assert torch.equal(W, before[0])
    assert torch.equal(X, before[1])


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20], ids=lambda s: f"scale={s:g}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_thin_matmul_scales(backend: str, dtype: torch.dtype, scale: float) -> None:
    W, X = _normal(2, 200, 136).to(dtype), _normal(2, 136, 24) * scale
    X[:, :, 5] = 0
    C = ops.thin_matmul(W, X, pieces=2, backend=backend)
    assert cases.relative(C, _exact(W, X, False)) < cases.PIECE_TOLERANCE[2]


def test_strided_and_unaligned_inputs(backend: str) -> None:
    W, X = cases.awkward(_normal(2, 63, 65).bfloat16()), cases.awkward(_normal(2, 65, 17))
    for transposed, block in ((False, X), (True, cases.awkward(_normal(2, 63, 17)))):
        C = ops.thin_matmul(W, block, transpose=transposed, pieces=3, backend=backend)
        assert cases.relative(C, _exact(W, block, transposed)) < cases.PIECE_TOLERANCE[3]
    C = ops.thin_matmul(W.mT, cases.awkward(_normal(2, 63, 17)), pieces=3, backend=backend)
    assert C.isfinite().all()
    wide = _normal(2, 64, 128).bfloat16()[:, :, :72]  # rows apart: no copy is made
    C = ops.thin_matmul(wide, _normal(2, 72, 17), pieces=1, backend=backend)
    assert C.isfinite().all()
    G = ops.gram(X, backend=backend)
    assert cases.relative(G, X.double().mT @ X.double()) < cases.FLOAT32_TOLERANCE
    Q = ops.orthonormalize(X, backend=backend)
    assert cases.orthogonality(Q) < cases.ORTHONORMAL_TOLERANCE
    R = cases.awkward(_normal(2, 17, 9))
    C = ops.rotate(X, R, backend=backend)
    assert cases.relative(C, X.double() @ R.double()) < cases.FLOAT32_TOLERANCE


@pytest.mark.parametrize("source", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", [*cases.BLOCK_SHAPES, (4, 4096, 512)], ids=cases.label)
def test_gram(backend: str, shape: tuple[int, ...], source: torch.dtype) -> None:
    X = _normal(*shape).to(source)
    G = ops.gram(X, backend=backend)
    assert cases.relative(G, X.double().mT @ X.double()) < cases.FLOAT32_TOLERANCE
    assert torch.equal(G, G.mT)


@pytest.mark.parametrize("shape", cases.BLOCK_SHAPES, ids=cases.label)
def test_gram_float64(shape: tuple[int, ...]) -> None:
    X = _normal(*shape)
    G = ops.gram(X, dtype=torch.float64)
    # Summation in float64: a few hundred roundings of 1e-16.
    assert cases.relative(G, X.double().mT @ X.double()) < 1e-14
    assert torch.equal(G, G.mT)


def test_gram_scales(backend: str) -> None:
    X = _normal(1, 300, 40) * 10.0 ** torch.linspace(-18, 18, 40, device="cuda")
    X[:, :, 7] = 0
    G = ops.gram(X, backend=backend).double()
    exact = X.double().mT @ X.double()
    size = exact.diagonal(dim1=1, dim2=2).sqrt()
    bound = size[:, :, None] * size[:, None] * cases.FLOAT32_TOLERANCE + 1e-37
    assert ((G - exact).abs() <= bound).all()


@pytest.mark.parametrize("shape", [*cases.BLOCK_SHAPES, (4, 4096, 512)], ids=cases.label)
@pytest.mark.parametrize("k", [1, 33], ids=lambda k: f"k={k}")
def test_rotate(backend: str, shape: tuple[int, ...], k: int) -> None:
    X, R = _normal(*shape), _normal(shape[0], shape[2], k)
    C = ops.rotate(X, R, backend=backend)
    assert cases.relative(C, X.double() @ R.double()) < cases.FLOAT32_TOLERANCE
    C = ops.rotate(X * 1e15, R.double() * 1e-10, backend=backend)
    assert cases.relative(C, X.double() @ R.double() * 1e5) < cases.FLOAT32_TOLERANCE


@pytest.mark.parametrize(
    "shape", [*cases.BLOCK_SHAPES, (1, 2, 2), (3, 4096, 512), (2, 512, 512)], ids=cases.label
)
def test_orthonormalize(backend: str, shape: tuple[int, ...]) -> None:
    X = _normal(*shape)
    Q = ops.orthonormalize(X, backend=backend)
    assert cases.orthogonality(Q) < cases.ORTHONORMAL_TOLERANCE
    half = (shape[2] + 1) // 2
    # Column by column: the first half of Q spans the first half of X.
    assert cases.unspanned(X[:, :, :half], Q[:, :, :half]) < 1e-4


HARD = [(257, 64), (300, 200), (199, 199), (1024, 130), (9, 9), (3, 2)]


@pytest.mark.parametrize("n_l", HARD, ids=cases.label)
@pytest.mark.parametrize("name", sorted(cases.hard_blocks(9, 3)))
def test_orthonormalize_hard(backend: str, n_l: tuple[int, int], name: str) -> None:
    X = cases.hard_blocks(*n_l, device="cuda")[name]
    Q = ops.orthonormalize(X, backend=backend)
    assert cases.orthogonality(Q) < cases.ORTHONORMAL_TOLERANCE


def test_orthonormalize_does_not_depend_on_the_batch(backend: str) -> None:
    X = torch.cat([cases.hard_blocks(200, 50, device="cuda")[n] for n in ("normal", "rank two")])
    together = ops.orthonormalize(X, backend=backend)
    for i in range(2):
        alone = ops.orthonormalize(X[i : i + 1], backend=backend)
        # Directions that X determines agree; what filled the others may differ by rounding.
        assert cases.unspanned(X[i : i + 1], alone) < 1e-3
        assert cases.unspanned(X[i : i + 1], together[i : i + 1]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 199), (40, 128), (1, 513)], ids=cases.label)
def test_symmetric_eigh(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    b, l = shape
    H = torch.randn(b, l, l, device="cuda", dtype=dtype)
    H = (H + H.mT) / 2
    before = H.clone()
    values, vectors = ops.symmetric_eigh(H, backend=backend)
    exact = torch.linalg.eigvalsh(H.double()).flip(-1)
    # Backward stable to a modest multiple of sqrt(l) roundings.
    bound = 20 * l**0.5 * torch.finfo(dtype).eps
    size = exact.abs().amax(1, keepdim=True)
    assert ((values - exact).abs() / size).max() < bound
    residual = H @ vectors - vectors * values[:, None]
    assert (residual.norm(dim=1) / size).max() < bound
    assert cases.orthogonality(vectors) < bound
    assert torch.equal(H, before)


def test_empty_batches(backend: str) -> None:
    W, X = torch.empty(0, 8, 6, device="cuda").bfloat16(), torch.empty(0, 6, 4, device="cuda")
    assert ops.thin_matmul(W, X, backend=backend).shape == (0, 8, 4)
    assert ops.gram(X, backend=backend).shape == (0, 4, 4)
    assert ops.orthonormalize(X, backend=backend).shape == (0, 6, 4)
    assert ops.rotate(X, X.mT, backend=backend).shape == (0, 6, 6)
    assert ops.symmetric_eigh(X.mT @ X, backend=backend)[0].shape == (0, 4)


@pytest.mark.parametrize("op", ["thin_matmul", "gram", "orthonormalize", "rotate"])
def test_poisoned_memory_never_shows(backend: str, op: str) -> None:
    X = _normal(2, 211, 37)
    junk = torch.full((1 << 24,), float("nan"), device="cuda")
    del junk  # what the allocator hands out next is full of NaN
    if op == "thin_matmul":
        C = ops.thin_matmul(_normal(2, 99, 211).half(), X, backend=backend)
    elif op == "rotate":
        C = ops.rotate(X, _normal(2, 37, 5), backend=backend)
    else:
        C = getattr(ops, op)(X, backend=backend)
    assert C.isfinite().all()
