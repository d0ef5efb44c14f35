# SPDX-License-Identifier: Apache-2.0
"""The Triton projection kernels without a GPU: interpreted, and compiled ahead of time."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from project_cases import BASES, DTYPES, errors, make_layers

pytest.importorskip("triton")
# Interpreted, a launch takes seconds: two layers, with every kind of edge between them.
FEW = [(1100, 63, 70, 5), (40, 130, 17, 16)]
interpreted = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.interpret
@pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1 before triton is imported")
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize(
    ("factor", "read", "write"),
    [
        *[("bf16", "bf16", "bf16"), ("fp32", "bf16", "bf16"), ("fp32", "fp32", "fp32")],
        *[("bf16", "2xbf16", "2xbf16"), ("fp16", "bf16", "2xbf16"), ("fp32", "2xbf16", "fp64")],
    ],
)
def test_interpreted(factor, read, write):
    from lorax_kernels.ops import project

    generator = torch.Generator().manual_seed(4)
    layers = make_layers(FEW, DTYPES[factor], BASES[read], BASES[write], generator)
    results = project(*layers, backend="triton")
    # The interpreter cuts float32 to bfloat16 where a GPU rounds, which doubles that error.
    slack = 2 if factor == "bf16" else 1
    for found, limit in errors(results, layers):
        assert found <= slack * limit


@pytest.mark.skipif(interpreted, reason="runs the tests above in a process of its own")
def test_in_the_interpreter():
    """Triton reads TRITON_INTERPRET once, so interpreted tests need their own process."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@pytest.mark.skipif(interpreted, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("is_exact", "pieces"), [(True, 1), (True, 2), (False, 1)], ids=["bf16", "2xbf16", "fp32"]
)
def test_compiles(capability, is_exact, pieces):
    """Compiles, and reads a bfloat16 basis with 16-byte accesses."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = importlib.import_module("lorax_kernels.ops.project.triton_kernel")
    dtype = tl.bfloat16 if is_exact else tl.float32
    out = "*bf16" if is_exact else "*fp32"
    shared = {"R": 16, "PANEL": 64}
    precision = {"PIECES": pieces, "IS_EXACT": is_exact, "OPERAND": tl.bfloat16, "IS_ALIGNED": True}
    parts = (1, 2) if is_exact else (3, 3)
    tables = {"table": "*i64", "items": "*i32"}
    cases = [
        (
            kernels.project_read_kernel,
            tables | {"partials": "*fp32"},
            {
                "BASIS": dtype,
                "FACTOR": dtype,
                "CHUNK_ROWS": 1024,
                "TILE": 64,
                "PARTS": parts[0],
                **precision,
            },
        ),
        (
            kernels.project_sum_kernel,
            tables | {"partials": "*fp32", "coordinates": "*fp32"},
            {"CHUNKS": 11, "TILE": 1024},
        ),
        (
            kernels.project_write_kernel,
            tables | {"coordinates": "*fp32", "out": out},
            {"BASIS": dtype, "PANELS": 5, "TILE": 128, "PARTS": parts[1], **precision},
        ),
    ]
    for kernel, arguments, constants in cases:
        constants = {**shared, **constants}
        signature = arguments | dict.fromkeys(constants, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(arguments))}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        if is_exact and kernel is kernels.project_read_kernel:
            assert "cp.async.cg" in ptx or "ld.global.v4" in ptx
