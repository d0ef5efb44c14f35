# SPDX-License-Identifier: Apache-2.0
"""Bases for the layers of an adapter: all of them in one call, from a cache where there is one."""

from collections.abc import Sequence
from pathlib import Path

import torch

import lorax_kernels as lk
from lorax_transfer.adapters.lorax_form import TOLERANCE
from lorax_transfer.bases import BasisMaker


def bases_of(
    weights: Sequence[torch.Tensor],
    ranks: Sequence[int],
    energy: float | None = None,
    cache: Path | None = None,
) -> list[lk.SVD]:
    """Exact bases of weights.

    Args:
        weights: matrices `(m, n)`.
        ranks: directions to keep of each, at most that many where an energy decides.
        energy: share of each weight to keep, or None.
        cache: directory of bases to reuse and add to, or None.

    Returns:
        Bases in float32 on the weights' devices.
    """
    maker = BasisMaker(TOLERANCE, workspace=1 << 30, cache=cache, is_exact=True)
    return [basis.svd for basis in maker.make(weights, ranks, energy)]
