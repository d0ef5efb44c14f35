# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: T201
"""A LoRA-X transfer in plain PyTorch, and what it takes to put this package behind it.

    python examples/plain_torch_lorax.py [--layers 6] [--size 768] [--rank 64]

The first half is a script as one finds them: a loop over layers, a full SVD of every target weight,
a projection of the adapter. Its author has to accept one thing, a backend with two functions (the
protocol of docs/doors.md). `LoraxKernels` is that backend, and all there is to plugging in.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import lorax_kernels as lk
from lorax_kernels.testing import matrix

Factors = tuple[torch.Tensor, torch.Tensor]  # lora_B (m, r) and lora_A (r, n)


# The script: this much exists before anybody has heard of a backend.
class Basis(NamedTuple):
    """Leading singular vectors of a weight `(m, n)`."""

    U: torch.Tensor  # (m, k)
    V: torch.Tensor  # (n, k)


class PlainTorch:
    """What the script does by itself."""

    def bases(self, weights: Sequence[torch.Tensor], rank: int) -> list[Basis]:
        """The leading singular vectors of every weight."""
        found = []
        for W in weights:
            U, _, Vh = torch.linalg.svd(W.float(), full_matrices=False)
            found.append(Basis(U[:, :rank], Vh[:rank].T))
        return found

    def project(self, adapter: Sequence[Factors], bases: Sequence[Basis]) -> list[Factors]:
        """`B -> U (U^T B)` and `A -> (A V) V^T` in every layer."""
        return [
            (x.U @ (x.U.T @ B), (A @ x.V) @ x.V.T) for (B, A), x in zip(adapter, bases, strict=True)
        ]


def transfer(
    adapter: list[Factors], target: list[torch.Tensor], rank: int, backend: Any
) -> list[Factors]:
    """Moves an adapter onto the target's weights."""
    return backend.project(adapter, backend.bases(target, rank))


# The plug: these lines are all that is new.
class LoraxKernels:
    """The same two functions, by this package."""

    def bases(self, weights: Sequence[torch.Tensor], rank: int) -> list[lk.SVD]:
        """All layers at once, each to a projector error of 1e-3."""
        return lk.truncated_svd(list(weights), rank)

    def project(self, adapter: Sequence[Factors], bases: Sequence[lk.SVD]) -> list[Factors]:
        """All layers in one launch where there is a GPU."""
        B, A = zip(*adapter, strict=True)
        return list(zip(*lk.transfer_lora(B, A, bases), strict=True))


def main() -> None:
    """Run the script with either backend and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--rank", type=int, default=64)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, generator = options.size, torch.Generator(device).manual_seed(0)
    shapes = [(n, n), (4 * n, n)] * (options.layers // 2) + [(n, n)] * (options.layers % 2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    target = [matrix("power", m, n, 64, generator=generator, device=device) for m, n in shapes]
    adapter = [(random(m, 16), random(16, n)) for m, n in shapes]
    results, times = [], []
    for backend in (PlainTorch(), LoraxKernels()):
        transfer(adapter[:2], target[:2], options.rank, backend)  # warms up
        start = time.perf_counter()
        results.append(transfer(adapter, target, options.rank, backend))
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    worst = max(
        float(torch.linalg.norm(B @ A - B0 @ A0) / torch.linalg.norm(B0 @ A0))
        for (B0, A0), (B, A) in zip(*results, strict=True)
    )
    print(f"{len(shapes)} layers on {device}: {times[0]:.2f} s before, {times[1]:.2f} s after")
    print(f"largest relative difference of an update: {worst:.1e}")


if __name__ == "__main__":
    main()
