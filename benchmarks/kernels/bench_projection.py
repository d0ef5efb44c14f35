# SPDX-License-Identifier: Apache-2.0
"""Times `project` on whole models and writes one row a case, method and rank.

    PYTHONPATH=.:python python benchmarks/kernels/bench_projection.py --output rows.json

Bytes of a case: each basis once (`floor_ms` at the measured copy rate), blocks read, results
written; each multiply-add counts twice, 4 m k r a layer side. `ms` is the time of the GPU, from
replays of a captured graph, except for method "torch" (the loop, launched from Python); `call_ms`
is the wall time of one call from Python that ends with a synchronisation. A row is written only if
its error against float64 is at most twice PyTorch's own; with bases "2xbf16", two bfloat16 pieces,
what they are right to themselves is enough. "error" is against the sum of the pieces.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.record import save
from lorax_kernels import backends, split_bfloat16
from lorax_kernels.ops import project

# (out, in) of every layer that takes an adapter.
LLAMA_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
TINYLLAMA = [(2048, 2048)] * 2 + [(256, 2048)] * 2 + [(5632, 2048)] * 2 + [(2048, 5632)]
# Attention projections of SDXL's U-Net; keys and values of cross-attention read 2048-wide text.
SDXL = [
    (width, inner)
    for width, count in ((640, 10), (1280, 60))
    for inner in [width] * 4 + [width] * 2 + [2048] * 2
    for _ in range(count)
]
CASES = {"L7": LLAMA_7B * 32, "tinyllama": TINYLLAMA * 22, "sdxl": SDXL}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PIECES = "2xbf16"


def layers(shapes, rank: int, r: int, basis: str, factor: str, device="cuda"):
    """Blocks and bases of both sides of every `(out, in)` layer, made on the device.

    Bases are scaled Gaussian: near enough to orthonormal for arithmetic, and quick to make.
    """
    blocks, bases = [], []
    generator = torch.Generator(device).manual_seed(0)
    for out, inner in shapes:
        for side, is_transposed in ((out, False), (inner, True)):
            k = min(rank, side)
            shape = (r, side) if is_transposed else (side, r)
            B = torch.randn(shape, device=device, generator=generator).to(DTYPES[factor])
            Q = torch.randn(side, k, device=device, generator=generator) / side**0.5
            blocks.append(B.T if is_transposed else B)
            bases.append(split_bfloat16(Q) if basis == PIECES else Q.to(DTYPES[basis]))
    return blocks, bases


def whole(basis: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return basis.to(dtype) if basis.dim() == 2 else basis[0].to(dtype) + basis[1].to(dtype)


def loop(blocks, bases):
    """What a user writes: two products a factor, in the dtype that both share.

    That is float32 for a basis in pieces, which are added up first.
    """
    results = []
    for B, Q in zip(blocks, bases, strict=True):
        dtype = torch.promote_types(B.dtype, Q.dtype if Q.dim() == 2 else torch.float32)
        Q, X = whole(Q, dtype), B.to(dtype)
        results.append((Q @ (Q.T @ X)).to(B.dtype))
    return results


def graphed(run: Callable[[], object]) -> Callable[[], None]:
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def gpu_ms(run: Callable[[], object], repeats: int = 15) -> tuple[float, float]:
    """Median and half the spread between the 10th and 90th percentile."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    times.sort()
    return statistics.median(times), (times[-2] - times[1]) / 2


def call_ms(run: Callable[[], object], repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def error(results, blocks, bases, samples: int = 6) -> float:
    """Relative error of a sample of layers against float64."""
    worst = 0.0
    for i in range(0, len(blocks), max(1, len(blocks) // samples)):
        Q, B = whole(bases[i], torch.float64), blocks[i].double()
        expected = Q @ (Q.T @ B)
        worst = max(worst, float((results[i].double() - expected).norm() / expected.norm()))
    return worst


def copy_rate() -> float:
    """Bytes a second of a device-to-device copy, read and written ones counted."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    ms, _ = gpu_ms(lambda: target.copy_(source), 9)
    return 2 * source.numel() / ms * 1e3


def measure(case: str, rank: int, r: int, basis: str, factor: str, rate: float) -> list[dict]:
    blocks, bases = layers(CASES[case], rank, r, basis, factor)
    methods: dict[str, Callable[[], list[torch.Tensor]]] = {
        "torch": partial(loop, blocks, bases),
        **{
            row.name: partial(project, blocks, bases, backend=row.name)
            for row in backends()
            if row.available and row.name != "reference"
        },
    }
    base_bytes = sum(Q.numel() * Q.element_size() for Q in bases)
    factor_bytes = sum(B.numel() * B.element_size() for B in blocks)
    floor = (base_bytes + 2 * factor_bytes) / rate * 1e3
    flops = sum(4 * Q.numel() * B.shape[1] for Q, B in zip(bases, blocks, strict=True))
    plain = error(loop(blocks, bases), blocks, bases)
    rows = []
    for method, run in methods.items():
        try:
            found = error(run(), blocks, bases)
        except RuntimeError as reason:
            print(f"not timed, {method} at r={r}: {reason}")
            continue
        row = {
            **{"case": case, "rank": rank, "r": r, "basis": basis, "factor": factor},
            **{"method": method, "error": found, "torch_error": plain},
            **{"bytes": base_bytes + 2 * factor_bytes, "flops": flops, "floor_ms": floor},
        }
        if not found <= max(2 * plain, 2.0**-18 if basis == PIECES else 3e-7):
            print(f"not timed, error {found:.1e} against {plain:.1e}: {row}")
            continue
        row["call_ms"] = call_ms(run)
        if method == "torch":
            row["ms"], row["spread_ms"] = gpu_ms(run, 5)
            rows.append(row.copy())
            row["method"] = "torch graph"
        row["ms"], row["spread_ms"] = gpu_ms(graphed(run))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="only L7 in bfloat16 at rank 16")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}: copy {rate / 1e12:.2f} TB/s")
    wanted = [("L7", 320, 16, "bf16", "bf16")]
    if not arguments.quick:
        wanted += [
            ("L7", 320, 4, "bf16", "bf16"),
            ("L7", 320, 64, "bf16", "bf16"),
            ("L7", 320, 1024, "bf16", "bf16"),
            ("L7", 320, 4, "fp32", "bf16"),
            ("L7", 320, 16, "fp32", "bf16"),
            ("L7", 320, 64, "fp32", "bf16"),
            ("L7", 320, 16, "fp32", "fp16"),
            ("L7", 320, 16, "bf16", "fp32"),
            ("L7", 320, 4, "fp32", "fp32"),
            ("L7", 320, 16, "fp32", "fp32"),
            ("L7", 320, 64, "fp32", "fp32"),
            ("L7", 320, 4, PIECES, "bf16"),
            ("L7", 320, 16, PIECES, "bf16"),
            ("L7", 320, 64, PIECES, "bf16"),
            ("L7", 320, 16, PIECES, "fp16"),
            ("L7", 320, 16, PIECES, "fp32"),
            ("L7", 128, 16, "bf16", "bf16"),
            ("sdxl", 320, 16, "bf16", "bf16"),
            ("tinyllama", 320, 16, "bf16", "bf16"),
        ]
    rows = []
    for case in wanted:
        rows += measure(*case, rate)
        torch.cuda.empty_cache()
    print("case       rank    r basis  fact  method           ms  spread  call ms  floor   error")
    for row in rows:
        print(
            f"{row['case']:10s} {row['rank']:4d} {row['r']:4d} {row['basis']:6s} "
            f"{row['factor']:5s} {row['method']:12s} {row['ms']:7.3f} {row['spread_ms']:6.3f} "
            f"{row['call_ms']:8.2f} {row['floor_ms']:6.3f}  {row['error']:.1e}"
        )
    if arguments.output:
        save(arguments.output, rows, copy_bytes_per_second=rate)


if __name__ == "__main__":
    main()
