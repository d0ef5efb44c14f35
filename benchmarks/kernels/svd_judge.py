# SPDX-License-Identifier: Apache-2.0
"""How a truncated SVD on a GPU is timed and judged, whoever computed it."""

import statistics
import time

import torch

DEVICE = torch.device("cuda")


def timed(call, repeats):
    """Median milliseconds and the last result."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), result


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


def failed(method, problem, where=""):
    """The row of what could not be timed."""
    return {"method": method, "failed": where + (str(problem) or repr(problem)).splitlines()[0]}


def short_side(svd, W):
    return svd[0] if W.shape[0] < W.shape[1] else svd[2]
