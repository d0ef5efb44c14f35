# SPDX-License-Identifier: Apache-2.0
"""Which path a truncated SVD takes and how wide its block is: measured costs, nothing else."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Costs:
    """Rates of one kind of device, in operations per second.

    Attributes:
        thin: products of weights with a thin block, `2 m n l` operations.
        gram: Gram matrices in the precision of the filter, `2 m n^2`.
        exact_gram: the same in the precision of the exact path.
        eigh: full symmetric eigendecomposition in that precision, counted as `n^3`.
        block: what is done to the block between products (orthonormalisation, small
            eigenproblems), counted as `n l^2` for each of `_BLOCK_STEPS`.
    """

    thin: float
    gram: float
    exact_gram: float
    eigh: float
    block: float


# benchmarks/kernels/bench_costs.py measures them and shows where a plan is wrong.
CPU = Costs(thin=62e9, gram=95e9, exact_gram=95e9, eigh=8.4e9, block=4.9e9)
CUDA = Costs(thin=550e12, gram=600e12, exact_gram=60e12, eigh=0.6e12, block=6e12)
# Degrees of the filter for the spectrum of a trained weight: square ones are those of attention,
# the others belong to MLPs and are flatter (12 and 17 on average in SmolLM2-135M at rank 64).
_DEGREE = 12
_DEGREE_OBLONG = 16
# Degrees that cost as much as a look.
_LOOK = 4
# Steps of the block that `_DEGREE` degrees take.
_BLOCK_STEPS = 15


@dataclass(frozen=True)
class Plan:
    """How a stack of one shape is decomposed.

    Attributes:
        path: "randomized" or "exact".
        width: columns of the block.
        use_gram: filter with the Gram matrix instead of the weights.
        max_passes: products after which the exact path would have been cheaper.
    """

    path: str
    width: int
    use_gram: bool
    max_passes: int = 64


def _width(k: int, device: torch.device) -> int:
    """Columns of the block: half as many again as wanted, which minimises columns times degrees."""
    width = k + max(16, k // 2)
    if device.type == "cpu":
        return -(-width // 8) * 8
    # On a GPU a product costs the same up to 192 columns, where reading the weights bounds it, and
    # batched eigensolvers turn slow beyond 256.
    return next((w for w in (192, 256) if width <= w), -(-width // 64) * 64)


def plan(
    m: int,
    n: int,
    k: int,
    oversample: int | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    max_passes: int | None = None,
) -> Plan:
    """The cheaper path for `(m, n)` matrices at rank `k`.

    Args:
        m: rows.
        n: columns.
        k: rank.
        oversample: columns of the block beyond `k`; None chooses them.
        device: where the matrices are.
        dtype: of the matrices.
        max_passes: the caller's budget; a small one makes the randomized path cheaper.

    Returns:
        The path, and for the randomized one the block's width and the operator to iterate on.
    """
    costs = CPU if device.type == "cpu" else CUDA
    long, short = max(m, n), min(m, n)
    width = _width(k, device) if oversample is None else k + oversample
    if width >= short:
        return Plan("exact", short, False)
    exact = 2 * long * short**2 / costs.exact_gram + short**3 / costs.eigh
    # On tensor cores whatever is not 16 bits wide is multiplied in two pieces.
    halves = device.type != "cpu"
    pieces = 2 if halves and dtype.itemsize > 2 else 1
    degree: float = _DEGREE if long == short else _DEGREE_OBLONG
    if max_passes is not None:
        degree = min(degree, max_passes / 2)
    on_weights = degree * pieces * 4 * long * short * width / costs.thin
    on_gram = degree * 2 * short**2 * width / costs.thin
    if halves:
        # A look stays with the weights, and in two pieces it costs as much as four degrees.
        on_gram += on_weights * _LOOK / degree
    forming = 2 * long * short**2 / costs.gram
    block = _BLOCK_STEPS * min(degree / _DEGREE, 1) * short * width**2 / costs.block
    # In float16 sums of more squares than this leave its range.
    use_gram = forming + on_gram < on_weights and not (halves and long > 1 << 17)
    iterating = on_gram if use_gram else on_weights
    if exact <= iterating + use_gram * forming + block:
        return Plan("exact", short, False)
    passes = int(2 * degree * exact / (iterating + block))
    return Plan("randomized", width, use_gram, min(max(passes, 40), 200))
