# SPDX-License-Identifier: Apache-2.0
"""Times the ops under the truncated SVD on one GPU: every backend, against this machine's ceilings.

    python benchmarks/kernels/bench_ops.py --output benchmarks/results/ops_h200.json

A row is the median over repeated calls and the spread between quartiles, timed with CUDA events
after a warm-up, on random data larger than the L2 cache, but for the single blocks of `cholesky_qr`
and `ritz`. Calls queue up behind an idle GPU's wait, so that times are the GPU's unless an op waits
for it. The floor is what this machine's copy bandwidth and bfloat16 rate, measured in the same run,
allow for the bytes and products that the op cannot do without; `share` is floor over time. Errors
are against float64 on the first matrix.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lorax_kernels
from benchmarks.record import save
from lorax_kernels import ops

BATCH, ROWS = 16, 4096
LONG = 11008  # the long side of an MLP's weights
WIDTHS = (128, 512)
BACKENDS = ("cuda", "triton", "reference")
# Longer than the host takes to queue 50 calls of an op of few kernels.
QUEUE_CYCLES = 40_000_000
# Off CUDA these are torch.linalg.eigh, which loops over the batch: seconds a call.
SLOW = {"symmetric_eigh"}


@dataclass
class Row:
    op: str
    case: str
    backend: str
    ms: float
    spread_ms: float
    floor_ms: float
    share: float
    error: float


@dataclass
class Case:
    op: str
    name: str
    run: Callable[..., Any]  # takes backend=
    flops: float  # on tensor cores, counting each piece that the accuracy asked for needs
    bytes: float  # inputs read once, outputs written once
    error: Callable[[Any], float]


def times_ms(run: Callable[[], object], budget_ms: float = 100.0) -> tuple[float, float]:
    """Median and quartile spread of 5 to 50 calls, as the budget allows; of one if over 0.3 s."""
    run()
    torch.cuda.synchronize()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    once = start.elapsed_time(stop)
    if once > 300:
        return once, 0.0
    count = int(min(50, max(5, budget_ms / max(once, 1e-3))))
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(count)
    ]
    torch.cuda._sleep(QUEUE_CYCLES)
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) for begin, end in events]
    low, median, high = statistics.quantiles(times, n=4)
    return median, high - low


def relative(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Of the first matrix of a batch."""
    return float((found[:1].double() - exact).norm() / exact.norm())


def part_error(index: int, exact: torch.Tensor, found: tuple[torch.Tensor, ...]) -> float:
    """Of one of several results."""
    return relative(exact, found[index])


def orthogonality(Q: torch.Tensor) -> float:
    Q = Q[:1].double()
    return float((Q.mT @ Q - torch.eye(Q.shape[2], device=Q.device)).abs().max())


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda")


def thin_cases() -> Iterator[Case]:
    b, n = BATCH, ROWS
    for dtype, all_pieces in (
        (torch.float16, (1, 2)),
        (torch.bfloat16, (1, 2, 3)),
        (torch.float32, (2,)),
    ):
        W = (normal(b, n, n) / n**0.5).to(dtype)
        for l in WIDTHS:
            # Columns of about unit length, as an iteration has them.
            X = normal(b, n, l) / n**0.5
            for transpose in (False, True):
                first = W[:1].double()
                exact = (first.mT if transpose else first) @ X[:1].double()
                for pieces in all_pieces:
                    products = pieces * (pieces + 1) // 2 if dtype == torch.float32 else pieces
                    yield Case(
                        "thin_matmul",
                        f"{b}x{n}x{n} {str(dtype)[6:]} l={l} {'W^T' if transpose else 'W'} "
                        f"pieces={pieces}",
                        partial(ops.thin_matmul, W, X, transpose=transpose, pieces=pieces),
                        2.0 * products * b * n * n * l,
                        b * (W.element_size() * n * n + 8.0 * n * l),
                        partial(relative, exact),
                    )


def normal_cases() -> Iterator[Case]:
    b, n = BATCH, ROWS
    # Entries as they are stacked for tensor cores, under 1/2.
    W = (normal(b, n, n) / 16).clamp(-0.49, 0.49).half()
    for l in WIDTHS:
        X = normal(b, n, l) / n**0.5
        for transpose in (False, True):
            first = W[:1].double().mT if transpose else W[:1].double()
            yield Case(
                "normal_matmul",
                f"{b}x{n}x{n} float16 l={l} {'W W^T' if transpose else 'W^T W'}",
                partial(ops.normal_matmul, W, X, transpose=transpose),
                4.0 * b * n * n * l,
                # The weights twice: they are larger than the cache.
                b * (4.0 * n * n + (4.0 + 2.0 + 2.0 + 4.0) * n * l),
                partial(relative, first.mT @ (first @ X[:1].double())),
            )


def block_cases() -> Iterator[Case]:
    b, n = BATCH, ROWS
    for l in WIDTHS:
        X = normal(b, n, l) / n**0.5
        R = torch.linalg.qr(normal(b, l, l)).Q
        Z, a = normal(b, n, l), normal(b)
        exact = X[:1].double()
        size, flops = 4.0 * b * n * l, 2.0 * b * n * l * l
        name = f"{b}x{n}x{l}"
        yield Case(
            "gram",
            name,
            partial(ops.gram, X),
            1.5 * flops,  # three products of pieces, each half a symmetric one
            size,
            partial(relative, exact.mT @ exact),
        )
        yield Case(
            "rotate",
            name,
            partial(ops.rotate, X, R),
            3 * flops,
            2 * size,
            partial(relative, exact @ R[:1].double()),
        )
        yield Case(
            "shift",
            name,
            partial(ops.shift, Z, X, a, a[:, None].expand(-1, l)),
            0.0,
            3 * size,
            partial(relative, (Z[:1].double() - a[0].double() * exact) * a[0].double()),
        )
        for quick in (False, True):
            yield Case(
                "orthonormalize",
                name + (" quick" if quick else ""),
                partial(ops.orthonormalize, X, quick=quick),
                4.5 * flops,
                2 * size,
                orthogonality,
            )
    W = (normal(b, n, n) / n**0.5).bfloat16()
    first = W[:1].double()
    yield Case(
        "gram",
        f"{b}x{n}x{n} bfloat16",
        partial(ops.gram, W),
        1.0 * b * n**3,
        b * (2.0 + 4.0) * n * n,
        partial(relative, first.mT @ first),
    )


def weighed_error(exact: torch.Tensor, pieces: torch.Tensor) -> float:
    """Of what two float16 pieces of a batch stand for."""
    high, low = pieces[:, :1].double()
    return relative(exact, high + low / 2**11)


def weight_cases() -> Iterator[Case]:
    """Weights on their way to tensor cores; square, of an MLP, and of one from its short side."""
    b, m, n = BATCH, LONG, ROWS
    for rows, flipped in ((n, False), (m, False), (m, True)):
        X = (normal(b, rows, n) / n**0.5).half()
        X = X.mT.contiguous().mT if flipped else X
        first = X[:1].double()
        yield Case(
            "gram_halves",
            f"{b}x{rows}x{n} float16" + (" columns apart" if flipped else ""),
            partial(ops.gram_halves, X),
            1.0 * b * rows * n**2,
            b * n * (2.0 * rows + 4.0 * n),
            partial(weighed_error, first.mT @ first),
        )
    for dtype in (torch.bfloat16, torch.float16):
        W = (normal(b, m, n) / n**0.5).to(dtype)
        matrices, exponents = [w.clone() for w in W], [3 - i % 4 for i in range(b)]
        yield Case(
            "stack_halves",
            f"{b}x{m}x{n} {str(dtype)[6:]}",
            partial(ops.stack_halves, matrices, exponents),
            0.0,
            4.0 * b * m * n,
            partial(part_error, 0, 8 * W[:1].double()),
        )


def eigh_cases() -> Iterator[Case]:
    for l in (128, 192, 256, 384, 512):
        for b in (16, 128):
            X = normal(b, 2 * l, l)
            H = (X.mT @ X) / (2 * l)
            diagonal = torch.linspace(2, 1, l, device="cuda").diag_embed()
            near = diagonal + 1e-4 * (H - H.diagonal(dim1=1, dim2=2).diag_embed())
            for name, M in (("Gram matrix", H), ("nearly diagonal", near)):
                exact = torch.linalg.eigvalsh(M[:1].double()).flip(-1)
                yield Case(
                    "symmetric_eigh",
                    f"{b}x{l} {name}",
                    partial(ops.symmetric_eigh, M),
                    0.0,
                    8.0 * b * l * l,
                    partial(part_error, 0, exact),
                )


def narrow_cases() -> Iterator[Case]:
    """Single blocks of a decaying spectrum, as `svd_lowrank` has them after two iterations."""
    for n in (512, 4096, 16384):
        A = normal(1, n, n) * torch.arange(1, n + 1, device="cuda") ** -0.5
        for l in (32, 64, 96):
            Q = normal(1, n, l)
            for transpose in (False, True, False, True, False):
                X = (A.mT if transpose else A) @ Q
                Q = ops.cholesky_qr(X)
            yield Case(
                "cholesky_qr",
                f"1x{n}x{l}",
                partial(ops.cholesky_qr, X),
                0.0,
                8.0 * n * l,
                orthogonality,
            )
            if l > 64:
                continue  # for LAPACK on the host
            B, k = A.mT @ Q, l - 16
            R = torch.linalg.qr(Q.double()).R
            rows = torch.linalg.solve_triangular(R.mT, B.double().mT, upper=False)
            exact = torch.linalg.svdvals(rows.cpu())[:, :k].cuda()
            yield Case(
                "ritz",
                f"1x{n}x{l} k={k}",
                partial(ops.ritz, Q, B, k),
                0.0,
                8.0 * n * (l + k),
                partial(part_error, 1, exact),
            )


MAKERS = (block_cases, weight_cases, narrow_cases, eigh_cases, thin_cases, normal_cases)


def ceilings() -> dict[str, float]:
    """Rates of this machine: the largest that the libraries reach on easy work."""
    big = normal(8192, 8192)
    half = big.bfloat16()
    source, target = torch.empty(2, 1 << 30, device="cuda").unbind()
    double = normal(4096, 4096).double()
    return {
        "bf16_tflops": 2 * 8192**3 / times_ms(lambda: half @ half)[0] / 1e9,
        "fp32_tflops": 2 * 8192**3 / times_ms(lambda: big @ big)[0] / 1e9,
        "fp64_tflops": 2 * 4096**3 / times_ms(lambda: double @ double)[0] / 1e9,
        "copy_gbps": 8 * (1 << 30) / times_ms(lambda: target.copy_(source))[0] / 1e6,
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


def kernel_times(run: Callable[[], object]) -> list[tuple[str, int, float]]:
    """(kernel, calls, microseconds a call) of one run, longest first."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as prof:
        run()
        torch.cuda.synchronize()
    rows = [
        (e.key[:90], e.count, e.self_device_time_total / e.count)
        for e in prof.key_averages()
        if e.self_device_time_total > 0
    ]
    return sorted(rows, key=lambda row: -row[1] * row[2])


def measure(case: Case, backend: str, limits: dict[str, float]) -> Row:
    ms, spread = times_ms(partial(case.run, backend=backend))
    floor = max(case.flops / limits["bf16_tflops"] / 1e9, case.bytes / limits["copy_gbps"] / 1e6)
    error = case.error(case.run(backend=backend))
    return Row(case.op, case.name, backend, ms, spread, floor, floor / ms, error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--only", nargs="*", help="names of ops; all of them if left out")
    parser.add_argument("--backends", nargs="*", default=BACKENDS)
    parser.add_argument("--profile", action="store_true", help="also the kernels of each call")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    usable = {row.name for row in lorax_kernels.backends() if row.available}
    limits = ceilings()
    print(json.dumps(limits))
    rows, profiles = [], {}
    for case in (c for make in MAKERS for c in make()):
        if arguments.only and case.op not in arguments.only:
            continue
        for backend in arguments.backends:
            if backend not in usable or (case.op in SLOW and backend != "cuda"):
                continue
            row = measure(case, backend, limits)
            rows.append(asdict(row))
            print(
                f"{row.op:15} {row.case:44} {row.backend:10} {row.ms:9.3f} ms "
                f"+-{row.spread_ms:.3f}  floor {row.floor_ms:7.3f} ({row.share:4.0%})  "
                f"error {row.error:.1e}",
                flush=True,
            )
        if arguments.profile and "cuda" in usable:
            profiles[f"{case.op} {case.name}"] = kernel_times(partial(case.run, backend="cuda"))
    save(arguments.output, rows, ceilings=limits, truncation=truncation(), kernels=profiles)


if __name__ == "__main__":
    main()
