# SPDX-License-Identifier: Apache-2.0
"""Rates behind `lorax_kernels._planning`: what the two paths of the truncated SVD cost here.

    python benchmarks/kernels/bench_costs.py [--device cuda] [--output FILE.json]

Prints the operations per second of each building block, and for a grid of shapes and ranks the time
of both paths and the one that the plan takes, so that a wrong choice shows.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.record import save
from lorax_kernels import ConvergenceWarning, ops, truncated_svd
from lorax_kernels import svd as svd_module
from lorax_kernels._planning import Plan, plan
from lorax_kernels.testing import matrix

GRID = [(384, 384), (1536, 384), (576, 576), (1536, 576), (1536, 1536), (8960, 1536)]
GPU_GRID = [(640, 640), (5120, 640), (1280, 1280), (10240, 1280), (2048, 2048), (4096, 4096)]
RANKS = (16, 64, 128, 320)


def best(call, device, repeats=3):
    """Shortest of a few runs: what the machine can do when nothing disturbs it."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def rates(device):
    """Operations per second of each block, at a middling size."""
    batch, m, n, l = (16, 8192, 2048, 256) if device.type == "cuda" else (1, 2048, 768, 96)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    W = torch.randn(batch, m, n, device=device, dtype=dtype)
    X = torch.randn(batch, n, l, device=device) / n**0.5
    G = ops.gram(W[:1], dtype=torch.float64).repeat(batch, 1, 1)
    return {
        "thin": batch * 2 * m * n * l / best(lambda: ops.thin_matmul(W, X, pieces=1), device),
        "gram": batch * 2 * m * n**2 / best(lambda: ops.gram(W), device),
        "gram64": batch * 2 * m * n**2 / best(lambda: ops.gram(W, dtype=torch.float64), device),
        "eigh32": batch * n**3 / best(lambda: ops.symmetric_eigh(G.float()), device, 1),
        "eigh64": batch * n**3 / best(lambda: ops.symmetric_eigh(G), device, 1),
        "small": batch * n * l**2 / best(lambda: ops.orthonormalize(X), device),
    }


def crossover(device, shape, rank):
    """Milliseconds a matrix of either path, over three spectra, and of torch.linalg.svd."""
    m, n = shape
    copies = 8 if device.type == "cuda" else 1
    Ws = [
        matrix(spectrum, m, n, rank, device=device)
        for spectrum in ("power", "flat", "marchenko_pastur")
    ] * copies
    taken = plan(m, n, rank, None, device)
    width = min(taken.width if taken.path == "randomized" else rank * 3 // 2, n - 1)
    row = {"shape": [m, n], "rank": rank, "plan": taken.path, "use_gram": taken.use_gram}
    alternatives = {
        "exact": Plan("exact", n, False),
        "on_weights": Plan("randomized", width, False),
        "on_gram": Plan("randomized", width, True),
    }
    for name, forced in alternatives.items():
        if width <= rank and name != "exact":
            continue
        svd_module.plan = lambda *_, forced=forced: forced
        seconds = best(lambda: truncated_svd(Ws, rank, tol=2e-3, max_passes=64), device, 2)
        row[name] = seconds * 1e3 / len(Ws)
    svd_module.plan = plan
    if n <= 1600:
        alone = Ws[:3]
        seconds = best(lambda: [torch.linalg.svd(W, full_matrices=False) for W in alone], device, 1)
        row["torch.linalg.svd"] = seconds * 1e3 / len(alone)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output")
    parser.add_argument("--rates-only", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    device = torch.device(arguments.device)
    found = rates(device)
    print("  ".join(f"{name} {rate:.2e}" for name, rate in found.items()), flush=True)
    rows = []
    for shape in () if arguments.rates_only else GPU_GRID if device.type == "cuda" else GRID:
        for rank in RANKS:
            if rank < shape[1]:
                rows.append(crossover(device, shape, rank))
                print(
                    "  ".join(
                        f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}"
                        for key, value in rows[-1].items()
                    ),
                    flush=True,
                )
    if arguments.output:
        save(arguments.output, rows, rates=found)


if __name__ == "__main__":
    main()
