# SPDX-License-Identifier: Apache-2.0
"""Which path a truncated SVD takes and how wide its block is: measured costs, nothing else."""

import math
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
CUDA = Costs(thin=480e12, gram=700e12, exact_gram=58e12, eigh=0.55e12, block=2.8e12)
# Degrees of the filter for the spectrum of a trained weight: square ones are those of attention,
# the others belong to MLPs and are flatter (12 and 17 on average in SmolLM2-135M at rank 64).
_DEGREE = 12
_DEGREE_OBLONG = 16
# Degrees that cost as much as a look.
_LOOK = 4
# On a GPU, where a Gram matrix may also be formed once its use is known: degrees that even a steep
# spectrum takes, and products that are worth it at most, those in two pieces counted twice.
_FEWEST = 8
_MOST = 24
# Steps of the block that `_DEGREE` degrees take.
_BLOCK_STEPS = 15


@dataclass(frozen=True)
class Plan:
    """How a stack of one shape is decomposed.

    Attributes:
        path: "randomized" or "exact".
        width: columns of the block.
        use_gram: filter with the Gram matrix instead of the weights from the start.
        max_passes: products after which the exact path would have been cheaper.
        gram_from: degrees left, those in two pieces counted twice, from which it pays later on.
    """

    path: str
    width: int
    use_gram: bool
    max_passes: int = 64
    gram_from: float = math.inf


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
    by_weights = pieces * 4 * long * short * width / costs.thin
    by_gram = 2 * short**2 * width / costs.thin
    forming = 2 * long * short**2 / costs.gram
    # In two pieces a product with weights costs twice as much, with a Gram matrix three times.
    saved = by_weights - (1.5 if halves else 1.0) * by_gram
    pays = forming / saved if saved > 0 else math.inf
    # In float16 sums of more squares than this leave its range.
    gram_from = pays if halves and pays <= _MOST and long <= 1 << 17 else math.inf
    use_gram = gram_from <= min(_FEWEST, degree) if halves else pays < degree
    iterating = degree * (by_gram if use_gram else by_weights)
    if halves and use_gram:
        # A look stays with the weights, and in two pieces it costs as much as four degrees.
        iterating += _LOOK * by_weights
    block = _BLOCK_STEPS * min(degree / _DEGREE, 1) * short * width**2 / costs.block
    if exact <= iterating + use_gram * forming + block:
        return Plan("exact", short, False)
    passes = int(2 * degree * exact / (iterating + block))
    return Plan("randomized", width, use_gram, min(max(passes, 40), 200), gram_from)
