# SPDX-License-Identifier: Apache-2.0
"""A transfer that takes the largest part of the target's own training back."""

import warnings
from collections.abc import Sequence
from typing import overload

import torch

from ._factors import Layers, recompress
from .drift import drift_gram, drift_product
from .svd import ConvergenceWarning
from .svd_diff import svd_diff
from .svd_types import SVD

# Passes over the difference. Which of two nearly equal directions is undone does not matter, and
# drift like noise has nothing else: after 12 passes the best `q` directions of such a matrix lack
# 0.1 % of the energy that they can hold, a tolerance of 1e-3 would take 40 to 70.
_PASSES = 12


@overload
def restore_lora(
    lora_B: torch.Tensor,
    lora_A: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    scale: float = ...,
    strength: float = ...,
    directions: int = ...,
    rank: int | None = ...,
    backend: str = ...,
    workspace: int = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def restore_lora(
    lora_B: Sequence[torch.Tensor],
    lora_A: Sequence[torch.Tensor],
    source: Sequence[torch.Tensor],
    target: Sequence[torch.Tensor],
    *,
    scale: float | Sequence[float] = ...,
    strength: float | Sequence[float] = ...,
    directions: int = ...,
    rank: int | None = ...,
    backend: str = ...,
    workspace: int = ...,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]: ...
@torch.no_grad()
def restore_lora(
    lora_B: torch.Tensor | Sequence[torch.Tensor],
    lora_A: torch.Tensor | Sequence[torch.Tensor],
    source: torch.Tensor | Sequence[torch.Tensor],
    target: torch.Tensor | Sequence[torch.Tensor],
    *,
    scale: float | Sequence[float] = 1.0,
    strength: float | Sequence[float] = 1.0,
    directions: int = 16,
    rank: int | None = None,
    backend: str = "auto",
    workspace: int = 4 << 30,
) -> tuple[torch.Tensor, torch.Tensor] | tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Undoes the largest directions of the drift beside the adapter.

    `s B A - w [W_t - W_s]_q`, with `[.]_q` the truncated SVD of rank `q`, found to
    within a per mille of the energy that `q` directions can hold. Taken far enough this
    gives back the source with its adapter: *the target's own training is undone*, and what it was
    trained for is lost with it. It is copy where the weights are equal, and at strength 0.

    Args:
        lora_B: `(m, r)`, any floating dtype; or a list, a layer an entry.
        lora_A: `(r, n)`; or a list.
        source: the source's weight `W_s` `(m, n)`; or a list.
        target: the target's weight `W_t` `(m, n)`; or a list.
        scale: `s`, what multiplies `B A` (alpha/r), not zero; for lists one, or one a layer. The
            result is to be used with the same.
        strength: `w`, the share of those directions to undo, in [0, 1]; for lists one, or one a
            layer.
        directions: `q`, directions of the drift to undo; capped at the shorter side of a weight.
        rank: rank of the result, by recompression; None for `r + q`, exactly.
        backend: "auto", "cuda", "triton" or "reference".
        workspace: bytes of extra memory beyond weights and results; see `svd_diff`.

    Returns:
        `lora_B` `(m, rank)` and `lora_A` `(rank, n)`, or lists, in the dtypes that came in.

    Raises:
        ValueError: shapes that do not fit, or an argument out of range.

    Example:
        >>> W, zero = torch.eye(3), torch.zeros(3, 1)
        >>> B, A = restore_lora(zero, zero.T, W, 2 * W, directions=3)
        >>> torch.allclose(2 * W + B @ A, W, atol=1e-6)
        True
    """
    if directions < 1:
        raise ValueError(f"directions must be at least 1, got {directions}")
    layers = Layers(lora_B, lora_A, source, target, scale, strength, rank)
    wide, tall = [], []
    drifts = _drifts(layers, directions, backend, workspace)
    for (B, A, _, _, s), w, drift in zip(layers.rows(), layers.strengths, drifts, strict=True):
        root = (w * drift.S / abs(s)).sqrt()
        undo = -root if s > 0 else root
        wide.append(torch.cat([B, (drift.U * undo).to(B.dtype)], dim=1))
        tall.append(torch.cat([A, (drift.V * root).mT.to(A.dtype)]))
    if rank is not None:
        ranks = [rank] * len(wide)
        return layers.unlisted(recompress(wide, tall, layers.B, layers.A, ranks, backend))
    return layers.unlisted((wide, tall))


@torch.no_grad()
def restore_embedding(
    source: torch.Tensor, target: torch.Tensor, *, directions: int = 16, strength: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors that take the largest directions of an embedding table's drift back.

    `-w [E_t - E_s]_q`, as `restore_lora` does it for a layer, for a table, which has many rows and
    no update of its own. The directions are exact: they are the leading eigenvectors of
    `(E_t - E_s)^T (E_t - E_s)`, which a pass over the rows gives.

    Args:
        source: the source's table `E_s` `(vocabulary, d)`, any floating dtype.
        target: the target's `E_t`, of the same shape.
        directions: `q`, directions to undo; capped at `d`.
        strength: `w`, the share of them to undo, in [0, 1].

    Returns:
        `lora_B` `(vocabulary, q)` and `lora_A` `(q, d)`, in float32, or float64 where a table is;
        their product is added to the target's table.

    Raises:
        ValueError: tables that do not fit, or an argument out of range.

    Example:
        >>> E = torch.eye(5, 3)
        >>> B, A = restore_embedding(E, E + 1, directions=1)
        >>> torch.allclose(E + 1 + B @ A, E, atol=1e-6)
        True
    """
    if directions < 1:
        raise ValueError(f"directions must be at least 1, got {directions}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], got {strength}")
    vectors = torch.linalg.eigh(drift_gram(source, target)).eigenvectors
    V = vectors[:, -min(directions, source.shape[1]) :].flip(1)
    is_double = torch.float64 in (source.dtype, target.dtype)
    working = torch.float64 if is_double else torch.float32
    B = -strength * drift_product(source, target, V)
    return B.to(working), V.mT.to(working).contiguous()


def _drifts(layers: Layers, directions: int, backend: str, workspace: int) -> list[SVD]:
    """Leading triplets of every layer's drift; those of one rank together."""
    ranks = [min(directions, *W.shape) for W in layers.source]
    found: dict[int, SVD] = {}
    for rank in set(ranks):
        some = [i for i, own in enumerate(ranks) if own == rank]
        targets, sources = ([x[i] for i in some] for x in (layers.target, layers.source))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            svds = svd_diff(
                targets,
                sources,
                rank,
                tol=1e-2,
                max_passes=_PASSES,
                backend=backend,
                workspace=workspace,
            )
        found.update(zip(some, svds, strict=True))
    return [found[i] for i in range(len(ranks))]
