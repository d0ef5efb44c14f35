# SPDX-License-Identifier: Apache-2.0
"""Which path a truncated SVD takes and how wide its block is: measured costs, nothing else."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Costs:
    """Rates of one kind of device, in floating-point operations per second.

    Attributes:
        thin: products of weights with a thin block.
        gram: products `W^T W` in float32, before symmetry halves them.
        gram64: the same in float64.
        eigh64: full symmetric eigendecomposition in float64, counted as `n^3`.
        small: orthonormalisation and small eigenproblems, counted as `n l^2`.
        align: block widths are rounded up to a multiple of this.
    """

    thin: float
    gram: float
    gram64: float
    eigh64: float
    small: float
    align: int


# Measured with benchmarks/kernels/bench_costs.py; only their ratios matter.
CPU = Costs(thin=80e9, gram=130e9, gram64=60e9, eigh64=4.5e9, small=15e9, align=8)
CUDA = Costs(thin=250e12, gram=300e12, gram64=40e12, eigh64=0.7e12, small=8e12, align=64)
# Degrees of the filter that a flat spectrum takes at the default width; a decaying one takes fewer,
# and is then cheap on either operator.
_DEGREE = 14


@dataclass(frozen=True)
class Plan:
    """How a stack of one shape is decomposed."""

    path: str
    width: int
    use_gram: bool


def plan(m: int, n: int, k: int, oversample: int | None, device: torch.device) -> Plan:
    """The cheaper path for `(m, n)` matrices at rank `k`.

    Args:
        m: rows.
        n: columns.
        k: rank.
        oversample: columns of the block beyond `k`; None for half of `k`, at least 16.
        device: where the matrices are.

    Returns:
        The path, and for the randomized one the block's width and the operator to iterate on.
    """
    costs = CPU if device.type == "cpu" else CUDA
    long, short = max(m, n), min(m, n)
    width = k + (max(16, k // 2) if oversample is None else oversample)
    if oversample is None:
        width = -(-width // costs.align) * costs.align
    if width >= short:
        return Plan("exact", short, False)
    exact = 2 * long * short**2 / costs.gram64 + short**3 / costs.eigh64
    on_weights = _DEGREE * 4 * long * short * width / costs.thin
    on_gram = 2 * long * short**2 / costs.gram
    on_gram += _DEGREE * 2 * short**2 * width / costs.thin
    around = _DEGREE * short * width**2 / costs.small
    if exact <= min(on_weights, on_gram) + around:
        return Plan("exact", short, False)
    return Plan("randomized", width, on_gram < on_weights)
