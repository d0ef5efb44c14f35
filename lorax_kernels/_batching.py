# SPDX-License-Identifier: Apache-2.0
"""Matrices of any shapes as stacks of equal ones, in bounded memory."""

from collections.abc import Iterator, Sequence

import torch

from ._planning import Plan

# Outside of these bounds squares of entries overflow or vanish in float32.
_SAFE = (1e-8, 1e8)


def check(index: int, matrix: object, rank: int | None) -> None:
    """Raises TypeError or ValueError unless this is a matrix with at least `rank` directions."""
    if not isinstance(matrix, torch.Tensor) or not matrix.is_floating_point():
        kind = matrix.dtype if isinstance(matrix, torch.Tensor) else type(matrix).__name__
        raise TypeError(f"matrix {index} must be a floating-point tensor, got {kind}")
    if matrix.dim() != 2 or 0 in matrix.shape:
        raise ValueError(
            f"matrix {index} must have two sides of at least 1, got shape {tuple(matrix.shape)}"
        )
    if rank is not None and not 1 <= rank <= min(matrix.shape):
        raise ValueError(
            f"rank must be between 1 and the shorter side, {min(matrix.shape)} for matrix {index} "
            f"of shape {tuple(matrix.shape)}; got {rank}"
        )


def groups(matrices: Sequence[torch.Tensor], warm: Sequence[bool]) -> Iterator[list[int]]:
    """Indices of matrices that can be stacked, in order of first appearance."""
    found: dict[tuple, list[int]] = {}
    for i, (matrix, w) in enumerate(zip(matrices, warm, strict=True)):
        found.setdefault((matrix.shape, matrix.dtype, matrix.device, w), []).append(i)
    yield from found.values()


def chunks(group: list[int], matrix: torch.Tensor, p: Plan, workspace: int) -> Iterator[list[int]]:
    """Cuts a group so that the temporaries of one piece stay within `workspace` bytes."""
    long, short = max(matrix.shape), min(matrix.shape)
    size = 4 * long * short
    if p.path == "exact":
        size += 8 * long * short + 3 * 8 * short**2
    else:
        size += 4 * 4 * (long + short) * p.width + (4 * short**2 if p.use_gram else 0)
    count = max(1, workspace // size)
    for start in range(0, len(group), count):
        yield group[start : start + count]


def stack(
    matrices: Sequence[torch.Tensor], chunk: list[int], exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A stack to decompose and the factor `(b,)` by which its singular values were divided.

    Weights keep their dtype on a GPU, where kernels read bfloat16 exactly; a CPU multiplies in
    float32. Scaling is by powers of two, so that it is exact.

    Raises:
        ValueError: a matrix holds NaN or Inf.
    """
    first = matrices[chunk[0]]
    stacked = first[None] if len(chunk) == 1 else torch.stack([matrices[i] for i in chunk])
    largest = stacked.abs().amax(dim=(1, 2)).double()
    if not bool(largest.isfinite().all()):
        bad = chunk[int((~largest.isfinite()).nonzero()[0])]
        raise ValueError(f"matrix {bad} holds NaN or Inf; no SVD exists")
    if first.dtype == torch.float64 and exact:
        working = torch.float64
    elif first.device.type == "cpu" or first.dtype == torch.float64:
        working = torch.float32
    else:
        working = first.dtype
    scale = torch.ones_like(largest)
    unsafe = ((largest < _SAFE[0]) | (largest > _SAFE[1])) & (largest > 0)
    if bool(unsafe.any()):
        scale = torch.where(unsafe, torch.exp2(largest.clamp_min(1e-300).log2().round()), scale)
        stacked = (stacked.double() / scale[:, None, None]).to(working)
    return stacked.to(working), scale.float() if working != torch.float64 else scale
