# SPDX-License-Identifier: Apache-2.0
"""Batched products of float32 (or 16-bit) operands as bfloat16 pieces, split in registers."""

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
    A_PIECES: tl.constexpr,
    B_PIECES: tl.constexpr,
    ORDER: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    UPCAST: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
):
    """C[b] = A[b] @ B[b], both as sums of bfloat16 pieces split off in registers.

    Products of pieces whose indexes sum to less than ORDER are kept, the small ones added first.

    A  (batch, rows, depth)     any strides; float32, bfloat16 or float16
    B  (batch, depth, columns)  any strides; the same
    C  (batch, rows, columns)   float32, contiguous rows
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
        left_0 = left.to(tl.bfloat16)
        right_0 = right.to(tl.bfloat16)
        if A_PIECES > 1:
            left_rest = left.to(tl.float32) - left_0.to(tl.float32)
            left_1 = left_rest.to(tl.bfloat16)
        if B_PIECES > 1:
            right_rest = right.to(tl.float32) - right_0.to(tl.float32)
            right_1 = right_rest.to(tl.bfloat16)
        if ORDER > 2:
            if A_PIECES > 2:
                left_2 = (left_rest - left_1.to(tl.float32)).to(tl.bfloat16)
                total = _dot(left_2, right_0, total, UPCAST)
            if B_PIECES > 2:
                right_2 = (right_rest - right_1.to(tl.float32)).to(tl.bfloat16)
                total = _dot(left_0, right_2, total, UPCAST)
            if A_PIECES > 1 and B_PIECES > 1:
                total = _dot(left_1, right_1, total, UPCAST)
        if ORDER > 1:
            if A_PIECES > 1:
                total = _dot(left_1, right_0, total, UPCAST)
            if B_PIECES > 1:
                total = _dot(left_0, right_1, total, UPCAST)
        total = _dot(left_0, right_0, total, UPCAST)
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


def launch_split_matmul(
    A: torch.Tensor, B: torch.Tensor, order: int, *, symmetric: bool = False
) -> torch.Tensor:
    """`A @ B` for batches `(b, m, k)` and `(b, k, n)`, in float32.

    Args:
        A: left operand; bfloat16 counts as one piece, float16 as two, float32 as `order`.
        B: right operand, the same.
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
    pieces = {torch.bfloat16: 1, torch.float16: min(order, 2), torch.float32: order}
    split_matmul_kernel[grid](
        A,
        B,
        C,
        rows,
        columns,
        # The interpreter takes no bound of a loop but a constant.
        tl.constexpr(depth) if _INTERPRETED else depth,
        *A.stride(),
        *B.stride(),
        C.stride(0),
        C.stride(1),
        A_PIECES=pieces[A.dtype],
        B_PIECES=pieces[B.dtype],
        ORDER=order,
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
