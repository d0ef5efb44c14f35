# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for both architectures, on machines that have the compilers but no GPU."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "csrc" / "kernels"
HEADERS = sorted(KERNELS.glob("*.cuh"))
ARCHITECTURES = {"sm_80": "compute_80", "sm_90a": "compute_90a"}
# What instantiates every template of the headers, as the launchers do.
LAUNCHES = """
void use(float* f, double* d, uint32_t* u, __half* h, __nv_bfloat16* b, Jacobi j, int* i) {
  const PieceLayout at{8, 8, 8};
  launch_split<__half, Scaling::kBlock>(f, f, u, h, 1, 1, 1, 1, at, 0, 0);
  launch_split<__half, Scaling::kAgain>(f, f, u, h, 1, 1, 1, 1, at, 0, 0);
  launch_split<__half, Scaling::kColumns>(f, f, u, h, 1, 1, 1, 1, at, 0, 0);
  launch_split<__nv_bfloat16, Scaling::kNone>(f, f, u, b, 1, 1, 1, 1, at, 0, 0);
  launch_column_scales(f, d, f, f, 1, 1, 1, 0, 0);
  launch_merge(f, u, f, 2, 1, 1, 1, 1, 1, 0);
  launch_correct(u, u, f, 1, 1, 1, 0);
  launch_restore(h, f, f, 1, 1, 1, 0);
  launch_mirror(f, 1, 1, 0);
  launch_mirror(d, 1, 1, 0);
  launch_combine(f, f, f, f, f, 1, 1, 64, 1, 0);
  launch_strip_pieces(f, h, h, 1, 1, 1, 0, 0);
  launch_stack_halves<__half>({{h, 1, 1}}, h, u, 1, 0);
  launch_stack_halves<__nv_bfloat16>({{b, 1, 1}}, h, u, 1, 0);
  launch_triangle_pieces(f, f, h, f, 1, 1, 64, 0);
  Factorization c{f, f, 64, 0};
  launch_cholesky_start(c, &c, 1, 0);
  launch_cholesky_steps(&c, 1, 64, 0);
  launch_mend_columns(f, f, 1, 1, 1, 64, 1, 0);
  launch_least_pivot(f, u, 1, 64, 0);
  launch_jacobi_start(j, &j, f, 1, 0);
  launch_jacobi_sweep(&j, 1, 64, 0);
  launch_shift(f, f, f, f, f, 1, 1, 1, 0);
  launch_subspace_error(f, f, d, true, 1, 1, 1, 1, {0, 0, 0}, 0);
  const NarrowGram gram = narrow_gram(f, d, 1);
  const NarrowProduct product{f, d, f, 1};
  launch_narrow_gram(gram, gram, 2, 1, 1, 0);
  launch_narrow_factor(gram, d, 1, 1, 0, 0);
  launch_narrow_product(product, product, 2, 1, 1, 1, 0);
  launch_ritz(gram, gram, d, d, f, i, 1, 1, 1, 0, 0, 0);
}
"""


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("nvcc is not installed")
    return found


def _spilled(nvcc: str, headers: list[Path], uses: str, architecture: str, to: Path) -> list[int]:
    """Compiles headers as one translation unit, without torch; bytes that each kernel spills."""
    source = to / "all.cu"
    includes = "".join(f'#include "kernels/{header.name}"\n' for header in headers)
    source.write_text(f"{includes}using namespace lorax;\n{uses}")
    command = [nvcc, "-std=c++17", "-O3", f"-I{KERNELS.parent}", "-Xptxas", "-v", "-cubin"]
    command += [f"-gencode=arch={ARCHITECTURES[architecture]},code={architecture}"]
    command += ["-o", str(to / "all.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return [int(n) for n in re.findall(r"(\d+) bytes spill stores", done.stderr)]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_headers_compile(nvcc: str, architecture: str, tmp_path: Path) -> None:
    """No kernel spills more than a few indices around its inner loop."""
    spilled = _spilled(nvcc, HEADERS, LAUNCHES, architecture, tmp_path)
    assert len(spilled) > 30
    assert max(spilled) <= 32


@pytest.mark.parametrize("header", HEADERS, ids=lambda h: h.name)
def test_kernels_know_no_torch(header: Path) -> None:
    text = header.read_text()
    assert not re.search(r"#include [<\"](ATen|c10|torch)/", text)
    assert "#pragma once" in text


SPLIT = {
    # name: (dtype of A, of B, pieces of A, of B, order, scaled, symmetric)
    "bfloat16 weights": ("bf16", "fp32", 1, 2, 2, False, False),
    "float16 weights": ("fp16", "fp32", 1, 1, 1, True, False),
    "float32 weights": ("fp32", "fp32", 2, 2, 2, False, False),
    "gram": ("fp32", "fp32", 3, 3, 3, False, True),
}
not_interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"
)


def _compile(kernel: object, arguments: dict, constants: dict, capability: int) -> str:
    """The PTX of a Triton kernel for these types and constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: "constexpr" if name in constants else arguments.get(name, "i32")
        for name in kernel.arg_names
    }
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": 8, "num_stages": 3}).asm[
        "ptx"
    ]


@not_interpreted
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", sorted(SPLIT))
def test_split_matmul_compiles(name: str, capability: int) -> None:
    """For tensor cores: mma on Ampere, wgmma on Hopper where an operand is not split."""
    tl = pytest.importorskip("triton.language")
    from lorax_kernels.ops.thin_matmul.triton_kernel import split_matmul_kernel

    a, b, a_pieces, b_pieces, order, scaled, symmetric = SPLIT[name]
    pointers = {"A": f"*{a}", "B": f"*{b}", "C": "*fp32", "scales": "*fp32"}
    constants = {
        "PIECE": tl.float16 if a == "fp16" else tl.bfloat16,
        "A_PIECES": a_pieces,
        "B_PIECES": b_pieces,
        "ORDER": order,
        "SCALED": scaled,
        "SYMMETRIC": symmetric,
        "UPCAST": False,
        "TILE_ROWS": 128,
        "TILE_COLUMNS": 128,
        "TILE_DEPTH": 32,
        "a_depth": 1,
        "b_column": 1,
    }
    ptx = _compile(split_matmul_kernel, pointers, constants, capability)
    assert "wgmma.mma_async" in ptx if capability == 90 else "mma.sync" in ptx


@not_interpreted
@pytest.mark.parametrize("capability", [80, 90])
def test_shift_compiles(capability: int) -> None:
    pytest.importorskip("triton")
    from lorax_kernels.ops.shift.triton_kernel import shift_kernel

    pointers = dict.fromkeys(("Z", "X", "a", "s", "out"), "*fp32")
    assert "st.global" in _compile(shift_kernel, pointers, {"TILE": 2048}, capability)
