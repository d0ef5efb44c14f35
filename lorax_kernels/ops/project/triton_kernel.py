# SPDX-License-Identifier: Apache-2.0
"""Projection of LoRA factors in Triton: grouped over layers through a table of pointers."""

import triton
import triton.language as tl

# Loops have the same trip count for every layer of a launch, with the rest masked: Triton pipelines
# their loads, and its interpreter takes no bounds from tensors.

# Columns of a table row. Pointers and strides of one layer, then its sizes and first indices.
_FIELDS = tl.constexpr(17)
_BLOCK, _READ, _WRITE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_BLOCK_ROW, _BLOCK_COLUMN = tl.constexpr(3), tl.constexpr(4)
_READ_ROW, _WRITE_ROW = tl.constexpr(5), tl.constexpr(6)
_READ_PIECE, _WRITE_PIECE = tl.constexpr(7), tl.constexpr(8)
_M, _P, _K, _R = tl.constexpr(9), tl.constexpr(10), tl.constexpr(11), tl.constexpr(12)
_CHUNKS = tl.constexpr(13)
_PARTIAL = tl.constexpr(14)  # first panel (PANEL x R elements) of its partial sums
_COORDINATE = tl.constexpr(15)  # first panel of its coordinates
_OUT = tl.constexpr(16)  # first element of its result


@triton.jit
def _field(table, layer, index: tl.constexpr):
    return tl.load(table + layer * _FIELDS + index)


@triton.jit
def _dot(left, right, sum, IS_EXACT: tl.constexpr, PARTS: tl.constexpr, OPERAND: tl.constexpr):
    """`sum + left @ right` on bfloat16 tensor cores.

    With IS_EXACT `left` is bfloat16 already and `right` is split in PARTS; otherwise both are split
    in three. Products below the last part's are left out.
    """
    if IS_EXACT:
        right_0 = right.to(tl.bfloat16)
        if PARTS == 1:
            sum = tl.dot(left.to(OPERAND), right_0.to(OPERAND), sum)
        else:
            right_rest = right.to(tl.float32) - right_0.to(tl.float32)
            right_1 = right_rest.to(tl.bfloat16)
            if PARTS == 2:
                sum = tl.dot(left.to(OPERAND), right_1.to(OPERAND), sum)
                sum = tl.dot(left.to(OPERAND), right_0.to(OPERAND), sum)
            else:
                right_2 = (right_rest - right_1.to(tl.float32)).to(tl.bfloat16)
                # Small terms first. The sum starts at zero, as tensor cores truncate running sums.
                part = tl.dot(left.to(OPERAND), right_2.to(OPERAND))
                part = tl.dot(left.to(OPERAND), right_1.to(OPERAND), part)
                sum += tl.dot(left.to(OPERAND), right_0.to(OPERAND), part)
    else:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
        left_0 = left.to(tl.bfloat16)
        left_rest = left - left_0.to(tl.float32)
        left_1 = left_rest.to(tl.bfloat16)
        left_2 = (left_rest - left_1.to(tl.float32)).to(tl.bfloat16)
        right_0 = right.to(tl.bfloat16)
        right_rest = right - right_0.to(tl.float32)
        right_1 = right_rest.to(tl.bfloat16)
        right_2 = (right_rest - right_1.to(tl.float32)).to(tl.bfloat16)
        part = tl.dot(left_0.to(OPERAND), right_2.to(OPERAND))
        part = tl.dot(left_1.to(OPERAND), right_1.to(OPERAND), part)
        part = tl.dot(left_2.to(OPERAND), right_0.to(OPERAND), part)
        part = tl.dot(left_0.to(OPERAND), right_1.to(OPERAND), part)
        part = tl.dot(left_1.to(OPERAND), right_0.to(OPERAND), part)
        sum += tl.dot(left_0.to(OPERAND), right_0.to(OPERAND), part)
    return sum


@triton.jit
def project_read_kernel(
    table,  # (layers, fields) int64
    items,  # (items, 3) int32: layer, chunk, panel
    partials,  # float32: for each layer (chunks, padded k, R)
    BASIS: tl.constexpr,
    FACTOR: tl.constexpr,
    R: tl.constexpr,
    PANEL: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PIECES: tl.constexpr,  # of a basis
    IS_EXACT: tl.constexpr,
    PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
):
    """partial(chunk) = Q[rows, panel]^T B[rows]."""
    item = tl.program_id(0)
    layer = tl.load(items + 3 * item).to(tl.int64)
    chunk = tl.load(items + 3 * item + 1)
    panel = tl.load(items + 3 * item + 2)
    m = _field(table, layer, _M).to(tl.int32)
    k = _field(table, layer, _K).to(tl.int32)
    r = _field(table, layer, _R).to(tl.int32)
    stride = _field(table, layer, _READ_ROW).to(tl.int32)
    block_row = _field(table, layer, _BLOCK_ROW)
    block_column = _field(table, layer, _BLOCK_COLUMN)
    basis = _field(table, layer, _READ).to(tl.pointer_type(BASIS))
    next_piece = _field(table, layer, _READ_PIECE)
    if IS_ALIGNED:
        basis = tl.multiple_of(basis, 16)
        stride = tl.multiple_of(stride, 8)
        next_piece = tl.multiple_of(next_piece, 8)
        k = tl.multiple_of(k, 8)
    block = _field(table, layer, _BLOCK).to(tl.pointer_type(FACTOR))
    columns = panel * PANEL + tl.arange(0, PANEL)
    ranks = tl.arange(0, R)
    sum = tl.zeros((PANEL, R), tl.float32)
    end = tl.minimum(m, (chunk + 1) * CHUNK_ROWS)
    for start in range(0, CHUNK_ROWS, TILE):
        rows = chunk * CHUNK_ROWS + start + tl.arange(0, TILE)
        wide = rows.to(tl.int64)
        B = tl.load(
            block + wide[:, None] * block_row + ranks[None, :] * block_column,
            mask=(rows < end)[:, None] & (ranks < r)[None, :],
            other=0.0,
        )
        for piece in tl.static_range(PIECES - 1, -1, -1):  # small first
            Q = tl.load(
                basis + piece * next_piece + wide[:, None] * stride + columns[None, :],
                mask=(rows < end)[:, None] & (columns < k)[None, :],
                other=0.0,
            )
            sum = _dot(tl.trans(Q), B, sum, IS_EXACT, PARTS, OPERAND)
    target = partials + (_field(table, layer, _PARTIAL) + chunk * tl.cdiv(k, PANEL)) * PANEL * R
    tl.store(target + columns[:, None] * R + ranks[None, :], sum)


@triton.jit
def project_sum_kernel(
    table,  # (layers, fields) int64
    items,  # (items, 2) int32: layer, tile
    partials,  # float32: for each layer (chunks, padded k, R)
    coordinates,  # float32: for each layer (padded k, R)
    R: tl.constexpr,
    PANEL: tl.constexpr,
    CHUNKS: tl.constexpr,  # the most of any layer
    TILE: tl.constexpr,
):
    """The coordinates: the sum of the partial sums, first chunk to last."""
    item = tl.program_id(0)
    layer = tl.load(items + 2 * item).to(tl.int64)
    tile = tl.load(items + 2 * item + 1)
    k = _field(table, layer, _K).to(tl.int32)
    size = tl.cdiv(k, PANEL) * PANEL * R
    index = tile * TILE + tl.arange(0, TILE)
    source = partials + _field(table, layer, _PARTIAL) * PANEL * R + index
    sum = tl.zeros((TILE,), tl.float32)
    chunks = _field(table, layer, _CHUNKS)
    for chunk in range(0, CHUNKS):
        mask = (index < size) & (chunk < chunks)
        sum += tl.load(source + tl.cast(chunk, tl.int64) * size, mask=mask, other=0.0)
    target = coordinates + _field(table, layer, _COORDINATE) * PANEL * R + index
    tl.store(target, sum, mask=index < size)


@triton.jit
def project_write_kernel(
    table,  # (layers, fields) int64
    items,  # (items, 2) int32: layer, tile of rows
    coordinates,  # float32: for each layer (padded k, R)
    out,  # for each layer (p, r)
    BASIS: tl.constexpr,
    R: tl.constexpr,
    PANEL: tl.constexpr,
    PANELS: tl.constexpr,  # the most of any layer
    TILE: tl.constexpr,
    PIECES: tl.constexpr,  # of a basis
    IS_EXACT: tl.constexpr,
    PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
):
    """out[rows] = P[rows] C."""
    item = tl.program_id(0)
    layer = tl.load(items + 2 * item).to(tl.int64)
    tile = tl.load(items + 2 * item + 1)
    p = _field(table, layer, _P).to(tl.int32)
    k = _field(table, layer, _K).to(tl.int32)
    r = _field(table, layer, _R).to(tl.int32)
    stride = _field(table, layer, _WRITE_ROW).to(tl.int32)
    basis = _field(table, layer, _WRITE).to(tl.pointer_type(BASIS))
    next_piece = _field(table, layer, _WRITE_PIECE)
    if IS_ALIGNED:
        basis = tl.multiple_of(basis, 16)
        stride = tl.multiple_of(stride, 8)
        next_piece = tl.multiple_of(next_piece, 8)
        k = tl.multiple_of(k, 8)
    rows = tile * TILE + tl.arange(0, TILE)
    wide = rows.to(tl.int64)
    ranks = tl.arange(0, R)
    source = coordinates + _field(table, layer, _COORDINATE) * PANEL * R
    sum = tl.zeros((TILE, R), tl.float32)
    padded = tl.cdiv(k, PANEL) * PANEL
    for start in range(0, PANELS * PANEL, PANEL):
        columns = start + tl.arange(0, PANEL)
        C = tl.load(
            source + columns[:, None] * R + ranks[None, :],
            mask=(columns < padded)[:, None] & (ranks < R)[None, :],
            other=0.0,
        )
        for piece in tl.static_range(PIECES - 1, -1, -1):
            P = tl.load(
                basis + piece * next_piece + wide[:, None] * stride + columns[None, :],
                mask=(rows < p)[:, None] & (columns < k)[None, :],
                other=0.0,
            )
            sum = _dot(P, C, sum, IS_EXACT, PARTS, OPERAND)
    target = out + _field(table, layer, _OUT) + wide[:, None] * r + ranks[None, :]
    mask = (rows < p)[:, None] & (ranks < r)[None, :]
    tl.store(target, sum.to(out.dtype.element_ty), mask=mask)
