# SPDX-License-Identifier: Apache-2.0
"""How much of one subspace lies in another, and how much would by chance."""

from typing import NamedTuple

import torch

from .svd_types import SVD


class Similarity(NamedTuple):
    """Overlap of two pairs of subspaces, in [0, 1].

    Attributes:
        U: `||U_s^T U_t||_F^2 / k`.
        V: the same for the right singular vectors.
        chance_U: what two unrelated subspaces of this size score on average, `k / m`.
        chance_V: `k / n`.
    """

    U: float
    V: float
    chance_U: float
    chance_V: float


def subspace_similarity(source: SVD, target: SVD) -> Similarity:
    """Similarity `phi` of two models' leading subspaces of one layer.

    Raw `phi` is not comparable between layers of different width: two unrelated `k`-dimensional
    subspaces of `R^m` score `k / m`. Read it against the chance level.

    Args:
        source: truncated SVD of the layer's weight `(m, n)` in one model.
        target: the same for the other model; where ranks differ, `k` is the smaller one and the
            largest possible value is still 1.

    Returns:
        `phi` for `U` and `V`, each with its chance level.

    Raises:
        ValueError: the weights have different shapes: no similarity is defined between spaces of
            different dimension.

    Example:
        >>> from lorax_kernels import truncated_svd
        >>> svd = truncated_svd(torch.randn(8, 6), rank=3)
        >>> round(subspace_similarity(svd, svd).U, 4)
        1.0

    The measure is that of LoRA-X (Farhadzadeh et al., ICLR 2025, arXiv 2501.16559).
    """
    shapes = [(svd.U.shape[-2], svd.V.shape[-2]) for svd in (source, target)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"similarity needs weights of one shape, got {shapes[0]} and {shapes[1]}; subspaces of "
            "spaces of different dimension cannot be compared"
        )
    m, n = shapes[0]
    k, larger = sorted((source.rank, target.rank))

    def phi(left: torch.Tensor, right: torch.Tensor) -> float:
        return min(1.0, float(torch.linalg.matrix_norm(left.mT @ right) ** 2) / k)

    return Similarity(
        phi(source.U, target.U), phi(source.V, target.V), min(1.0, larger / m), min(1.0, larger / n)
    )
