# SPDX-License-Identifier: Apache-2.0
"""Times `svd_product` of a whole adapter against torch.linalg.svd of the dense products.

    PYTHONPATH=.:python python benchmarks/kernels/bench_product.py --output rows.json
    PYTHONPATH=.:python python benchmarks/kernels/bench_product.py --device cpu

On a GPU: every layer of a Llama-2-7B-shaped adapter in one call; the dense SVD is measured on one
4096 x 4096 layer and `dense_ms` is that times the number of layers, an extrapolation. On a CPU: one
such layer by both. `error` is the largest distance of a singular value from float64's, over the
largest one; `orthogonality` the largest entry of U^T U - I.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import lorax_kernels as lk
from benchmarks.record import save

# (out, in) of every layer that takes an adapter.
LLAMA_7B = ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]) * 32


def milliseconds(run: Callable[[], object], device: str, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def factors(shapes, r: int, device: str, spread: float):
    """Gaussian factors, B's columns scaled by 10^-spread to 10^spread."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    scale = 10.0 ** torch.linspace(-spread, spread, r, device=device)
    return [normal(m, r) * scale for m, _ in shapes], [normal(r, n) for _, n in shapes]


def errors(svd, B: torch.Tensor, A: torch.Tensor) -> tuple[float, float]:
    """Against float64: QR of both factors, then LAPACK's SVD of the small matrix, on the CPU."""
    R_B = torch.linalg.qr(B.double().cpu()).R
    R_A = torch.linalg.qr(A.double().cpu().mT).R
    exact = torch.linalg.svdvals(R_B @ R_A.mT)
    U = svd.U.double()
    eye = torch.eye(U.shape[1], device=U.device)
    return (
        float((svd.S.double().cpu() - exact).abs().max() / exact[0]),
        float((U.mT @ U - eye).abs().max()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = arguments.device
    shapes = LLAMA_7B if device == "cuda" else [(4096, 4096)]
    B, A = factors([(4096, 4096)], 16, device, 0)
    dense = B[0] @ A[0]
    if device == "cuda":
        torch.linalg.svd(dense[:64, :64])  # loads the solver
    one_ms = milliseconds(lambda: torch.linalg.svd(dense, full_matrices=False), device, 1)
    rows = []
    for r, spread in ((16, 0), (64, 0), (64, 6), (128, 0)) if device == "cuda" else ((16, 0),):
        B, A = factors(shapes, r, device, spread)
        results = lk.svd_product(B, A)
        sample = range(0, len(B), max(1, len(B) // 8))
        found = [errors(results[i], B[i], A[i]) for i in sample]
        rows.append(
            {
                **{"case": "L7" if device == "cuda" else "4096x4096", "layers": len(B), "r": r},
                **{"device": device, "column_spread": spread},
                "ms": milliseconds(partial(lk.svd_product, B, A), device, 5),
                "dense_one_layer_ms": one_ms,
                "dense_ms": one_ms * len(B),
                "error": max(e for e, _ in found),
                "orthogonality": max(o for _, o in found),
            }
        )
        print(rows[-1])
    if arguments.output:
        save(arguments.output, rows)


if __name__ == "__main__":
    main()
