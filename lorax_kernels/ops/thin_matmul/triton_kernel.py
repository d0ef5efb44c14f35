# SPDX-License-Identifier: Apache-2.0
"""Batched products of float32 (or 16-bit) operands as 16-bit pieces, split in registers."""

import os

import torch
import triton
import triton.language as tl

# Tile sides: 128 x 128 keeps eight warps' accumulators in registers; a block of 64 columns or fewer
# would leave half of such a tile empty.
_TILE_ROWS = 128
_TILE_COLUMNS = (64, 128)
_TILE_DEPTH = 32
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _dot(left, right, total, UPCAST: tl.constexpr):
    # Triton's interpreter keeps bfloat16 as bit patterns and multiplies those.
    if UPCAST:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    return tl.dot(left, right, total)


@triton.jit
def split_matmul_kernel(
    A,
    B,
    C,
    scales,
    rows,
    columns,
    depth,
    a_batch,
    a_row,
    a_depth,
    b_batch,
    b_depth,
    b_column,
    c_batch,
    c_row,
    PIECE: tl.constexpr,
    A_PIECES: tl.constexpr,
    B_PIECES: tl.constexpr,
    ORDER: tl.constexpr,
    SCALED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    UPCAST: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
):
    """C[b] = A[b] @ B[b], both as sums of pieces of 16 bits split off in registers.

    Products of pieces whose indexes sum to less than ORDER are kept, the small ones added first.
    Tensor cores truncate their sums; with three pieces a step's are added up apart and rounded.

    A       (batch, rows, depth)     any strides; float32 or PIECE
    B       (batch, depth, columns)  any strides; the same
    C       (batch, rows, columns)   float32, contiguous rows
    scales  (batch,)                 powers of two that bring B into float16's range; if SCALED
    SYMMETRIC: C is known to be symmetric; tiles on and above the diagonal are computed and mirrored
    """
    tile_column = tl.program_id(0)
    tile_row = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    if SYMMETRIC and tile_row > tile_column:
        return
    row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tile_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    step = tl.arange(0, TILE_DEPTH)
    a = A + batch * a_batch + row[:, None].to(tl.int64) * a_row
    b = B + batch * b_batch + column[None, :].to(tl.int64) * b_column
    total = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    # What the compiler does not know to be one.
    one = tl.where(depth > 0, 1.0, 0.0)
    if SCALED:
        scale = tl.load(scales + batch)
    for start in range(0, depth, TILE_DEPTH):
        at = (start + step).to(tl.int64)
        left = tl.load(
            a + at[None, :] * a_depth, mask=(row[:, None] < rows) & (at[None, :] < depth), other=0.0
        )
        right = tl.load(
            b + at[:, None] * b_depth,
            mask=(at[:, None] < depth) & (column[None, :] < columns),
            other=0.0,
        )
        if SCALED:
            right *= scale
        left_0 = left.to(PIECE)
        right_0 = right.to(PIECE)
        if A_PIECES > 1:
            left_rest = left.to(tl.float32) - left_0.to(tl.float32)
            left_1 = left_rest.to(PIECE)
        if B_PIECES > 1:
            right_rest = right.to(tl.float32) - right_0.to(tl.float32)
            right_1 = right_rest.to(PIECE)
        if ORDER > 2:
            part = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
            if A_PIECES > 2:
                left_2 = (left_rest - left_1.to(tl.float32)).to(PIECE)
                part = _dot(left_2, right_0, part, UPCAST)
            if B_PIECES > 2:
                right_2 = (right_rest - right_1.to(tl.float32)).to(PIECE)
                part = _dot(left_0, right_2, part, UPCAST)
            if A_PIECES > 1 and B_PIECES > 1:
                part = _dot(left_1, right_1, part, UPCAST)
        else:
            part = total
        if ORDER > 1:
            if A_PIECES > 1:
                part = _dot(left_1, right_0, part, UPCAST)
            if B_PIECES > 1:
                part = _dot(left_0, right_1, part, UPCAST)
        part = _dot(left_0, right_0, part, UPCAST)
        if ORDER > 2:
            # Times one, because a bare sum is folded into the product, and then truncated in it.
            total += part * one
        else:
            total = part
    if SCALED:
        total /= scale
    c = C + batch * c_batch
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    if SYMMETRIC:
        # The upper element of a pair decides both, in the diagonal tiles too.
        if tile_row == tile_column:
            total = tl.where(row[:, None] <= column[None, :], total, tl.trans(total))
        else:
            mirrored = c + column[:, None].to(tl.int64) * c_row + row[None, :]
            tl.store(
                mirrored,
                tl.trans(total),
                mask=(column[:, None] < columns) & (row[None, :] < rows),
            )
    tl.store(c + row[:, None].to(tl.int64) * c_row + column[None, :], total, mask=inside)


def _scales(B: torch.Tensor) -> torch.Tensor:
    """Powers of two `(b,)` that bring the largest element of each matrix just under 2^15."""
    largest = B.abs().amax((1, 2)) if B.shape[1] else B.new_ones(len(B))
    exponent = 15 - torch.frexp(largest).exponent
    exponent = torch.where(largest.isfinite(), exponent, 0)
    # A float32 is its exponent, biased by 127, above 23 bits of mantissa.
    return (exponent.clamp(-126, 127) + 127 << 23).view(torch.float32)


def launch_split_matmul(
    A: torch.Tensor, B: torch.Tensor, order: int, *, symmetric: bool = False
) -> torch.Tensor:
    """`A @ B` for batches `(b, m, k)` and `(b, k, n)`, in float32.

    Args:
        A: left operand. 16 bits are one piece; float32 is `order` pieces in bfloat16.
        B: right operand, the same; beside a float16 `A` its pieces are float16, two at most.
        order: products of pieces with indexes summing to less than this are kept.
        symmetric: the product is a symmetric matrix; makes it so to the last bit.

    Returns:
        `(b, m, n)`, float32.
    """
    batch, rows, depth = A.shape
    columns = B.shape[2]
    C = torch.empty(batch, rows, columns, dtype=torch.float32, device=A.device)
    if C.numel() == 0:
        return C
    tile_columns = _TILE_COLUMNS[columns > _TILE_COLUMNS[0]]
    tile_rows = tile_columns if symmetric else _TILE_ROWS
    grid = (triton.cdiv(columns, tile_columns), triton.cdiv(rows, tile_rows), batch)
    halves = A.dtype == torch.float16
    scaled = halves and B.dtype == torch.float32
    pieces = {torch.bfloat16: 1, torch.float16: 1, torch.float32: min(order, 2 if halves else 3)}
    split_matmul_kernel[grid](
        A,
        B,
        C,
        _scales(B) if scaled else C,
        rows,
        columns,
        # The interpreter takes no bound of a loop but a constant.
        tl.constexpr(depth) if _INTERPRETED else depth,
        *A.stride(),
        *B.stride(),
        C.stride(0),
        C.stride(1),
        PIECE=tl.float16 if halves else tl.bfloat16,
        A_PIECES=pieces[A.dtype],
        B_PIECES=pieces[B.dtype],
        ORDER=order,
        SCALED=scaled,
        SYMMETRIC=symmetric,
        UPCAST=_INTERPRETED,
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=tile_columns,
        TILE_DEPTH=_TILE_DEPTH,
        num_warps=8,
        num_stages=3,
    )
    return C


def thin_matmul_triton(
    W: torch.Tensor, X: torch.Tensor, transpose: bool, pieces: int
) -> torch.Tensor:
    """`W @ X` or `W^T @ X`; same arguments as the reference."""
    return launch_split_matmul(W.mT if transpose else W, X, pieces)
