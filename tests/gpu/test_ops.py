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


# Both products on shapes of either kind: every other one, so that Triton compiles half as much.
THIN = [
    *((shape, i % 2 == 1) for i, shape in enumerate(cases.THIN_SHAPES)),
    ((4, 512, 768, 128), False),
    ((4, 512, 768, 128), True),
]


@pytest.mark.parametrize("pieces", [1, 2, 3], ids=lambda p: f"pieces={p}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    ("shape", "transpose"), THIN, ids=[cases.label(s) + (" W^T" if t else " W") for s, t in THIN]
)
def test_thin_matmul(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, pieces: int, transpose: bool
) -> None:
    b, m, n, l = shape
    W = _normal(b, m, n).to(dtype)
    X = _normal(b, m if transpose else n, l)
    before = W.clone(), X.clone()
    C = ops.thin_matmul(W, X, transpose=transpose, pieces=pieces, backend=backend)
    tolerance = cases.PIECE_TOLERANCE[pieces] / (8 if dtype == torch.float16 and pieces < 3 else 1)
    assert cases.relative(C, _exact(W, X, transpose)) < tolerance
    assert torch.equal(W, before[0])
    assert torch.equal(X, before[1])


# Around 2^-8 and 16 float16 blocks change from a fixed scale to one of their own.
SCALES = [1e-20, 1e-6, 2e-4, 1e-3, 3.0, 8.0, 1e6, 1e20]


@pytest.mark.parametrize("scale", SCALES, ids=lambda s: f"scale={s:g}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_thin_matmul_scales(backend: str, dtype: torch.dtype, scale: float) -> None:
    W, X = _normal(2, 200, 136).to(dtype), _normal(2, 136, 24)
    X[1] *= scale  # one matrix of the batch; the other must not notice
    X[:, :, 5] = 0
    for pieces in (1, 2):
        C = ops.thin_matmul(W, X, pieces=pieces, backend=backend)
        exact = _exact(W, X, False)
        for i in range(2):
            assert cases.relative(C[i], exact[i]) < cases.PIECE_TOLERANCE[pieces]
        alone = ops.thin_matmul(W[1:], X[1:], pieces=pieces, backend=backend)
        assert cases.relative(alone, C[1:]) < cases.FLOAT32_TOLERANCE


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_thin_matmul_keeps_what_is_not_finite(backend: str, bad: float) -> None:
    W, X = _normal(2, 64, 96).half(), _normal(2, 96, 16)
    X[0, 3, 5] = bad
    C = ops.thin_matmul(W, X, pieces=2, backend=backend)
    assert not C[0, :, 5].isfinite().any()
    assert C[1].isfinite().all()


def _exact_normal(W: torch.Tensor, X: torch.Tensor, transpose: bool) -> torch.Tensor:
    return _exact(W, _exact(W, X, transpose), not transpose)


@pytest.mark.parametrize("transpose", [False, True], ids=["W^T W", "W W^T"])
@pytest.mark.parametrize("shape", [*cases.THIN_SHAPES, (4, 512, 768, 128)], ids=cases.label)
def test_normal_matmul(backend: str, shape: tuple[int, ...], transpose: bool) -> None:
    b, m, n, l = shape
    W = cases.half_weights(b, m, n, device="cuda")
    X = _normal(b, m if transpose else n, l)
    before = W.clone(), X.clone()
    Z = ops.normal_matmul(W, X, transpose=transpose, backend=backend)
    assert cases.relative(Z, _exact_normal(W, X, transpose)) < cases.NORMAL_TOLERANCE
    assert torch.equal(W, before[0])
    assert torch.equal(X, before[1])


@pytest.mark.parametrize("scale", [*SCALES, 0.0, 1e5], ids=lambda s: f"scale={s:g}")
def test_normal_matmul_scales(backend: str, scale: float) -> None:
    W, X = cases.half_weights(2, 200, 136, device="cuda"), _normal(2, 136, 24)
    X[1] *= scale  # one matrix of the batch; the other must not notice
    X[:, :, 5] = 0
    Z = ops.normal_matmul(W, X, backend=backend)
    exact = _exact_normal(W, X, False)
    for i in range(2):
        assert cases.relative(Z[i], exact[i]) < cases.NORMAL_TOLERANCE
    assert not Z[:, :, 5].any()


def test_normal_matmul_of_strides(backend: str) -> None:
    W = cases.half_weights(2, 63, 65, device="cuda")
    wide = torch.cat([W, W], dim=2)
    views = [cases.awkward(W), W.mT, wide[:, :, :65], wide[:, :, 3:68], W[:, :1]]
    views.append(W[:, :, :1].contiguous().mT)  # contiguous, though its rows are one element apart
    for view in views:
        for transpose in (False, True):
            X = cases.awkward(_normal(2, view.shape[1 if transpose else 2], 17))
            Z = ops.normal_matmul(view, X, transpose=transpose, backend=backend)
            assert cases.relative(Z, _exact_normal(view, X, transpose)) < cases.NORMAL_TOLERANCE
            assert Z.is_contiguous()


def test_normal_matmul_at_the_ends_of_its_range() -> None:
    """All weights alike and a column along them: what the docstring allows, and beyond."""
    for n in (1000, 1024, 1025):
        W = torch.full((1, 199, n), 0.5 * (1 - 2.0**-11), device="cuda").half()
        X = torch.full((1, n, 3), n**-0.5, device="cuda") * torch.tensor([1.0, 63, 200]).cuda()
        Z = ops.normal_matmul(W, X, backend="cuda")
        exact = _exact_normal(W, X, False)
        assert cases.relative(Z[:, :, :2], exact[:, :, :2]) < cases.NORMAL_TOLERANCE
        assert n != 1024 or not Z[:, :, 2].isfinite().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_normal_matmul_keeps_what_is_not_finite(backend: str, bad: float) -> None:
    W, X = cases.half_weights(2, 64, 96, device="cuda"), _normal(2, 96, 16)
    X[0, 3, 5] = bad
    Z = ops.normal_matmul(W, X, backend=backend)
    assert not Z[0, :, 5].isfinite().any()
    assert Z[1].isfinite().all()


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
def test_gram_float64(backend: str, shape: tuple[int, ...]) -> None:
    X = _normal(*shape)
    G = ops.gram(X, dtype=torch.float64, backend=backend)
    # Summation in float64: a few hundred roundings of 1e-16.
    assert cases.relative(G, X.double().mT @ X.double()) < 1e-14
    assert torch.equal(G, G.mT)


def test_gram_of_weights(backend: str) -> None:
    X = _normal(2, 130, 2305).bfloat16()  # wide enough to be computed in strips
    G = ops.gram(X, backend=backend)
    assert cases.relative(G, X.double().mT @ X.double()) < cases.FLOAT32_TOLERANCE
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


@pytest.mark.parametrize("which", ["X", "R"])
@pytest.mark.parametrize("scale", SCALES, ids=lambda s: f"scale={s:g}")
def test_rotate_scales(backend: str, scale: float, which: str) -> None:
    X, R = _normal(2, 131, 40), _normal(2, 40, 24)
    (X if which == "X" else R)[1] *= scale
    C = ops.rotate(X, R, backend=backend)
    for i in range(2):
        exact = X[i].double() @ R[i].double()
        assert cases.relative(C[i], exact) < cases.FLOAT32_TOLERANCE


@pytest.mark.parametrize("shape", [*cases.BLOCK_SHAPES, (3, 1024, 512)], ids=cases.label)
def test_shift(backend: str, shape: tuple[int, ...]) -> None:
    Z, X = _normal(*shape), _normal(*shape)
    a, s = _normal(shape[0]), _normal(shape[0], shape[2])
    for z, x in ((Z, X), (cases.awkward(Z), cases.awkward(X))):
        found = ops.shift(z, x, a, s, backend=backend)
        exact = (z.double() - a.double()[:, None, None] * x) * s.double()[:, None]
        # Three roundings, of which the second may lose bits by cancellation.
        assert cases.relative(found, exact) < 4 * torch.finfo(torch.float32).eps
    assert found.is_contiguous()


@pytest.mark.parametrize("shape", [*cases.BLOCK_SHAPES[1:], (3, 4096, 512)], ids=cases.label)
def test_orthonormalize_quick(backend: str, shape: tuple[int, ...]) -> None:
    b, n, l = shape
    X = torch.linalg.qr(_normal(b, n, l)).Q @ (torch.eye(l, device="cuda") + _normal(b, l, l) / l)
    X = X * 10.0 ** torch.linspace(-6, 6, l, device="cuda")
    Q = ops.orthonormalize(X, quick=True, backend=backend)
    assert cases.orthogonality(Q) < cases.QUICK_TOLERANCE
    assert cases.unspanned(X, torch.linalg.qr(Q.double()).Q) < cases.QUICK_TOLERANCE


@pytest.mark.parametrize("name", sorted(cases.hard_blocks(9, 3)))
def test_orthonormalize_quick_hard(backend: str, name: str) -> None:
    Q = ops.orthonormalize(
        cases.hard_blocks(300, 96, device="cuda")[name], quick=True, backend=backend
    )
    assert Q.isfinite().all()
    # Whatever the block, 96 directions of about unit length that are far from dependent.
    sizes = torch.linalg.svdvals(Q.double())
    assert sizes.max() < 3
    assert sizes.min() > 0.02


@pytest.mark.parametrize(
    "shape",
    [*cases.BLOCK_SHAPES, (1, 2, 2), (3, 4096, 512), (2, 512, 512), (1, 1025, 900)],
    ids=cases.label,
)
def test_orthonormalize(backend: str, shape: tuple[int, ...]) -> None:
    X = _normal(*shape)
    Q = ops.orthonormalize(X, backend=backend)
    assert cases.orthogonality(Q) < cases.ORTHONORMAL_TOLERANCE
    half = (shape[2] + 1) // 2
    # Column by column: the first half of Q spans the first half of X.
    assert cases.unspanned(X[:, :, :half], Q[:, :, :half]) < 1e-4
    assert bool(((Q * X).sum(1)[:, :half] > 0).all())


HARD = [(257, 64), (300, 200), (199, 199), (1024, 130), (9, 9), (3, 2)]


@pytest.mark.parametrize("n_l", HARD, ids=cases.label)
@pytest.mark.parametrize("name", sorted(cases.hard_blocks(9, 3)))
def test_orthonormalize_hard(backend: str, n_l: tuple[int, int], name: str) -> None:
    X = cases.hard_blocks(*n_l, device="cuda")[name]
    Q = ops.orthonormalize(X, backend=backend)
    assert cases.orthogonality(Q) < cases.ORTHONORMAL_TOLERANCE


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float64, torch.float32)], ids=str)
@pytest.mark.parametrize("l", [1, 2, 63, 199, 1025])
def test_subspace_error(backend: str, l: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    C, theta = (x.to(t) for x, t in zip(cases.residuals(4, l, "cuda"), dtypes, strict=True))
    theta[1] = theta[1, :1]  # none is told from another
    C[2, l // 2, l // 2] = torch.nan
    theta[3, 0] = torch.inf
    for k in {1, (l + 1) // 2, max(1, l - 1), l}:
        for known in {k, l}:
            for given in (C, torch.diagonal(C, dim1=1, dim2=2)):
                found = ops.subspace_error(given, theta, known, k, 4096, backend=backend)
                expected = ops.subspace_error(given.cpu(), theta.cpu(), known, k, 4096)
                torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=0, equal_nan=True)


def test_subspace_error_is_repeatable() -> None:
    C, theta = cases.residuals(7, 320, "cuda")
    first = ops.subspace_error(C, theta, 320, 200, 4096, backend="cuda")
    assert torch.equal(first, ops.subspace_error(C, theta, 320, 200, 4096, backend="cuda"))
    assert ops.subspace_error(C[:0], theta[:0], 320, 200, 4096, backend="cuda").shape == (3, 0)


def test_orthonormalize_in_a_graph() -> None:
    """A captured call, which cannot ask whether it has settled, still settles."""
    X = cases.hard_blocks(300, 96, device="cuda")["condition 1e7"]
    ops.orthonormalize(X, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        Q = ops.orthonormalize(X, backend="cuda")
    graph.replay()
    torch.cuda.synchronize()
    assert cases.orthogonality(Q) < cases.ORTHONORMAL_TOLERANCE


@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
def test_orthonormalize_keeps_nan(quick: bool) -> None:
    X = _normal(2, 131, 40)
    X[0, 3, 5] = float("nan")
    Q = ops.orthonormalize(X, quick=quick, backend="cuda")
    assert Q[0].isnan().any()
    assert Q[1].isfinite().all()


def test_orthonormalize_does_not_depend_on_the_batch(backend: str) -> None:
    X = torch.cat([cases.hard_blocks(200, 50, device="cuda")[n] for n in ("normal", "rank two")])
    together = ops.orthonormalize(X, backend=backend)
    for i in range(2):
        alone = ops.orthonormalize(X[i : i + 1], backend=backend)
        # Directions that X determines agree; what filled the others may differ by rounding.
        assert cases.unspanned(X[i : i + 1], alone) < 1e-3
        assert cases.unspanned(X[i : i + 1], together[i : i + 1]) < 1e-3


def _check_eigh(H: torch.Tensor, backend: str) -> None:
    before = H.clone()
    values, vectors = ops.symmetric_eigh(H, backend=backend)
    exact = torch.linalg.eigvalsh(H.double()).flip(-1)
    # Backward stable to a modest multiple of sqrt(l) roundings.
    bound = 20 * H.shape[1] ** 0.5 * torch.finfo(H.dtype).eps
    size = exact.abs().amax(1, keepdim=True).clamp_min(1e-300)
    assert ((values - exact).abs() / size).max() < bound
    assert (values.diff(dim=1) <= 0).all()
    residual = H.double() @ vectors.double() - vectors.double() * values.double()[:, None]
    assert (residual.norm(dim=1) / size).max() < bound
    assert cases.orthogonality(vectors) < bound
    assert torch.equal(H, before)


EIGH = [(1, 1), (3, 63), (2, 129), (2, 199), (40, 128), (20, 192), (1, 513), (3, 640)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", EIGH, ids=cases.label)
def test_symmetric_eigh(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    b, l = shape
    H = torch.randn(b, l, l, device="cuda", dtype=dtype)
    _check_eigh((H + H.mT) / 2, backend)


@pytest.mark.parametrize("l", [65, 256, 320], ids=lambda l: f"l={l}")
@pytest.mark.parametrize("name", sorted(cases.symmetric_matrices(2)))
def test_symmetric_eigh_hard(backend: str, name: str, l: int) -> None:
    _check_eigh(cases.symmetric_matrices(l, device="cuda")[name], backend)


def test_symmetric_eigh_of_different_matrices() -> None:
    """What needs many sweeps, few or none, in one batch and alone, to the same bits."""
    H = torch.cat(list(cases.symmetric_matrices(200, device="cuda").values()))
    _check_eigh(H, "auto")
    values, vectors = ops.symmetric_eigh(H)
    for i in (0, 2, 6):
        alone = ops.symmetric_eigh(H[i : i + 1])
        assert torch.equal(alone[0], values[i : i + 1])
        assert torch.equal(alone[1], vectors[i : i + 1])


def test_symmetric_eigh_ends_on_nan() -> None:
    H = torch.full((1, 256, 256), float("nan"), device="cuda")
    values, _ = ops.symmetric_eigh(H, backend="cuda")
    assert values.isnan().all()


def test_symmetric_eigh_in_a_graph() -> None:
    """A captured solve, which cannot ask whether it has settled, still solves."""
    H = cases.symmetric_matrices(160, device="cuda")["Gram matrix"]
    ops.symmetric_eigh(H, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values, _ = ops.symmetric_eigh(H, backend="cuda")
    graph.replay()
    torch.cuda.synchronize()
    exact = torch.linalg.eigvalsh(H.double()).flip(-1)
    assert cases.relative(values, exact) < 1e-5


def test_empty_batches(backend: str) -> None:
    W, X = torch.empty(0, 8, 6, device="cuda").bfloat16(), torch.empty(0, 6, 4, device="cuda")
    assert ops.thin_matmul(W, X, backend=backend).shape == (0, 8, 4)
    assert ops.normal_matmul(W.half(), X, backend=backend).shape == (0, 6, 4)
    assert ops.gram(X, backend=backend).shape == (0, 4, 4)
    assert ops.orthonormalize(X, backend=backend).shape == (0, 6, 4)
    assert ops.rotate(X, X.mT, backend=backend).shape == (0, 6, 6)
    assert ops.symmetric_eigh(X.mT @ X, backend=backend)[0].shape == (0, 4)
    none = torch.empty(0, device="cuda")
    assert ops.shift(X, X, none, X[:, 0], backend=backend).shape == (0, 6, 4)


def test_smallest_of_each() -> None:
    """Every CUDA kernel once, on sizes that leave tiles part empty: for compute-sanitizer."""
    X, R = _normal(2, 131, 70), _normal(2, 70, 9)
    for dtype in DTYPES:
        W = _normal(2, 131, 75).to(dtype)
        for pieces in (1, 2):
            ops.thin_matmul(W, X, transpose=True, pieces=pieces, backend="cuda")
            ops.thin_matmul(W, X * 1e9, transpose=True, pieces=pieces, backend="cuda")
    ops.gram(X, backend="cuda")
    ops.gram(X, dtype=torch.float64, backend="cuda")
    weights = _normal(2, 131, 75).half()
    ops.normal_matmul(weights, X * 1e9, transpose=True, backend="cuda")
    ops.gram_halves(weights, backend="cuda")
    ops.stack_halves(list(weights), [0, -3], backend="cuda")
    ops.rotate(X, R * 1e9, backend="cuda")
    ops.shift(X, X, _normal(2), _normal(2, 70), backend="cuda")
    hard = cases.hard_blocks(131, 70, device="cuda")["rank two"]
    for quick in (False, True):
        Q = ops.orthonormalize(hard, quick=quick, backend="cuda")
        assert Q.isfinite().all()
    values, _ = ops.symmetric_eigh(cases.symmetric_matrices(130, device="cuda")["Gram matrix"])
    assert values.isfinite().all()
    ops.subspace_error(*cases.residuals(2, 70, "cuda"), 70, 40, 131, backend="cuda")


@pytest.mark.parametrize(
    "op", ["thin_matmul", "normal_matmul", "gram", "orthonormalize", "rotate", "shift"]
)
def test_poisoned_memory_never_shows(backend: str, op: str) -> None:
    X = _normal(2, 211, 37)
    junk = torch.full((1 << 24,), float("nan"), device="cuda")
    del junk  # what the allocator hands out next is full of NaN
    if op == "thin_matmul":
        C = ops.thin_matmul(_normal(2, 99, 211).half(), X, backend=backend)
    elif op == "normal_matmul":
        C = ops.normal_matmul(cases.half_weights(2, 99, 211, device="cuda"), X, backend=backend)
    elif op == "rotate":
        C = ops.rotate(X, _normal(2, 37, 5), backend=backend)
    elif op == "shift":
        C = ops.shift(X, X, _normal(2), _normal(2, 37), backend=backend)
    else:
        C = getattr(ops, op)(X, backend=backend)
    assert C.isfinite().all()
