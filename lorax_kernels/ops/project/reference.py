# SPDX-License-Identifier: Apache-2.0
"""Projection of LoRA factors onto bases, in plain PyTorch."""

import torch

# For fewer columns than this, MKL's `Q^T B` takes three to eight times as long as `B^T Q`.
_NARROW = 12


def _whole(basis: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A basis as one matrix, also where it came in two pieces."""
    basis = basis.to(dtype)
    return basis if basis.dim() == 2 else basis[0] + basis[1]


def project_reference(
    blocks: list[torch.Tensor], read: list[torch.Tensor], write: list[torch.Tensor]
) -> list[torch.Tensor]:
    """`P_i (Q_i^T B_i)` for every `i`: blocks `B`, bases read `Q`, bases written `P`.

    With the same basis twice it is the orthogonal projection onto its span; with two bases it
    carries coordinates from one space to another. Computed in float32, in float64 for a float64
    block, and returned in the block's dtype.
    """
    results = []
    for B, Q, P in zip(blocks, read, write, strict=True):
        working = torch.float64 if B.dtype == torch.float64 else torch.float32
        reads = _whole(Q, working)
        writes = reads if P is Q else _whole(P, working)
        X = B.to(working)
        C = (X.mT @ reads).mT if X.shape[1] < _NARROW else reads.mT @ X
        results.append((writes @ C).to(B.dtype))
    return results
