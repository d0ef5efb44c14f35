# SPDX-License-Identifier: Apache-2.0
"""`project` on a GPU: both kernel backends against float64."""

import itertools
import subprocess
import sys
import textwrap

import pytest
import torch
from project_cases import BASES, DTYPES, PIECES_ERROR, SHAPES, SQUARE, errors, make_layers

import lorax_kernels as lk
from lorax_kernels.ops import project

pytestmark = pytest.mark.gpu

BACKENDS = ["cuda", "triton"]
# What each backend takes a block of.
FACTORS = {"cuda": ("bf16", "fp16", "fp32", "fp64"), "triton": ("bf16", "fp16", "fp32")}
PAIRS = [*itertools.product(("bf16", "fp32", "2xbf16"), repeat=2)]
# Large enough for several blocks of rows a layer and several layers in flight.
WIDE = [(4096, 4096, 320, 16), (1025, 1025, 320, 16), (2048, 2048, 64, 8), (640, 640, 128, 32)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    row = next(row for row in lk.backends() if row.name == request.param)
    if not row.available:
        pytest.skip(f"{row.name}: {row.reason}")
    return request.param


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(7)


def check(layers, backend):
    """At most twice PyTorch's own error in the same dtypes (TF32 off), or rounding.

    Only the compiled kernels need more for float32 blocks with bases in pieces.
    """
    before = [[x.clone() for x in group] for group in layers]
    results = project(*layers, backend=backend)
    for found, limit in errors(results, layers, PIECES_ERROR if backend == "cuda" else 0.0):
        assert found <= limit
    for X, B, P in zip(results, layers[0], layers[2], strict=True):
        assert X.shape == (P.shape[-2], B.shape[1])
        assert X.dtype == B.dtype
    assert all(
        torch.equal(x, y)
        for old, new in zip(before, layers, strict=True)
        for x, y in zip(old, new, strict=True)
    )
    return results


def skip_unless_taken(backend, factor):
    if factor not in FACTORS[backend]:
        pytest.skip(f"{backend} refuses {factor} blocks")


def test_refused(generator):
    """A named backend says why not; left to itself the call falls back."""
    layers = make_layers(SQUARE, torch.float64, torch.float32, None, generator, "cuda")
    with pytest.raises(RuntimeError, match="too little for a float64 block"):
        project(*layers, backend="triton")
    check(layers, "reference")


@pytest.mark.parametrize("factor", DTYPES)
@pytest.mark.parametrize(("read", "write"), PAIRS)
def test_two_bases(backend, factor, read, write, generator):
    skip_unless_taken(backend, factor)
    layers = make_layers(SHAPES, DTYPES[factor], BASES[read], BASES[write], generator, "cuda")
    check(layers, backend)


@pytest.mark.parametrize("factor", DTYPES)
@pytest.mark.parametrize("read", BASES)
@pytest.mark.parametrize("shapes", [SQUARE, WIDE], ids=["odd", "wide"])
def test_one_basis(backend, factor, read, shapes, generator):
    skip_unless_taken(backend, factor)
    check(make_layers(shapes, DTYPES[factor], BASES[read], None, generator, "cuda"), backend)


@pytest.mark.parametrize(
    ("dtype", "basis"),
    [
        *[("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32")],
        *[("bf16", "2xbf16"), ("fp32", "2xbf16")],
    ],
)
@pytest.mark.parametrize("r", [1, 4, 24, 41, 64, 1024])
def test_ranks(backend, r, dtype, basis, generator):
    """Both ways that a block can lie, with rows on 16-byte boundaries and off them."""
    shapes = [(1024, 1024, 320, r), (520, 520, 136, r)] * 2 + [(1024, 1024, 320, r)]
    check(make_layers(shapes, DTYPES[dtype], BASES[basis], None, generator, "cuda"), backend)


def test_more_bases_than_scratch_memory(generator):
    """Bases that are converted a few layers at a time: 0.5 GB holds eleven of these in float64."""
    if not lk.backends()[0].available:
        pytest.skip(lk.backends()[0].reason)
    blocks, bases, _ = make_layers(
        [(11008, 11008, 512, 16)], torch.float32, torch.float32, None, generator, "cuda"
    )
    blocks = [blocks[0] * (i + 1) for i in range(25)]
    bases = [bases[0].roll(i, 1) for i in range(25)]
    check((blocks, bases, bases), "cuda")


@pytest.mark.parametrize("kind", ["bf16", "2xbf16"])
def test_wide_blocks_with_two_bases_and_strides(backend, kind, generator):
    shapes = [(1024, 264, 160, 64), (256, 1032, 40, 48)] * 2
    dtype, basis = torch.bfloat16, BASES[kind]
    blocks, read, write = make_layers(shapes, dtype, basis, basis, generator, "cuda")
    read[1] = torch.nn.functional.pad(read[1], (8, 16))[..., 8:48]
    write[2] = torch.nn.functional.pad(write[2], (1, 2))[..., 1:161]
    check((blocks, read, write), backend)


def test_bad_input(backend):
    """Messages name the entry."""
    one = torch.ones(4, 2, device="cuda")
    with pytest.raises(ValueError, match="entry 1: rows of the block and of its read basis"):
        project([one, one], [one, torch.ones(5, 2, device="cuda")], backend=backend)
    with pytest.raises(ValueError, match="entry 0: ranks of the two bases"):
        project([one], [one], [torch.ones(4, 3, device="cuda")], backend=backend)
    with pytest.raises(ValueError, match="must be matrices"):
        project([one[0]], [one], backend=backend)
    with pytest.raises(ValueError, match="lists of one length, got 1, 2 and 2"):
        project([one], [one, one], backend=backend)
    with pytest.raises(ValueError, match="two bfloat16 pieces"):
        project([one], [torch.ones(2, 4, 2, device="cuda")], backend=backend)


def test_compiled_op_checks_for_itself():
    """Called past `project`; in its own process, because what it guards against is a crash."""
    if not lk.backends()[0].available:
        pytest.skip(lk.backends()[0].reason)
    lines = """
    import torch, lorax_kernels
    lorax_kernels.backends()
    one = torch.ones(4, 2, device="cuda")
    try:
        torch.ops.lorax_kernels.project([one, one], [one, one[1:]], [one, one])
    except ValueError as error:
        print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(lines)], capture_output=True, text=True, check=False
    )
    assert "entry 1: rows of the block" in done.stdout, (done.returncode, done.stderr[-2000:])
    assert "got 4 and 3" in done.stdout


def test_mixed_dtypes_in_one_call(backend, generator):
    groups = [
        make_layers(SQUARE, DTYPES[factor], BASES[read], None, generator, "cuda")
        for factor, read in itertools.product(FACTORS[backend], ("bf16", "fp32", "2xbf16"))
    ]
    check(tuple([x for g in groups for x in g[j]] for j in range(3)), backend)


@pytest.mark.parametrize("factor", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["bf16", "2xbf16"])
def test_strides_and_alignment(backend, factor, kind, generator):
    """Bases that are columns of wider ones, start at odd addresses or lie transposed."""
    blocks, bases, _ = make_layers(
        [(300, 300, 64, 16)] * 4, DTYPES[factor], BASES[kind], None, generator, "cuda"
    )
    bases[0] = bases[0].movedim(-2, 0).contiguous().movedim(0, -2)  # the pieces of a row together
    bases[1] = torch.nn.functional.pad(bases[1], (3, 2))[..., 3:67]
    bases[2] = torch.nn.functional.pad(bases[2], (8, 8))[..., 8:71]
    bases[3] = bases[3].mT.contiguous().mT
    blocks[2] = torch.nn.functional.pad(blocks[2], (1, 4))[:, 1:17]
    check((blocks, bases, bases), backend)


@pytest.mark.parametrize("basis", ["bf16", "fp32", "2xbf16"])
def test_many_layers_need_several_launches(backend, basis, generator):
    """More tables than one launch's parameters hold: of pointers, and of conversions."""
    shapes = [(96, 96, 24, 4)] * 900
    check(make_layers(shapes, torch.bfloat16, BASES[basis], None, generator, "cuda"), backend)


def test_empty(backend):
    assert project([], [], [], backend=backend) == []
    basis = torch.ones(4, 0, device="cuda")
    zero = project([torch.ones(4, 2, device="cuda")], [basis], backend=backend)[0]
    assert torch.equal(zero, torch.zeros(4, 2, device="cuda"))
    none = project(
        [torch.ones(4, 0, device="cuda")], [torch.ones(4, 2, device="cuda")], backend=backend
    )[0]
    assert none.shape == (4, 0)


@pytest.mark.parametrize("kind", ["bf16", "2xbf16"])
def test_poisoned_memory_and_repeatability(backend, kind, generator):
    """Results do not depend on what memory held before, nor on the timing of the blocks."""
    layers = make_layers(WIDE * 8, torch.bfloat16, BASES[kind], None, generator, "cuda")
    first = project(*layers, backend=backend)
    for _ in range(5):
        poison = [torch.full((1 << 28,), float("nan"), device="cuda") for _ in range(2)]
        del poison
        again = project(*layers, backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("kind", ["bf16", "2xbf16"])
def test_graph_and_stream(backend, kind, generator):
    layers = make_layers(WIDE, torch.bfloat16, BASES[kind], None, generator, "cuda")
    expected = project(*layers, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = project(*layers, backend=backend)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = project(*layers, backend=backend)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for x, y, z in zip(expected, aside, captured, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


@pytest.mark.parametrize("kind", ["bf16", "2xbf16"])
def test_op_contract(backend, kind, generator):
    if backend != "cuda":
        pytest.skip("the dispatcher holds the compiled kernel only")
    layers = make_layers(SQUARE, torch.bfloat16, BASES[kind], None, generator, "cuda")
    torch.library.opcheck(torch.ops.lorax_kernels.project.default, layers)
