# SPDX-License-Identifier: Apache-2.0
"""The contract of every op: registration, reference, messages; and the choice of a backend."""

import logging
import os
import subprocess
import sys

import op_cases as cases
import pytest
import torch
from torch.testing import assert_close

import lorax_kernels
from lorax_kernels import _backends, ops

# Float32 sums over up to 1025 terms against float64 ones.
FLOAT32 = {"rtol": 2e-5, "atol": 2e-4}
SIZES = [1, 63, 199, 1025]


def _inputs(n: int, l: int) -> dict[str, tuple]:
    """Arguments of each op, as the dispatcher takes them, for blocks `(2, n, l)`."""
    X = torch.randn(2, n, l)
    W = torch.randn(2, n, 5).bfloat16()
    H = torch.randn(2, l, l)
    pieces = torch.randn(2, 7, 2).bfloat16()
    lists = [torch.randn(n, 3)] * 2, [torch.randn(n, 2)] * 2, [torch.randn(7, 2), pieces]
    return {
        "thin_matmul": (W, X, True, 2),
        "normal_matmul": (W.half() / 8, X, True),
        "gram": (X, torch.float32),
        "gram_halves": (X.half(),),
        "stack_halves": (list(W), [1, -2]),
        "orthonormalize": (X, False),
        "cholesky_qr": (X,),
        "ritz": (torch.linalg.qr(X).Q, torch.randn(2, 7, l), 1),
        "symmetric_eigh": (H + H.mT,),
        "subspace_error": (H @ H.mT, torch.rand(2, l).sort(descending=True).values, l, 1, n),
        "rotate": (X, torch.randn(2, l, 4)),
        "shift": (X, torch.randn(2, n, l), torch.randn(2), torch.randn(2, l)),
        "project": lists,
    }


def _exact(op: str, *arguments: object) -> torch.Tensor:
    """The op in float64, from its definition."""
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
    if op == "thin_matmul":
        return (wide[0].mT if wide[2] else wide[0]) @ wide[1]
    if op == "normal_matmul":
        A = wide[0].mT if wide[2] else wide[0]
        return A.mT @ (A @ wide[1])
    if op == "gram":
        return wide[0].mT @ wide[0]
    if op == "rotate":
        return wide[0] @ wide[1]
    return (wide[0] - wide[2][:, None, None] * wide[1]) * wide[3][:, None]


OPS = sorted(_inputs(3, 2))


def test_every_op_is_public() -> None:
    defined = {
        name.removeprefix("lorax_kernels::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("lorax_kernels::")
    }
    assert sorted(defined) == OPS
    for op in OPS:
        assert callable(getattr(ops, op))


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    """Schema, fake, dispatch and tracing of the op agree, and it changes no input."""
    torch.library.opcheck(getattr(torch.ops.lorax_kernels, op).default, _inputs(9, 4)[op])


@pytest.mark.parametrize("op", OPS)
def test_compiles_to_one_graph(op: str) -> None:
    # One wrapper of torch's is compiled for every op, and only so many times.
    torch._dynamo.reset()
    arguments = _inputs(9, 4)[op]
    dispatched = getattr(torch.ops.lorax_kernels, op)
    compiled = torch.compile(dispatched, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*arguments), dispatched(*arguments))


# Tracing walks through the cache of what this machine has, which never changes in a process.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a:UserWarning")
def test_public_functions_compile_to_one_graph() -> None:
    X = torch.randn(2, 9, 4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(X: torch.Tensor) -> torch.Tensor:
        Q = ops.orthonormalize(X, backend="reference")
        return ops.gram(ops.rotate(Q, ops.gram(X, backend="reference"), backend="reference"))

    assert_close(step(X), ops.gram(ops.rotate(ops.orthonormalize(X), ops.gram(X))))


@pytest.mark.parametrize("n", SIZES, ids=lambda n: f"n={n}")
@pytest.mark.parametrize("op", ["thin_matmul", "normal_matmul", "gram", "rotate", "shift"])
def test_reference_against_float64(op: str, n: int) -> None:
    arguments = _inputs(n, min(n, 17))[op]
    found = getattr(torch.ops.lorax_kernels, op)(*arguments)
    assert found.dtype == torch.float32
    assert_close(found.double(), _exact(op, *arguments), **FLOAT32)


@pytest.mark.parametrize("op", ["thin_matmul", "normal_matmul", "gram", "rotate", "shift"])
def test_strides_do_not_matter(op: str) -> None:
    arguments = _inputs(63, 17)[op]
    awkward = [
        cases.awkward(a) if isinstance(a, torch.Tensor) and a.dim() == 3 else a for a in arguments
    ]
    found = getattr(torch.ops.lorax_kernels, op)(*awkward)
    assert_close(found.double(), _exact(op, *arguments), **FLOAT32)


@pytest.mark.parametrize("transpose", [False, True], ids=["W^T W", "W W^T"])
@pytest.mark.parametrize("shape", [*cases.THIN_SHAPES, (0, 8, 6, 4)], ids=cases.label)
def test_normal_matmul_is_two_products(shape: tuple[int, ...], transpose: bool) -> None:
    b, m, n, l = shape
    W, X = cases.half_weights(b, m, n), torch.randn(b, m if transpose else n, l)
    Z = ops.normal_matmul(W, X, transpose=transpose)
    Y = ops.thin_matmul(W, X, transpose=transpose, pieces=1)
    assert torch.equal(Z, ops.thin_matmul(W, Y, transpose=not transpose, pieces=1))


@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
@pytest.mark.parametrize("name", sorted(cases.hard_blocks(9, 3)))
def test_orthonormalize_reference(name: str, quick: bool) -> None:
    X = cases.hard_blocks(199, 63)[name]
    Q = ops.orthonormalize(cases.awkward(X), quick=quick)
    assert cases.orthogonality(Q) < cases.ORTHONORMAL_TOLERANCE
    assert bool(((Q * X).sum(1) >= -1e-5 * torch.linalg.vector_norm(X, dim=1)).all())


@pytest.mark.parametrize("known", [5, 9])
@pytest.mark.parametrize("k", [1, 4, 8, 9])
def test_subspace_error_reference(k: int, known: int) -> None:
    """Against the formulas, written out for one pair of vectors after the other."""
    C, theta = cases.residuals(1, 9)
    eps, rows = 2.0**-23, 300
    c, t = C[0].double().tolist(), theta[0].double().tolist()
    for is_full in (True, False):
        end = max(t[known - 1], t[8] + c[8][8] ** 0.5) if is_full else t[known - 1]
        least = eps * (4 * eps) ** 2 * rows * t[0]
        gaps = [max(x - end, least) for x in t[:k]]
        shift = [c[j][j] / max(t[j] - end, gaps[-1]) for j in range(9)]
        outside = [c[i][i] / gaps[i] ** 2 for i in range(k)]
        mixed, rounded = [0.0] * k, [0.0] * k
        for i in range(k):
            for j in range(k, 9):
                apart = max(t[i] - shift[i] - t[j] - shift[j], 1e-300)
                tilt = c[i][j] / (gaps[i] * apart)
                turn = eps / 4 * (t[i] * t[j]) ** 0.5 / max(t[i] - t[j], 1e-300)
                mixed[i] += tilt * tilt
                rounded[i] += turn * turn
        parts = [sum(x) for x in zip(outside, mixed, rounded, strict=True)]
        error = [min(x, 1.0) for x in parts] if is_full else outside
        sums = [sum(error), sum(outside), sum(min(x, 1.0) for x in mixed) if is_full else 0.0]
        roots = [[(2 / k * x) ** 0.5] for x in sums]
        expected = torch.tensor(roots, dtype=torch.float64)
        given = C if is_full else torch.diagonal(C, dim1=1, dim2=2)
        found = ops.subspace_error(given, theta, known, k, rows)
        assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_subspace_error_of_what_is_not_a_number() -> None:
    """It is no small error, whichever argument it is in."""
    C, theta = cases.residuals(4, 9)
    C[1, 2, 2] = torch.nan
    theta[2] = torch.nan
    theta[3, 0] = torch.inf
    found = ops.subspace_error(C, theta, 9, 4, 300)[0]
    assert found.isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize("name", sorted(cases.symmetric_matrices(2)))
def test_symmetric_eigh_reference(name: str) -> None:
    H = cases.symmetric_matrices(63)[name]
    values, vectors = ops.symmetric_eigh(cases.awkward(H))
    size = float(values.abs().max()) or 1.0
    # Backward stable to a modest multiple of sqrt(l) roundings.
    bound = 20 * 63**0.5 * torch.finfo(torch.float32).eps
    assert (values.diff() <= 0).all()
    assert float((H @ vectors - vectors * values[:, None]).abs().max()) < bound * size
    assert cases.orthogonality(vectors) < bound


def test_gram_in_float64() -> None:
    X = torch.randn(2, 199, 300)
    G = ops.gram(X, dtype=torch.float64)
    assert torch.equal(G, G.mT)
    assert_close(G, X.double().mT @ X.double(), rtol=1e-13, atol=1e-11)


BAD = {
    "thin_matmul of a matrix": (
        lambda: ops.thin_matmul(torch.ones(2, 3), torch.ones(1, 3, 1)),
        ValueError,
        r"W must be a batch \(b, rows, columns\), got shape \(2, 3\)",
    ),
    "thin_matmul of integers": (
        lambda: ops.thin_matmul(torch.ones(1, 2, 3).int(), torch.ones(1, 3, 1)),
        TypeError,
        "W must be one of bfloat16, float16, float32, got torch.int32; convert it first",
    ),
    "thin_matmul of other sizes": (
        lambda: ops.thin_matmul(torch.ones(1, 2, 3), torch.ones(1, 2, 1)),
        ValueError,
        "inner sizes of W and X must agree, got 3 and 2",
    ),
    "subspace_error of other sizes": (
        lambda: ops.subspace_error(torch.ones(1, 3, 2), torch.ones(1, 3), 3, 1, 9),
        ValueError,
        r"C must be \(1, 3, 3\), or \(1, 3\) of squared lengths, beside theta \(1, 3\)",
    ),
    "subspace_error beyond the values": (
        lambda: ops.subspace_error(torch.ones(1, 3), torch.ones(1, 3), 3, 4, 9),
        ValueError,
        "k must be from 1 to the 3 values, got 4",
    ),
    "four pieces": (
        lambda: ops.thin_matmul(torch.ones(1, 2, 3), torch.ones(1, 3, 1), pieces=4),
        ValueError,
        "pieces must be 1, 2 or 3, got 4",
    ),
    "normal_matmul of bfloat16": (
        lambda: ops.normal_matmul(torch.ones(1, 2, 3).bfloat16(), torch.ones(1, 3, 1)),
        TypeError,
        "W must be float16, got torch.bfloat16; use thin_matmul twice for other weights",
    ),
    "normal_matmul of a matrix": (
        lambda: ops.normal_matmul(torch.ones(2, 3).half(), torch.ones(1, 3, 1)),
        ValueError,
        r"W must be a batch \(b, rows, columns\), got shape \(2, 3\)",
    ),
    "normal_matmul of a float16 block": (
        lambda: ops.normal_matmul(torch.ones(1, 2, 3).half(), torch.ones(1, 3, 1).half()),
        TypeError,
        "X must be one of float32, got torch.float16",
    ),
    "normal_matmul of other sizes": (
        lambda: ops.normal_matmul(torch.ones(1, 2, 3).half(), torch.ones(1, 3, 1), transpose=True),
        ValueError,
        "inner sizes of W and X must agree, got 2 and 3",
    ),
    "gram in bfloat16": (
        lambda: ops.gram(torch.ones(1, 2, 3), dtype=torch.bfloat16),
        TypeError,
        "a Gram matrix is float32 or float64, got torch.bfloat16",
    ),
    "a wide block": (
        lambda: ops.orthonormalize(torch.ones(1, 2, 3)),
        ValueError,
        r"needs no more columns than rows, got \(1, 2, 3\)",
    ),
    "an oblong eigenproblem": (
        lambda: ops.symmetric_eigh(torch.ones(1, 2, 3)),
        ValueError,
        "rows and columns of H must agree, got 2 and 3",
    ),
    "rotate of other batches": (
        lambda: ops.rotate(torch.ones(1, 2, 3), torch.ones(2, 3, 3)),
        ValueError,
        "batch sizes of X and R must agree, got 1 and 2",
    ),
    "shift of other shapes": (
        lambda: ops.shift(torch.ones(1, 2, 3), torch.ones(1, 3, 2), torch.ones(1), torch.ones(1)),
        ValueError,
        r"shapes of Z and X must agree, got \(1, 2, 3\) and \(1, 3, 2\)",
    ),
    "shift by a float64": (
        lambda: ops.shift(
            torch.ones(1, 2, 3), torch.ones(1, 2, 3), torch.ones(1).double(), torch.ones(1)
        ),
        TypeError,
        "a must be float32, got torch.float64; convert it first",
    ),
    "shift by one number for two": (
        lambda: ops.shift(torch.ones(2, 2, 3), torch.ones(2, 2, 3), torch.ones(1), torch.ones(2)),
        ValueError,
        r"shape of a and \(batch,\) must agree, got \(1,\) and \(2,\)",
    ),
    "an unknown backend": (
        lambda: ops.gram(torch.ones(1, 2, 3), backend="metal"),
        ValueError,
        "backend must be one of auto, cuda, triton, reference; got 'metal'",
    ),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_messages(case: str) -> None:
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()


def test_table_lists_every_op() -> None:
    rows = {row.name: row for row in lorax_kernels.backends()}
    assert list(rows) == ["cuda", "triton", "reference"]
    for row in rows.values():
        assert sorted(row.ops) == OPS
        assert row.reason
    assert rows["reference"].available


def test_named_backend_says_why_it_cannot_run() -> None:
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot run gram: .+"):
        ops.gram(torch.ones(1, 2, 2), backend="cuda")


def test_environment_names_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAX_KERNELS_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run gram"):
        ops.gram(torch.ones(1, 2, 2))
    assert ops.gram(torch.ones(1, 2, 2), backend="reference").shape == (1, 2, 2)
    monkeypatch.setenv("LORAX_KERNELS_BACKEND", "metal")
    with pytest.raises(ValueError, match="got 'metal'"):
        ops.gram(torch.ones(1, 2, 2))


class _OnGpu(torch.Tensor):
    """A CPU tensor that says it is elsewhere, to walk the table without a GPU."""

    is_cuda = True


def test_auto_falls_back_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _backends._say_once.cache_clear()
    reasons = {"cuda": (False, "no kernels were built"), "triton": (True, "present")}
    availability = _backends._availability
    monkeypatch.setattr(
        _backends, "_availability", lambda name: reasons.get(name) or availability(name)
    )
    X = torch.ones(1, 2, 2).as_subclass(_OnGpu)
    with caplog.at_level(logging.INFO, "lorax_kernels"):
        chosen = _backends.select("gram", "auto", X, torch.float32)
        assert _backends.select("gram", "auto", X, torch.float32) is chosen
    assert chosen is _backends._KERNELS["triton"]["gram"].run
    messages = [r.getMessage() for r in caplog.records]
    assert messages == ["gram: not on backend 'cuda': no kernels were built"]


def test_refusal_of_a_kernel_is_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_availability", lambda name: (True, "present"))
    refusing = _backends.Kernel(lambda *_: None, "nothing", lambda *_: "it is not in the mood")
    monkeypatch.setitem(_backends._KERNELS["cuda"], "gram", refusing)
    monkeypatch.setitem(_backends._KERNELS["triton"], "gram", refusing)
    X = torch.ones(1, 2, 2).as_subclass(_OnGpu)
    reference = _backends._KERNELS["reference"]["gram"].run
    assert _backends.select("gram", "auto", X, torch.float32) is reference
    with pytest.raises(RuntimeError, match="cannot run gram: it is not in the mood"):
        _backends.select("gram", "triton", X, torch.float32)


def test_import_builds_and_loads_nothing_heavy() -> None:
    """Importing the package imports neither Triton nor a CUDA context."""
    script = (
        "import sys, torch, lorax_kernels; "
        "assert 'triton' not in sys.modules, 'triton'; "
        "assert not torch.cuda.is_initialized(), 'cuda'"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
