# SPDX-License-Identifier: Apache-2.0
"""What a truncated SVD on a GPU is compared with: torch's decompositions and cuSOLVER's own.

Each runs on one matrix of every shape and is scaled to the model by count. A whole decomposition is
timed once it is warm, or at once where the first call was beyond the budget, and judged at every
rank. A randomized one is driven until its error is the target's or its budget ends: twice the
iterations each time, and twice the width of the block where they no longer help.
"""

import functools
import math

import torch

from benchmarks.kernels.cusolver_peers import Cusolver
from benchmarks.kernels.svd_judge import (
    DEVICE,
    exact_basis,
    failed,
    projector_error,
    short_side,
    timed,
)
from lorax_kernels.testing import matrix


def gram(W):
    return W @ W.T if W.shape[0] < W.shape[1] else W.T @ W


def eigenvectors(G, W):
    V = torch.linalg.eigh(G).eigenvectors.flip(1)
    return (V, None, None) if W.shape[0] < W.shape[1] else (None, None, V)


def torch_svd(W):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U, S, Vh.T


def svd_lowrank(W, rank, width, iterations):
    torch.manual_seed(0)
    return torch.svd_lowrank(W, width, niter=iterations)


cusolver = functools.cache(Cusolver)
WHOLE = {
    "torch.linalg.eigh(fp32 Gram)": lambda W: eigenvectors(gram(W), W),
    "torch.linalg.eigh(fp64 Gram)": lambda W: eigenvectors(gram(W.double()), W),
    "torch.linalg.svd": torch_svd,
    "cusolverDnXgesvdp": lambda W: cusolver().polar(W),
}
DRIVEN = {
    "torch.svd_lowrank": svd_lowrank,
    "cusolverDnXgesvdr": lambda W, rank, width, iterations: cusolver().randomized(
        W, rank, width - rank, iterations
    ),
}
LIBRARIES = {
    library: [name for name in (*WHOLE, *DRIVEN) if name.startswith(library)]
    for library in ("torch", "cusolver")
}


@functools.cache
def sample(spectrum, m, n):
    """A matrix and its exact basis, the same for every rank and peer."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    W = matrix(spectrum, m, n, 0, generator=generator, device=DEVICE).to(torch.bfloat16).float()
    return W, exact_basis(W)


@functools.cache
def whole(name, spectrum, m, n, budget_ms):
    """Milliseconds and all vectors of the short side."""
    call, (W, _) = WHOLE[name], sample(spectrum, m, n)
    call(W[:64, :64].clone())  # loads what the library loads once
    ms, svd = timed(lambda: call(W), 1)
    if ms < budget_ms:
        ms, svd = timed(lambda: call(W), 1)
    return ms, short_side(svd, W).clone()


def driven(name, spectrum, m, n, rank, target, budget_ms):
    """Milliseconds, error and iterations of the first try that reached the target, or the best."""
    call, (W, basis) = DRIVEN[name], sample(spectrum, m, n)
    call(W[:64, :64].clone(), 8, 12, 2)
    width, before, best = int(1.6 * rank), math.inf, (0.0, math.inf, 0)
    for iterations in (2, 4, 8, 16, 32, 64):
        width = min(width, *W.shape)
        ms, svd = timed(lambda i=iterations, w=width: call(W, rank, w, i), 1)
        error = projector_error(short_side(svd, W)[:, :rank], basis[:, :rank])
        if error < best[1]:
            best = (ms, error, iterations)
        if error <= target or ms > budget_ms:
            break
        if not error < 0.9 * before:
            width *= 2
        before = error
    return best


def measure(name, shapes, spectrum, rank, target, budget_ms):
    """One peer's row; that it failed, and why, is a row too."""
    row = {"method": name, "extrapolated": True, "ms": 0.0, "projector_error": 0.0, "passes": 0}
    for (m, n), count in shapes.items():
        try:
            if name in WHOLE:
                ms, V = whole(name, spectrum, m, n, budget_ms)
                error = projector_error(V[:, :rank], sample(spectrum, m, n)[1][:, :rank])
                passes = 0
            else:
                ms, error, passes = driven(name, spectrum, m, n, rank, target, budget_ms)
            if not math.isfinite(error):
                raise RuntimeError("results are not finite")
        except Exception as problem:  # whatever it is, the other rows are still wanted
            return failed(name, problem, f"{m} x {n}: ")
        row["ms"] += count * ms
        row["projector_error"] = max(row["projector_error"], error)
        row["passes"] = max(row["passes"], passes)
    return row
