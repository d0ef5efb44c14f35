# SPDX-License-Identifier: Apache-2.0
"""The smallest rotation that carries one subspace onto another, applied to thin blocks."""

from collections.abc import Sequence

import torch

from . import ops

# Cosines below this come from the SVD instead of the Gram matrix, whose float64 rounding of 1e-16
# is then 1e-8 of their squares: what float32 bases deserve.
_SMALL_COSINE = 1e-4
# Bytes of float64 overlaps that are decomposed at once; the eigensolver takes a few times that.
_BATCH_BYTES = 2**28


def rotate_subspace(
    blocks: Sequence[torch.Tensor],
    source: Sequence[torch.Tensor],
    target: Sequence[torch.Tensor],
    backend: str,
) -> list[torch.Tensor]:
    """`R X` for every block `X`, with `R` the smallest rotation from one span onto another.

    With principal vectors `y_i` of the source and `x_i` of the target, `c_i = x_i . y_i >= 0`, and
    `K_i = x_i y_i^T - y_i x_i^T`,

        R = I + sum_i K_i + K_i^2 / (1 + c_i),

    Rodrigues' formula in each of the planes, which are orthogonal to each other. Nothing is divided
    by a sine, so that equal directions need no special case; a right angle is turned by as much,
    in a plane that the two subspaces leave open. `R` is never formed.

    Args:
        blocks: `(m_i, r_i)`, any floating dtype.
        source: `(m_i, k_i)`, orthonormal columns.
        target: `(m_i, k_i)`, orthonormal columns.
        backend: of the eigensolver.

    Returns:
        Blocks in the dtypes that came in, computed in float64.
    """
    rotated: dict[int, torch.Tensor] = {}
    groups: dict[tuple, list[int]] = {}
    for i, basis in enumerate(source):
        groups.setdefault((basis.shape[1], basis.device), []).append(i)
    for (k, _), group in groups.items():
        most = max(1, _BATCH_BYTES // (8 * k * k))
        for start in range(0, len(group), most):
            some = group[start : start + most]
            overlaps = [target[i].double().mT @ source[i].double() for i in some]
            X, cosines, Y = _principal(torch.stack(overlaps), backend)
            for j, i in enumerate(some):
                turn = (source[i].double(), target[i].double(), X[j], cosines[j], Y[j])
                rotated[i] = _apply(blocks[i].double(), *turn).to(blocks[i].dtype)
    return [rotated[i] for i in range(len(blocks))]


def _apply(
    block: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    X: torch.Tensor,
    cosines: torch.Tensor,
    Y: torch.Tensor,
) -> torch.Tensor:
    c = cosines[:, None]
    along_y = Y.mT @ (source.mT @ block)
    along_x = X.mT @ (target.mT @ block)
    # The sum over the planes, sorted by the vector that each term points along.
    on_x = X @ (((1 + 2 * c) * along_y - along_x) / (1 + c))
    on_y = Y @ ((along_y + along_x) / (1 + c))
    return block + target @ on_x - source @ on_y


def _principal(M: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SVD `M = X diag(c) Y^T` of a stack of square float64 overlaps, batched."""
    squares, Y = ops.symmetric_eigh(M.mT @ M, backend=backend)
    c = squares.clamp(0, 1).sqrt()
    X = M @ Y / c.clamp(min=_SMALL_COSINE)[:, None, :]
    bad = c[:, -1] < _SMALL_COSINE
    if bool(bad.any()):
        X[bad], c[bad], Yh = torch.linalg.svd(M[bad])
        Y[bad] = Yh.mT
    return X, c.clamp(max=1), Y
