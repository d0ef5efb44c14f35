# SPDX-License-Identifier: Apache-2.0
"""Truncated SVD of a whole model on a GPU, against every peer at equal accuracy.

    python benchmarks/kernels/bench_svd.py --output benchmarks/results/svd_h200.json

Case L7 is the 224 linear weights of Llama-2-7B's shapes in bfloat16 on the GPU; case SDXL the
linear shapes of SDXL's U-Net. Spectra: "pow" i^-0.5, "mp" Marchenko-Pastur with 32 outliers, "flat"
1 - 0.9 i/n with eight outliers. Matrices of one shape are distinct: a few random ones, multiplied
by random signs on both sides, which changes no singular value.

Peers (svd_peers.py) run on one matrix of each shape and are scaled to the model by count. Those of
cuSOLVER, called past torch, come after everything else, so that a crash in them costs no row; rows
are saved as they are made. Errors are `||V V^T - P||_F / ||P||_F` against the eigenvectors of the
float64 Gram matrix. The floor is the time of the products actually made (svd_products.py), at the
bandwidth and matrix rate measured in the same run.
"""

import argparse
import itertools
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kernels.svd_judge import (
    DEVICE,
    exact_basis,
    failed,
    projector_error,
    short_side,
    timed,
)
from benchmarks.kernels.svd_peers import LIBRARIES, measure
from benchmarks.kernels.svd_products import counted
from benchmarks.record import save
from lorax_kernels import truncated_svd
from lorax_kernels.testing import matrix

NAMES = {"pow": "power", "mp": "marchenko_pastur", "flat": "flat"}
L7 = {(4096, 4096): 128, (11008, 4096): 64, (4096, 11008): 32}
SDXL = {
    (640, 640): 50,
    (5120, 640): 10,
    (640, 2560): 10,
    (640, 2048): 20,
    (1280, 1280): 300,
    (1280, 2048): 120,
    (10240, 1280): 60,
    (1280, 5120): 60,
}
CASES = {"L7": L7, "SDXL": SDXL}


def ceilings():
    a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    block = torch.empty(2**30, device=DEVICE, dtype=torch.int32)
    other = torch.empty_like(block)
    product = statistics.median(timed(lambda: a @ a, 1)[0] for _ in range(12))
    copy = statistics.median(timed(lambda: other.copy_(block), 1)[0] for _ in range(12))
    return {
        "bf16_flops": 2 * 8192**3 / product * 1e3,
        "bytes_per_s": 2 * 4 * 2**30 / copy * 1e3,
    }


def signs(W, generator):
    left = torch.randint(0, 2, (W.shape[0], 1), device=DEVICE, generator=generator) * 2 - 1
    right = torch.randint(0, 2, (1, W.shape[1]), device=DEVICE, generator=generator) * 2 - 1
    return W * left.to(W.dtype) * right.to(W.dtype)


def model(shapes, spectrum, rank, generator):
    """Distinct weights of every shape, in the order of a model's layers."""
    weights = []
    for (m, n), count in shapes.items():
        W = matrix(NAMES[spectrum], m, n, rank, generator=generator, device=DEVICE)
        W = W.to(torch.bfloat16)
        weights += [signs(W, generator) for _ in range(count)]
    return weights


def ours(shapes, spectrum, rank, backend, repeats, ceiling, generator):
    from lorax_kernels._planning import plan

    weights = model(shapes, spectrum, rank, generator)

    def call(some=weights):
        return truncated_svd(some, rank, tol=2e-3, backend=backend)

    # Plain torch compiles nothing, so one matrix of every shape warms it.
    call(list({W.shape: W for W in weights}.values()) if backend == "reference" else weights)
    ms, results = timed(call, repeats)
    held = sum(t.nbytes for svd in results for t in (svd.U, svd.S, svd.V))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with counted(ceiling) as products:
        call()
    extra = torch.cuda.max_memory_allocated() - before - held
    errors, seen = [], set()
    for W, svd in zip(weights, results, strict=True):
        if W.shape not in seen:
            seen.add(W.shape)
            basis = exact_basis(W)[:, :rank]
            errors.append(projector_error(short_side((svd.U, svd.S, svd.V), W), basis))
    m, n = weights[0].shape
    width = plan(m, n, rank, None, DEVICE, torch.bfloat16).width
    floor = products.seconds * 1e3
    row = {
        "method": "lorax_kernels" if backend == "auto" else f"lorax_kernels[{backend}]",
        "ms": ms,
        "projector_error": max(errors),
        "estimated_error": max(svd.error for svd in results),
        "passes": max(svd.passes for svd in results),
        "mean_passes": statistics.fmean(svd.passes for svd in results),
        "exact_path": sum(svd.path == "exact" for svd in results),
        "width": width,
        "tflop": products.flops / 1e12,
        "gbyte": products.size / 1e9,
        "extra_bytes": extra,
        "floor_ms": floor,
        "share_of_floor": floor / ms,
    }
    return row, weights


def warm(rank, weights, cold_ms, repeats, generator):
    """The same model drifted by 1 % of its norm, started from its own bases of 1.5 k columns."""
    wide = truncated_svd(weights, rank * 3 // 2, tol=2e-2)
    drifted = []
    for W in weights:
        noise = torch.randn(W.shape, device=DEVICE, generator=generator)
        scale = 0.01 * torch.linalg.matrix_norm(W.float()) / torch.linalg.matrix_norm(noise)
        drifted.append((W.float() + scale * noise).to(W.dtype))
    truncated_svd(drifted, rank, tol=2e-3, init=wide)
    ms, results = timed(lambda: truncated_svd(drifted, rank, tol=2e-3, init=wide), repeats)
    basis = exact_basis(drifted[0])[:, :rank]
    svd = results[0]
    return {
        "method": "lorax_kernels warm start",
        "ms": ms,
        "projector_error": projector_error(short_side((svd.U, svd.S, svd.V), drifted[0]), basis),
        "passes": max(svd.passes for svd in results),
        "share_of_cold": ms / cold_ms,
    }


def show(row):
    head = f"{row['case']:5}{row['spectrum']:5}{row['rank']:4}  {row['method']:32}"
    if "failed" in row:
        print(f"{head}failed: {row['failed']}", flush=True)
        return
    ratios = ("share_of_floor", "share_of_cold", "times_ours")
    more = "".join(f"  {key} {row[key]:.2f}" for key in ratios if key in row)
    print(
        f"{head}{row['ms']:11.1f} ms  error {row['projector_error']:.1e}  passes {row['passes']}"
        f"{more}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="svd.json")
    parser.add_argument("--case", nargs="+", default=["L7", "SDXL"], choices=CASES)
    parser.add_argument("--spectrum", nargs="+", default=["pow", "mp", "flat"], choices=NAMES)
    parser.add_argument("--rank", nargs="+", type=int, default=[320, 64])
    parser.add_argument("--backend", nargs="+", default=["auto", "triton", "reference"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=["torch", "cusolver"], choices=LIBRARIES)
    parser.add_argument("--budget", type=float, default=400, help="ms of one call of a peer")
    parser.add_argument("--no-warm", action="store_true")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator(DEVICE).manual_seed(0)
    ceiling, rows, autos = ceilings(), [], {}

    def keep(setting, row):
        row = dict(zip(("case", "spectrum", "rank"), setting, strict=True)) | row
        if setting in autos and "ms" in row and "share_of_cold" not in row:
            row["times_ours"] = row["ms"] / autos[setting]["ms"]
        rows.append(row)
        show(row)
        save(arguments.output, rows, ceilings=ceiling)

    def compare(setting, library):
        case, spectrum, rank = setting
        target = autos[setting]["projector_error"]
        for name in LIBRARIES[library]:
            row = measure(name, CASES[case], NAMES[spectrum], rank, target, arguments.budget)
            keep(setting, row)

    for setting in itertools.product(arguments.case, arguments.spectrum, arguments.rank):
        case, spectrum, rank = setting
        for backend in sorted(arguments.backend, key="auto".__ne__):
            repeats = arguments.repeats if backend == "auto" else 1
            try:
                row, weights = ours(
                    CASES[case], spectrum, rank, backend, repeats, ceiling, generator
                )
            except Exception as problem:  # the peers are still wanted
                if backend == "auto":
                    raise
                keep(setting, failed(f"lorax_kernels[{backend}]", problem))
                continue
            keep(setting, row)
            if backend == "auto":
                autos[setting] = row
                if rank == 320 and not arguments.no_warm:
                    keep(setting, warm(rank, weights, row["ms"], repeats, generator))
            del weights
        if setting in autos and "torch" in arguments.peers:
            compare(setting, "torch")
    if "cusolver" in arguments.peers:
        for setting in autos:
            compare(setting, "cusolver")


if __name__ == "__main__":
    main()
