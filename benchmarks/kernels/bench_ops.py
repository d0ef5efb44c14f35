# SPDX-License-Identifier: Apache-2.0
"""Times the ops under the truncated SVD on one GPU: every backend, against this machine's ceilings.

    python benchmarks/kernels/bench_ops.py --output results.json [--only thin_matmul] [--profile]

A row is the median over repeated calls, timed with CUDA events after a warm-up, on random data
larger than the L2 cache. Errors are against float64 on the first matrix of the batch.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import lorax_kernels
from lorax_kernels import ops

SHAPES = [(16, 4096, 4096), (16, 11008, 4096)]
WIDTHS = [96, 128, 512]
BACKENDS = ("cuda", "triton", "reference")


@dataclass
class Row:
    op: str
    case: str
    backend: str
    ms: float
    tflops: float  # useful operations: pieces and padding do not count
    gbps: float  # inputs read once, outputs written once
    error: float


@dataclass
class Case:
    op: str
    name: str
    run: Callable[[str], object]
    flops: float
    bytes: float
    error: Callable[[object], float]


def median_ms(run: Callable[[], object], budget_ms: float = 150.0) -> float:
    """Median time of a call: of 5 to 50 as the budget allows, of one where it takes over 0.3 s."""
    run()
    torch.cuda.synchronize()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    once = start.elapsed_time(stop)
    if once > 300:
        return once
    count = int(min(50, max(5, budget_ms / max(once, 1e-3))))
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(count)
    ]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def orthogonality(Q: torch.Tensor) -> float:
    Q = Q[:1].double()
    return float((Q.mT @ Q - torch.eye(Q.shape[2], device=Q.device)).abs().max())


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda")


def thin_cases() -> Iterator[Case]:
    for b, m, n in SHAPES:
        W = (normal(b, m, n) / n**0.5).bfloat16()
        for l in WIDTHS:
            for transpose in (False, True):
                X = normal(b, m if transpose else n, l)
                first = W[:1].double()
                exact = (first.mT if transpose else first) @ X[:1].double()
                for pieces in (1, 2, 3):
                    yield Case(
                        "thin_matmul",
                        f"{b}x{m}x{n} l={l} {'W^T' if transpose else 'W'} pieces={pieces}",
                        lambda backend, W=W, X=X, t=transpose, p=pieces: ops.thin_matmul(
                            W, X, transpose=t, pieces=p, backend=backend
                        ),
                        2.0 * b * m * n * l,
                        b * (2.0 * m * n + 4.0 * (m + n) * l),
                        lambda C, exact=exact: relative(C[:1], exact),
                    )
    for dtype in (torch.float16, torch.float32):
        W, X = (normal(16, 4096, 4096) / 64).to(dtype), normal(16, 4096, 128)
        exact = W[:1].double() @ X[:1].double()
        for pieces in (2, 3):
            yield Case(
                "thin_matmul",
                f"16x4096x4096 {str(dtype).removeprefix('torch.')} l=128 W pieces={pieces}",
                lambda backend, W=W, X=X, p=pieces: ops.thin_matmul(
                    W, X, pieces=p, backend=backend
                ),
                2.0 * 16 * 4096 * 4096 * 128,
                16.0 * (W.element_size() * 4096 * 4096 + 8 * 4096 * 128),
                lambda C, exact=exact: relative(C[:1], exact),
            )


def block_cases() -> Iterator[Case]:
    for n in (4096, 11008):
        for l in WIDTHS:
            b = 16
            X = normal(b, n, l)
            R = torch.linalg.qr(normal(b, l, l)).Q
            exact = X[:1].double()
            for dtype in (torch.float32, torch.float64):
                yield Case(
                    "gram",
                    f"{b}x{n}x{l} {str(dtype).removeprefix('torch.')}",
                    lambda backend, X=X, d=dtype: ops.gram(X, dtype=d, backend=backend),
                    2.0 * b * n * l * l,
                    4.0 * b * n * l,
                    lambda G, e=exact: relative(G[:1], e.mT @ e),
                )
            yield Case(
                "rotate",
                f"{b}x{n}x{l}",
                lambda backend, X=X, R=R: ops.rotate(X, R, backend=backend),
                2.0 * b * n * l * l,
                8.0 * b * n * l,
                lambda C, e=exact, R=R: relative(C[:1], e @ R[:1].double()),
            )
            yield Case(
                "orthonormalize",
                f"{b}x{n}x{l}",
                lambda backend, X=X: ops.orthonormalize(X, backend=backend),
                4.0 * b * n * l * l,
                8.0 * b * n * l,
                orthogonality,
            )


def eigh_cases() -> Iterator[Case]:
    for l in WIDTHS:
        for b in (16, 128):
            X = normal(b, 2 * l, l)
            H = (X.mT @ X) / (2 * l)
            exact = torch.linalg.eigvalsh(H[:1].double()).flip(-1)
            yield Case(
                "symmetric_eigh",
                f"{b}x{l} float32",
                lambda backend, H=H: ops.symmetric_eigh(H, backend=backend),
                9.0 * b * l**3,
                8.0 * b * l * l,
                lambda found, e=exact: relative(found[0][:1], e),
            )


def ceilings() -> dict[str, float]:
    """Rates of this machine: the largest that the libraries reach on easy work."""
    big = normal(8192, 8192)
    half = big.bfloat16()
    source, target = torch.empty(2, 1 << 30, device="cuda").unbind()
    double = normal(4096, 4096).double()
    return {
        "bf16_tflops": 2 * 8192**3 / median_ms(lambda: half @ half) / 1e9,
        "fp32_tflops": 2 * 8192**3 / median_ms(lambda: big @ big) / 1e9,
        "fp64_tflops": 2 * 4096**3 / median_ms(lambda: double @ double) / 1e9,
        "copy_gbps": 8 * (1 << 30) / median_ms(lambda: target.copy_(source)) / 1e6,
    }


def truncation() -> dict[str, float]:
    """Signed relative error of tensor-core sums of one sign, by inner size: they truncate."""
    result = {}
    for n in (512, 4096, 11008):
        A = torch.rand(64, n, device="cuda").bfloat16()
        C = torch.mm(A, A.T, out_dtype=torch.float32).double()
        exact = A.double() @ A.double().T
        result[str(n)] = float(((C - exact) / exact).mean())
    return result


def widths() -> dict[str, float]:
    """Milliseconds of 16 products of 4096 x 4096 with l columns: what a piece or its twin costs."""
    W = normal(16, 4096, 4096).bfloat16()
    result = {}
    for l in (64, 96, 128, 192, 256, 384, 512, 768, 1024):
        X = normal(16, 4096, l).bfloat16()
        result[f"W l={l}"] = median_ms(lambda X=X: torch.bmm(W, X, out_dtype=torch.float32))
        result[f"W^T l={l}"] = median_ms(lambda X=X: torch.bmm(W.mT, X, out_dtype=torch.float32))
    return result


def kernel_times(run: Callable[[], object]) -> list[tuple[str, int, float]]:
    """(kernel, calls, microseconds a call) of one run, longest first."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        run()
        torch.cuda.synchronize()
    rows = [
        (e.key[:90], e.count, e.self_device_time_total / e.count)
        for e in prof.key_averages()
        if e.self_device_time_total > 0
    ]
    return sorted(rows, key=lambda row: -row[1] * row[2])


def machine() -> dict[str, object]:
    def commit() -> str:
        try:
            command = ["git", "rev-parse", "HEAD"]
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit(),
        "command": " ".join(sys.argv),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--only", nargs="*", help="names of ops; all of them if left out")
    parser.add_argument("--backends", nargs="*", default=BACKENDS)
    parser.add_argument("--profile", action="store_true", help="also print the kernels of each op")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    usable = {row.name for row in lorax_kernels.backends() if row.available}
    for row in lorax_kernels.backends():
        print(f"{row.name}: {'yes' if row.available else 'no'}, {row.reason}")
    report = {
        "machine": machine(),
        "ceilings": ceilings(),
        "truncation": truncation(),
        "widths_ms": widths(),
    }
    print(json.dumps({k: v for k, v in report.items() if k != "machine"}, indent=1))
    rows, profiles = [], {}
    for case in (c for make in (block_cases, eigh_cases, thin_cases) for c in make()):
        if arguments.only and case.op not in arguments.only:
            continue
        for backend in arguments.backends:
            if backend not in usable:
                continue
            if case.op == "gram" and backend == "triton" and "float64" in case.name:
                continue
            ms = median_ms(lambda case=case, backend=backend: case.run(backend))
            row = Row(
                case.op,
                case.name,
                backend,
                ms,
                case.flops / ms / 1e9,
                case.bytes / ms / 1e6,
                case.error(case.run(backend)),
            )
            rows.append(row)
            print(
                f"{row.op:15} {row.case:38} {row.backend:10} {row.ms:9.3f} ms "
                f"{row.tflops:7.1f} TFLOP/s {row.gbps:7.0f} GB/s  error {row.error:.1e}",
                flush=True,
            )
        if arguments.profile and "cuda" in usable:
            profiles[f"{case.op} {case.name}"] = kernel_times(lambda case=case: case.run("cuda"))
    report["rows"] = [asdict(row) for row in rows]
    report["kernels"] = profiles
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    for name in ("orthonormalize 16x4096x512", "orthonormalize 16x4096x128", "rotate 16x4096x512"):
        for kernel, calls, us in profiles.get(name, [])[:14]:
            print(f"{name:30} {calls:3} x {us:9.1f} us  {kernel}")


if __name__ == "__main__":
    main()
