# SPDX-License-Identifier: Apache-2.0
"""Transfers that know both base weights, and undo the part of the drift that an adapter meets."""

from collections.abc import Sequence
from typing import overload

import torch

from ._factors import Layers, recompress
from .drift import drift_product

SIDES = ("input", "output", "both")

# Singular values of a factor under this share of its largest count as zero: squared, 1e-14, they
# are a hundred roundings of the float64 Gram matrix that they are found in.
_NULL = 1e-7

Factors = tuple[torch.Tensor, torch.Tensor]


@overload
def anchor_lora(
    lora_B: torch.Tensor,
    lora_A: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    scale: float = ...,
    strength: float = ...,
    sides: str = ...,
    rank: int | None = ...,
    backend: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def anchor_lora(
    lora_B: Sequence[torch.Tensor],
    lora_A: Sequence[torch.Tensor],
    source: Sequence[torch.Tensor],
    target: Sequence[torch.Tensor],
    *,
    scale: float | Sequence[float] = ...,
    strength: float = ...,
    sides: str = ...,
    rank: int | None = ...,
    backend: str = ...,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]: ...
@torch.no_grad()
def anchor_lora(
    lora_B: torch.Tensor | Sequence[torch.Tensor],
    lora_A: torch.Tensor | Sequence[torch.Tensor],
    source: torch.Tensor | Sequence[torch.Tensor],
    target: torch.Tensor | Sequence[torch.Tensor],
    *,
    scale: float | Sequence[float] = 1.0,
    strength: float = 1.0,
    sides: str = "input",
    rank: int | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor] | tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Makes the adapted target act as the adapted source did, in the directions of the adapter.

    Copying gives `W_t + s B A = (W_s + s B A) + D`, where the drift `D = W_t - W_s` also acts on
    what the adapter reads and on what it writes. With `P_A` the projector on the rows of `A`, `P_B`
    that on the columns of `B`, and strength `w`, the update becomes

    - "input": `s B A - w D P_A`: on inputs in the span of A's rows the adapted target is then, at
      full strength, exactly the adapted source. Rank `r`: `B - (w/s) D A^+` beside the old `A`.
    - "output": `s B A - w P_B D`: what is written into the span of B's columns is. Rank `r`.
    - "both": `s B A - w (D P_A + P_B D - P_B D P_A)`, rank `2r`.

    It is copy where the weights are equal, and at strength 0. No SVD of a weight is taken; the
    difference exists a few rows at a time.

    Args:
        lora_B: `(m, r)`, any floating dtype; or a list, a layer an entry.
        lora_A: `(r, n)`; or a list.
        source: the source's weight `W_s` `(m, n)`; or a list.
        target: the target's weight `W_t` `(m, n)`; or a list.
        scale: `s`, what multiplies `B A` (alpha/r), not zero; for lists one, or one a layer. The
            result is to be used with the same.
        strength: `w`, the share of the drift to undo, in [0, 1].
        sides: "input", "output" or "both".
        rank: rank of the result; None for `r`, for "both" by recompression. For "input" and
            "output" it must be None.
        backend: of the recompression.

    Returns:
        `lora_B` `(m, rank)` and `lora_A` `(rank, n)`, or lists, in the dtypes that came in.

    Raises:
        ValueError: shapes that do not fit, or an argument out of range.

    Example:
        >>> W, x = torch.zeros(3, 2), torch.ones(1, 2)
        >>> B, A = anchor_lora(torch.zeros(3, 1), x, W, W + 1)
        >>> (W + 1 + B @ A) @ x.T
        tensor([[0.],
                [0.],
                [0.]])

    The method is this project's; docs/methods.md says where it helps and where it does not.
    """
    if sides not in SIDES:
        raise ValueError(f"sides must be one of {', '.join(SIDES)}; got {sides!r}")
    if rank is not None and sides != "both":
        raise ValueError(f"sides {sides!r} keeps the rank of the update; leave rank out")
    layers = Layers(lora_B, lora_A, source, target, scale, strength, rank)
    moved: list[Factors] = []
    for B, A, W_s, W_t, s in layers.rows():
        moved.append(_anchor(B.double(), A.double(), W_s, W_t, strength / s, sides))
    if sides == "both":
        ranks = [B.shape[1] if rank is None else rank for B in layers.B]
        wide, tall = [B for B, _ in moved], [A for _, A in moved]
        return layers.unlisted(recompress(wide, tall, layers.B, layers.A, ranks, backend))
    new_B = [B.to(old.dtype) for (B, _), old in zip(moved, layers.B, strict=True)]
    new_A = [A.to(old.dtype) for (_, A), old in zip(moved, layers.A, strict=True)]
    return layers.unlisted((new_B, new_A))


def _anchor(
    B: torch.Tensor, A: torch.Tensor, W_s: torch.Tensor, W_t: torch.Tensor, w: float, sides: str
) -> Factors:
    """Factors in float64, with `w` the strength over the scale; rank `2r` for both sides."""
    if sides == "input":
        right, inverse = _row_space(A)
        return B - w * drift_product(W_s, W_t, right) @ inverse.mT, A
    if sides == "output":
        left, inverse = _row_space(B.mT)
        written = drift_product(W_s, W_t, left, transpose=True)
        return B, A - w * inverse @ written.mT
    right, _ = _row_space(A)
    left, _ = _row_space(B.mT)
    read = drift_product(W_s, W_t, right)
    written = drift_product(W_s, W_t, left, transpose=True).mT
    beyond = written - (written @ right) @ right.mT
    wide = torch.cat([B, -w * read, -w * left], dim=1)
    return wide, torch.cat([A, right.mT, beyond])


def _row_space(A: torch.Tensor) -> Factors:
    """Orthonormal basis `V` `(n, p)` of A's rows, and `G` with `V = A^T G`, `A^+ = V G^T`."""
    squares, E = torch.linalg.eigh(A @ A.mT)
    kept = squares > _NULL**2 * squares[-1]
    inverse = E[:, kept] / squares[kept].sqrt()
    return A.mT @ inverse, inverse
