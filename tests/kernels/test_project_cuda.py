# SPDX-License-Identifier: Apache-2.0
"""The CUDA projection kernels without a GPU: compiled by nvcc, and run on an emulated machine."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from project_cases import DTYPES, SHAPES, SQUARE, errors, make_layers

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "kernels"
EMULATOR = Path(__file__).with_name("emulator")
CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class Layer(ctypes.Structure):
    """As in csrc/kernels/project_table.cuh; the launcher fills in what is left out here."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("block", "read", "write", "out")),
        *(
            (name, ctypes.c_int)
            for name in (
                *("block_row", "block_column", "read_row", "write_row", "m", "p", "k", "r"),
                *("read_width", "chunk_rows", "write_width", "slab_rows"),
                *("first_read", "first_write"),
                *("first_partial", "first_coordinate", "first_counter"),
            )
        ),
    ]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The launcher and its kernels, built for the processor with instructions emulated."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the emulated kernels")
    folder = tmp_path_factory.mktemp("emulated")
    for header in KERNELS.glob("project*.cuh"):
        shutil.copy(header, folder)
    shutil.copy(EMULATOR / "project_ptx.cuh", folder)
    library = folder / "emulated.so"
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    command += ["-I", str(EMULATOR), "-I", str(folder), str(EMULATOR / "project.cpp")]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def run(library, layers, item_bytes, lag, resident):
    """Results of a launch whose outputs start as NaN."""
    blocks, read, write = layers
    results = [
        torch.full((P.shape[0], B.shape[1]), float("nan"), dtype=B.dtype)
        for B, P in zip(blocks, write, strict=True)
    ]
    table = (Layer * len(blocks))()
    for i, (B, Q, P, X) in enumerate(zip(blocks, read, write, results, strict=True)):
        pointers = (B.data_ptr(), Q.data_ptr(), P.data_ptr(), X.data_ptr())
        strides = (B.stride(0), B.stride(1), Q.stride(0), P.stride(0))
        table[i] = Layer(*pointers, *strides, B.shape[0], P.shape[0], Q.shape[1], B.shape[1])
    codes = (CODES[x[0].dtype] for x in (read, write, blocks))
    tuning = (item_bytes, lag, resident)
    assert library.emulated_project(table, len(blocks), *codes, *tuning) == 0
    return results


def check(library, layers, item_bytes=8192, lag=125, resident=8):
    results = run(library, layers, item_bytes, lag, resident)
    # The emulated tensor core rounds to nearest, as PyTorch does: twice its error is ample.
    for found, plain in errors(results, layers):
        assert found <= max(2 * plain, 1.2e-7)
    return results


@pytest.mark.parametrize("factor", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    ("read", "write"),
    [("bf16", "bf16"), ("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "bf16")],
    ids=["bf16", "fp32", "bf16-fp32", "fp32-bf16"],
)
def test_two_bases(emulated, factor, read, write):
    generator = torch.Generator().manual_seed(1)
    layers = make_layers(SHAPES, DTYPES[factor], DTYPES[read], DTYPES[write], generator)
    check(emulated, layers)


@pytest.mark.parametrize("factor", ["bf16", "fp16", "fp32"])
def test_aligned_rows(emulated, factor):
    """Rows that start on multiples of 16 bytes are copied in the background."""
    generator = torch.Generator().manual_seed(2)
    blocks, bases, _ = make_layers(SQUARE, DTYPES[factor], torch.bfloat16, None, generator)

    def aligned(x):
        return torch.nn.functional.pad(x, (0, -x.shape[1] % 8))[:, : x.shape[1]]

    blocks = [aligned(B.T).T if B.stride(0) == 1 else aligned(B) for B in blocks]
    bases = [aligned(Q) for Q in bases]
    check(emulated, (blocks, bases, bases))


@pytest.mark.parametrize("resident", [1, 3, 8])
@pytest.mark.parametrize("lag", [-1, 0, 50, 400])
def test_any_order_ends_with_the_same_result(emulated, lag, resident):
    """Also with a single block at a time, which may never wait for another one."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(260, 260, 40, 16), (130, 130, 200, 5), (700, 700, 24, 9)]
    layers = make_layers(shapes, torch.bfloat16, torch.bfloat16, None, generator)
    expected = run(emulated, layers, 4096, 125, 8)
    found = check(emulated, layers, 4096, lag, resident)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_more_layers_than_one_upload(emulated):
    generator = torch.Generator().manual_seed(6)
    shapes = [(16, 16, 16, 1 + i % 3) for i in range(301)]
    check(emulated, make_layers(shapes, torch.bfloat16, torch.bfloat16, None, generator))


def test_unaligned_rows(emulated):
    generator = torch.Generator().manual_seed(3)
    blocks, bases, _ = make_layers(
        [(150, 150, 40, 6)] * 2, torch.bfloat16, torch.bfloat16, None, generator
    )
    bases = [
        torch.nn.functional.pad(Q, (shift, 2))[:, shift : shift + 37]
        for Q, shift in zip(bases, (1, 8), strict=True)
    ]
    check(emulated, (blocks, bases, bases))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_compiles(architecture, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    source = tmp_path / "all.cu"
    source.write_text(
        '#include "project_launch.cuh"\n'
        "using namespace lorax::projection;\n"
        "cudaError_t run(const std::vector<Layer>& x, Dtype d, const Allocate& a) {\n"
        "  return launch_project(x, d, d, d, a, nullptr);\n"
        "}\n"
    )
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = ["nvcc", "-std=c++17", "-I", str(KERNELS), target, "-cubin", str(source)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "all.cubin")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
