# SPDX-License-Identifier: Apache-2.0
"""Matrices of any shapes as stacks of equal ones, in bounded memory."""

import math
from collections.abc import Iterator, Sequence

import torch

from . import ops
from ._planning import Plan
from .ops.stack_halves import magnitudes

# Matrices that one call of a compiled op takes: the second and third sides of a grid end there.
_MOST = 65535
# Outside of these bounds squares of entries overflow or vanish in float32.
_SAFE = (1e-8, 1e8)
# Largest entry in float16: products with orthonormal blocks are then of order one, and entries down
# to 2^-15 of the largest keep all the digits of a bfloat16.
_HALF_EXPONENT = -2
# It is guessed from so many leading entries, some percent of a matrix of a large model: to read all
# of them first would take as long as to convert them. The guess aims one power of two lower, so
# that entries up to twice as large may follow.
_SAMPLE = 1 << 18


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
    some = [matrices[i] for i in chunk]
    first = some[0]
    if halves and first.dtype.itemsize == 2:
        return _stack_halves(some, chunk, backend)
    largest = magnitudes(some).tolist()
    _check_finite(largest, chunk)
    exponents = [_half_exponent(x) if halves else _safe_exponent(x) for x in largest]
    scale = _factors(exponents, first.device)
    working = torch.float64 if exact and first.dtype == torch.float64 else torch.float32
    if len(chunk) == 1 and exponents == [0]:
        return first[None].to(working), scale
    stacked = torch.empty(len(chunk), *first.shape, dtype=working, device=first.device)
    wide = torch.promote_types(first.dtype, working)
    for row, matrix, exponent in zip(stacked, some, exponents, strict=True):
        if exponent == 0:
            row.copy_(matrix)
        else:
            # In two steps: a power that brings 1e-38 to 1 is itself out of float32's range.
            half = exponent // 2
            row.copy_(matrix.to(wide) * 2.0**half * 2.0 ** (exponent - half))
    return stacked, scale


def _stack_halves(
    matrices: list[torch.Tensor], chunk: list[int], backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `stack` returns of 16-bit weights for tensor cores.

    They are scaled by what a sample says, and again if what was found on the way contradicts it.
    """
    first = matrices[0]
    # Only a float16 matrix by itself may need no copy at all, which is worth the full look.
    is_alone = len(matrices) == 1 and first.dtype == torch.float16
    seen = magnitudes(matrices if is_alone else [_sample(matrix) for matrix in matrices]).tolist()
    if is_alone:
        exponents = [_half_exponent(seen[0])]
        if exponents == [0]:
            _check_finite(seen, chunk)
            return first[None], _factors(exponents, first.device)
    else:
        exponents = [_half_exponent(x, spare=1) for x in seen]
    stacked, largest = ops.stack_halves(matrices, exponents, backend=backend)
    found = largest.tolist()
    _check_finite(found, chunk)
    wrong = [
        i
        for i, (x, exponent) in enumerate(zip(found, exponents, strict=True))
        if x != 0 and not 0 <= _half_exponent(x) - exponent <= 1
    ]
    if wrong:
        for i in wrong:
            exponents[i] = _half_exponent(found[i])
        again = [matrices[i] for i in wrong], [exponents[i] for i in wrong]
        stacked[wrong], _ = ops.stack_halves(*again, backend=backend)
    return stacked, _factors(exponents, first.device)


def _sample(matrix: torch.Tensor) -> torch.Tensor:
    """Leading rows of a matrix, or columns where those lie contiguous."""
    rows = matrix if matrix.stride(0) >= matrix.stride(1) else matrix.mT
    return rows[: -(-_SAMPLE // rows.shape[1])]


def _half_exponent(largest: float, spare: int = 0) -> int:
    """The power of two that brings an entry into [1/4, 1/2), or `spare` powers lower.

    0 for what none does.
    """
    if largest == 0 or not math.isfinite(largest):
        return 0
    return _HALF_EXPONENT + 1 - spare - math.frexp(largest)[1]


def _safe_exponent(largest: float) -> int:
    """The power of two that brings an entry into [1, 2) where its square is not safe; else 0."""
    if largest == 0 or _SAFE[0] <= largest <= _SAFE[1]:
        return 0
    return 1 - math.frexp(largest)[1]


def _factors(exponents: list[int], device: torch.device) -> torch.Tensor:
    """What multiplying by these powers of two divided singular values by, `(b,)` in float64."""
    factors = [2.0**-exponent for exponent in exponents]
    return torch.tensor(factors, dtype=torch.float64, device=device)


def _check_finite(largest: list[float], chunk: list[int]) -> None:
    """Raises ValueError for the first matrix whose largest magnitude is NaN or Inf."""
    for i, x in zip(chunk, largest, strict=True):
        if not math.isfinite(x):
            raise ValueError(f"matrix {i} holds NaN or Inf; no SVD exists")
