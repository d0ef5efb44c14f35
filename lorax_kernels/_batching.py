# SPDX-License-Identifier: Apache-2.0
"""Matrices of any shapes as stacks of equal ones, in bounded memory."""

import math
from collections.abc import Iterator, Sequence

import torch

from . import ops
from ._planning import Plan

# Matrices that one call of a compiled op takes: the second and third sides of a grid end there.
_MOST = 65535
# Outside of these bounds squares of entries overflow or vanish in float32.
_SAFE = (1e-8, 1e8)
# Largest entry in float16: products with orthonormal blocks are then of order one, and entries down
# to 2^-15 of the largest keep all the digits of a bfloat16.
_HALF_EXPONENT = -2


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


def chunks(
    group: list[int], matrix: torch.Tensor, p: Plan, workspace: int, halves: bool
) -> Iterator[list[int]]:
    """Cuts a group into pieces of one size whose temporaries stay within `workspace` bytes."""
    long, short = max(matrix.shape), min(matrix.shape)
    is_narrow = halves and matrix.dtype.itemsize == 2
    size = long * short * (2 if is_narrow else 4)
    if p.path == "exact":
        size += 8 * long * short + 3 * 8 * short**2
    else:
        # Float32 weights for tensor cores in two float16 pieces, beside what they are pieces of.
        size += 4 * long * short if halves and not is_narrow else 0
        # The block and its products before and after a rotation, and their pieces.
        size += 4 * (5 * short + 3 * long) * p.width
        # The Gram matrix in float32, or in two float16 pieces.
        size += 4 * short**2 if p.use_gram or p.gram_from < math.inf else 0
    pieces = max(-(-len(group) * size // workspace), -(-len(group) // _MOST))
    count = max(1, -(-len(group) // pieces))
    for start in range(0, len(group), count):
        yield group[start : start + count]


def stack(
    matrices: Sequence[torch.Tensor], chunk: list[int], exact: bool, halves: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A stack to decompose and the factor `(b,)` by which its singular values were divided.

    Scaling is by powers of two. A CPU multiplies in float32. For tensor cores 16-bit weights become
    float16: bfloat16 has fewer digits, so that only entries far below the largest lose some, and
    the block multiplied with them is then rounded to 11 bits instead of 8.

    Args:
        matrices: all of them.
        chunk: which to stack.
        exact: for the exact path, which keeps float64.
        halves: for tensor cores.
        backend: passed to the ops.

    Raises:
        ValueError: a matrix holds NaN or Inf.
    """
    first = matrices[chunk[0]]
    largest = _largest([matrices[i] for i in chunk])
    if not bool(largest.isfinite().all()):
        bad = chunk[int((~largest.isfinite()).nonzero()[0])]
        raise ValueError(f"matrix {bad} holds NaN or Inf; no SVD exists")
    exponent = largest.clamp_min(1e-300).log2().floor()
    if halves:
        shift = torch.where(largest > 0, exponent - _HALF_EXPONENT, 0.0)
    else:
        unsafe = ((largest < _SAFE[0]) | (largest > _SAFE[1])) & (largest > 0)
        shift = torch.where(unsafe, exponent, 0.0)
    if exact and first.dtype == torch.float64:
        working = torch.float64
    else:
        working = torch.float16 if halves and first.dtype.itemsize == 2 else torch.float32
    shifts = shift.tolist()
    if working == torch.float16 and (len(chunk) > 1 or shifts[0] != 0 or first.dtype != working):
        exponents = [-int(power) for power in shifts]
        some = [matrices[i] for i in chunk]
        return ops.stack_halves(some, exponents, backend=backend), torch.exp2(shift)
    if len(chunk) == 1 and shifts[0] == 0:
        return first[None].to(working), torch.ones_like(shift)
    stacked = torch.empty(len(chunk), *first.shape, dtype=working, device=first.device)
    wide = torch.promote_types(first.dtype, working)
    for row, i, power in zip(stacked, chunk, shifts, strict=True):
        if power == 0:
            row.copy_(matrices[i])
        else:
            # In two steps: a power that brings 1e-38 to 1 is itself out of float32's range.
            half = power // 2
            row.copy_(matrices[i].to(wide) * 2.0**-half * 2.0 ** (half - power))
    return stacked, torch.exp2(shift)


def _largest(matrices: list[torch.Tensor]) -> torch.Tensor:
    """Largest magnitude of each, `(b,)` in float64; NaN where there is one."""
    if matrices[0].is_cuda:
        # One launch for many.
        return torch.stack(torch._foreach_norm(matrices, float("inf"))).double()
    extremes = [torch.aminmax(matrix) for matrix in matrices]
    return torch.stack([torch.maximum(-e.min, e.max) for e in extremes]).double()
