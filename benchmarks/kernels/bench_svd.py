# SPDX-License-Identifier: Apache-2.0
"""Truncated SVD of a whole model on a GPU, against every peer at equal accuracy.

    python benchmarks/kernels/bench_svd.py --output benchmarks/results/svd_h200.json

Case L7 is the 224 linear weights of Llama-2-7B's shapes in bfloat16 on the GPU; case SDXL the
linear shapes of SDXL's U-Net. Spectra: "pow" i^-0.5, "mp" Marchenko-Pastur with 32 outliers, "flat"
1 - 0.9 i/n with eight outliers. Matrices of one shape are distinct: a few random ones, multiplied
by random signs on both sides, which changes no singular value.

Peers run on one matrix of each shape and are scaled to the model by count; `svd_lowrank` is driven
until its error is that of ours, or its budget ends. Errors are `||V V^T - P||_F / ||P||_F` against
the eigenvectors of the float64 Gram matrix. The floor is the time of the products actually made, at
the bandwidth and matrix rate measured in the same run.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

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
DEVICE = torch.device("cuda")


def timed(call, repeats):
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), result


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


def exact_basis(W):
    """Eigenvectors of the short side's float64 Gram matrix."""
    W = W.double()
    G = W @ W.T if W.shape[0] < W.shape[1] else W.T @ W
    return torch.linalg.eigh(G).eigenvectors.flip(1)


def projector_error(V, P):
    V, P = V.double(), P.double()
    k = P.shape[1]
    squared = torch.linalg.matrix_norm(V.T @ V) ** 2 - 2 * torch.linalg.matrix_norm(V.T @ P) ** 2
    return float(((squared + k) / k).clamp_min(0).sqrt())


def short_side(svd, W):
    return svd[0] if W.shape[0] < W.shape[1] else svd[2]


def floor_ms(weights, results, width, ceiling):
    """Time of the products made, each the slower of its arithmetic and its reading of W."""
    total = 0.0
    for W, svd in zip(weights, results, strict=True):
        flops, size = 2 * W.numel() * width, 2 * W.numel()
        total += svd.passes * max(flops / ceiling["bf16_flops"], size / ceiling["bytes_per_s"])
    return total * 1e3


def ours(case, shapes, spectrum, rank, backend, repeats, ceiling, generator):
    from lorax_kernels._planning import plan

    weights = model(shapes, spectrum, rank, generator)

    def call():
        return truncated_svd(weights, rank, tol=2e-3, backend=backend)

    call()
    ms, results = timed(call, repeats)
    errors, seen = [], set()
    for W, svd in zip(weights, results, strict=True):
        if W.shape not in seen:
            seen.add(W.shape)
            basis = exact_basis(W)[:, :rank]
            errors.append(projector_error(short_side((svd.U, svd.S, svd.V), W), basis))
    m, n = weights[0].shape
    width = plan(m, n, rank, None, DEVICE, torch.bfloat16).width
    floor = floor_ms(weights, results, width, ceiling)
    row = {
        "case": case,
        "spectrum": spectrum,
        "rank": rank,
        "method": "lorax_kernels" if backend == "auto" else f"lorax_kernels[{backend}]",
        "ms": ms,
        "projector_error": max(errors),
        "estimated_error": max(svd.error for svd in results),
        "passes": max(svd.passes for svd in results),
        "mean_passes": statistics.fmean(svd.passes for svd in results),
        "exact_path": sum(svd.path == "exact" for svd in results),
        "width": width,
        "floor_ms": floor,
        "share_of_floor": floor / ms,
    }
    return row, weights, results


def svd_lowrank_driven(W, rank, target, basis, budget_ms):
    """torch.svd_lowrank with more and more iterations until its error is the target's."""
    q = min(int(1.6 * rank), *W.shape)
    best = None
    for niter in (2, 4, 8, 16, 32, 64):
        torch.manual_seed(0)
        ms, svd = timed(lambda n=niter: torch.svd_lowrank(W, q, niter=n), 1)
        error = projector_error(short_side(svd, W)[:, :rank], basis)
        best = (ms, error, niter)
        if error <= target or ms > budget_ms:
            break
    return best


def peers(case, shapes, spectrum, rank, target, budget_ms, generator):
    """Each peer on one matrix of every shape, scaled by count."""
    totals = {}
    for (m, n), count in shapes.items():
        W = matrix(NAMES[spectrum], m, n, rank, generator=generator, device=DEVICE)
        W = W.to(torch.bfloat16).float()
        basis = exact_basis(W)[:, :rank]
        gram = (lambda x: x @ x.T) if m < n else (lambda x: x.T @ x)
        calls = {
            "torch.linalg.eigh(fp32 Gram)": lambda W=W, g=gram: torch.linalg.eigh(g(W)),
            "torch.linalg.eigh(fp64 Gram)": lambda W=W, g=gram: torch.linalg.eigh(g(W.double())),
            "torch.linalg.svd": lambda W=W: torch.linalg.svd(W, full_matrices=False),
        }
        for name, call in calls.items():
            call()
            ms, found = timed(call, 1)
            V = (
                found.eigenvectors.flip(1)
                if "eigh" in name
                else short_side((found.U, found.S, found.Vh.T), W)
            )
            add(totals, name, count * ms, projector_error(V[:, :rank], basis))
        ms, error, niter = svd_lowrank_driven(W, rank, target, basis, budget_ms)
        add(totals, "torch.svd_lowrank", count * ms, error, niter)
    return [
        {"case": case, "spectrum": spectrum, "rank": rank, "method": name, "extrapolated": True}
        | entry
        for name, entry in totals.items()
    ]


def add(totals, name, ms, error, passes=0):
    entry = totals.setdefault(name, {"ms": 0.0, "projector_error": 0.0, "passes": 0})
    entry["ms"] += ms
    entry["projector_error"] = max(entry["projector_error"], error)
    entry["passes"] = max(entry["passes"], passes)


def warm(case, shapes, spectrum, rank, weights, before, cold_ms, generator):
    """The same model drifted by 1 % of its norm, started from its own bases of 1.5 k columns."""
    wide = truncated_svd(weights, rank * 3 // 2, tol=2e-2)
    drifted = []
    for W in weights:
        noise = torch.randn(W.shape, device=DEVICE, generator=generator)
        scale = 0.01 * torch.linalg.matrix_norm(W.float()) / torch.linalg.matrix_norm(noise)
        drifted.append((W.float() + scale * noise).to(W.dtype))
    truncated_svd(drifted[:2], rank, tol=2e-3, init=wide[:2])
    ms, results = timed(lambda: truncated_svd(drifted, rank, tol=2e-3, init=wide), 1)
    basis = exact_basis(drifted[0])[:, :rank]
    svd = results[0]
    return {
        "case": case,
        "spectrum": spectrum,
        "rank": rank,
        "method": "lorax_kernels warm start",
        "ms": ms,
        "projector_error": projector_error(short_side((svd.U, svd.S, svd.V), drifted[0]), basis),
        "passes": max(svd.passes for svd in results),
        "share_of_cold": ms / cold_ms,
    }


def show(row):
    more = "".join(
        f"  {key} {row[key]:.2f}" for key in ("share_of_floor", "share_of_cold") if key in row
    )
    print(
        f"{row['case']:5}{row['spectrum']:5}{row['rank']:4}  {row['method']:32}{row['ms']:11.1f} ms"
        f"  error {row['projector_error']:.1e}  passes {row['passes']}{more}",
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
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-warm", action="store_true")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator(DEVICE).manual_seed(0)
    ceiling, rows = ceilings(), []

    def keep(row):
        rows.append(row)
        show(row)
        save(arguments.output, rows, ceilings=ceiling)

    for case in arguments.case:
        shapes = CASES[case]
        for spectrum in arguments.spectrum:
            for rank in arguments.rank:
                auto = None
                for backend in arguments.backend:
                    repeats = arguments.repeats if backend == "auto" else 1
                    row, weights, results = ours(
                        case, shapes, spectrum, rank, backend, repeats, ceiling, generator
                    )
                    keep(row)
                    if backend == "auto":
                        auto = row
                        if spectrum == "pow" and rank == 320 and not arguments.no_warm:
                            keep(
                                warm(
                                    case,
                                    shapes,
                                    spectrum,
                                    rank,
                                    weights,
                                    results,
                                    row["ms"],
                                    generator,
                                )
                            )
                    del weights, results
                if auto and not arguments.no_peers:
                    budget = 400
                    target = auto["projector_error"]
                    for row in peers(case, shapes, spectrum, rank, target, budget, generator):
                        keep(row | {"times_ours": row["ms"] / auto["ms"]})


if __name__ == "__main__":
    main()
