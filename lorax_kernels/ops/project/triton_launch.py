# SPDX-License-Identifier: Apache-2.0
"""Tables and launches of the Triton projection kernels."""

import os
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .reference import project_reference
from .triton_kernel import project_read_kernel, project_sum_kernel, project_write_kernel

_PANEL = 64  # columns of a basis in one product
_CHUNK_ROWS = 1024
_WRITE_ROWS = 128
_READ_TILE = 64
_SUM_TILE = 1024
# Wider blocks are arithmetic, where Triton has no edge over PyTorch's own products.
_WIDEST_RANK = 32
_WIDE_BATCH = 32  # layers of one shape that are stacked, which copies their bases

# Triton's interpreter multiplies the bit patterns of bfloat16 numbers; the same numbers as float32
# give it the products that the tensor cores give.
_OPERAND = tl.float32 if os.environ.get("TRITON_INTERPRET") == "1" else tl.bfloat16

_TRITON_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}
_EXACT_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # bfloat16 parts


class _Plan:
    """The tables of one call on the device; they depend on pointers and shapes alone."""

    def __init__(self, layers: tuple[tuple[int, ...], ...], R: int, device: torch.device) -> None:
        rows = torch.tensor(layers, dtype=torch.int64)
        m, p, k, r = (rows[:, i] for i in (9, 10, 11, 12))
        padded = (k + _PANEL - 1) // _PANEL * _PANEL
        chunks = (m + _CHUNK_ROWS - 1) // _CHUNK_ROWS

        def starts(sizes: torch.Tensor) -> torch.Tensor:
            return sizes.cumsum(0) - sizes

        def cut(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Layer of each item, and its number inside the layer."""
            layer = torch.arange(len(counts)).repeat_interleave(counts)
            return layer, torch.arange(len(layer)) - starts(counts)[layer]

        panels, out = padded // _PANEL, p * r
        first = (starts(x)[:, None] for x in (chunks * panels, panels, out))
        coordinate = panels * _PANEL * R
        self.sizes = [int(x.sum()) for x in (chunks * coordinate, coordinate, out)]
        self.out_starts = starts(out).tolist()
        layer, inside = cut(chunks * panels)
        reads = torch.stack((layer, inside // panels[layer], inside % panels[layer]), 1)
        sums = torch.stack(cut((coordinate + _SUM_TILE - 1) // _SUM_TILE), 1)
        writes = torch.stack(cut((p + _WRITE_ROWS - 1) // _WRITE_ROWS), 1)
        self.chunks, self.panels = int(chunks.max()), int(panels.max())
        self.table = torch.cat((rows, chunks[:, None], *first), 1).to(device)
        self.reads, self.sums, self.writes = (x.int().to(device) for x in (reads, sums, writes))


@lru_cache(maxsize=8)
def _plan(layers: tuple[tuple[int, ...], ...], R: int, device: torch.device) -> _Plan:
    return _Plan(layers, R, device)


@dataclass
class _Group:
    """Blocks that one launch takes together: equal kinds, ranks padded to the same power of two.

    Attributes:
        pieces: of each read and of each write basis.
        rows: of the table on the device, without what the plan adds.
        places: index in the call of each block.
        is_aligned: whether rows of all read and of all write bases are multiples of 16 bytes.
    """

    read: torch.dtype
    write: torch.dtype
    pieces: tuple[int, int]
    factor: torch.dtype
    R: int
    rows: list[tuple[int, ...]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    is_aligned: list[bool] = field(default_factory=lambda: [True, True])


def _run_group(group: _Group, device: torch.device) -> list[torch.Tensor]:
    plan = _plan(tuple(group.rows), group.R, device)
    partials = torch.empty(plan.sizes[0], dtype=torch.float32, device=device)
    coordinates = torch.empty(plan.sizes[1], dtype=torch.float32, device=device)
    out = torch.empty(plan.sizes[2], dtype=group.factor, device=device)
    is_full = group.factor == torch.float32
    shared = {"R": group.R, "PANEL": _PANEL, "OPERAND": _OPERAND}
    project_read_kernel[(len(plan.reads),)](
        plan.table,
        plan.reads,
        partials,
        BASIS=_TRITON_DTYPES[group.read],
        FACTOR=_TRITON_DTYPES[group.factor],
        CHUNK_ROWS=_CHUNK_ROWS,
        TILE=_READ_TILE,
        PIECES=group.pieces[0],
        IS_EXACT=group.read == torch.bfloat16,
        PARTS=_EXACT_PARTS[group.factor],
        IS_ALIGNED=group.is_aligned[0],
        num_stages=4,
        **shared,
    )
    project_sum_kernel[(len(plan.sums),)](
        plan.table,
        plan.sums,
        partials,
        coordinates,
        R=group.R,
        PANEL=_PANEL,
        CHUNKS=plan.chunks,
        TILE=_SUM_TILE,
    )
    project_write_kernel[(len(plan.writes),)](
        plan.table,
        plan.writes,
        coordinates,
        out,
        BASIS=_TRITON_DTYPES[group.write],
        PANELS=plan.panels,
        TILE=_WRITE_ROWS,
        PIECES=group.pieces[1],
        IS_EXACT=group.write == torch.bfloat16,
        PARTS=3 if is_full else 2,
        IS_ALIGNED=group.is_aligned[1],
        num_stages=3,
        **shared,
    )
    return [
        out.as_strided((row[10], row[12]), (row[12], 1), start)
        for start, row in zip(plan.out_starts, group.rows, strict=True)
    ]


def _project_wide(
    blocks: list[torch.Tensor],
    read: list[torch.Tensor],
    write: list[torch.Tensor],
    is_same: bool,
) -> list[torch.Tensor]:
    """Bfloat16 layers of one shape, a few at a time."""
    results: list[torch.Tensor] = []
    for start in range(0, len(blocks), _WIDE_BATCH):
        B, Q = (torch.stack(x[start : start + _WIDE_BATCH]) for x in (blocks, read))
        P = Q if is_same else torch.stack(write[start : start + _WIDE_BATCH])
        results.extend((P @ (Q.mT @ B)).unbind())
    return results


def project_triton(
    blocks: list[torch.Tensor], read: list[torch.Tensor], write: list[torch.Tensor]
) -> list[torch.Tensor]:
    """`P_i (Q_i^T B_i)` for every `i`, in the block's dtype; results share allocations."""
    results: dict[int, torch.Tensor] = {}
    groups: dict[tuple, _Group] = {}
    wide: dict[tuple, list[int]] = {}
    kept = []  # conversions, until the launches are queued
    for i, (B, Q, P) in enumerate(zip(blocks, read, write, strict=True)):
        (m, r), (p, k) = B.shape, P.shape[-2:]
        if 0 in (m, r, p, k):
            results[i] = B.new_zeros(p, r)
            continue
        if r > _WIDEST_RANK:
            if B.dtype == Q.dtype == P.dtype == torch.bfloat16 and Q.dim() == P.dim() == 2:
                wide.setdefault((m, p, k, r, P is Q), []).append(i)
            else:
                results[i] = project_reference([B], [Q], [P])[0]
            continue
        Q_read = _readable(Q)
        P_read = Q_read if P is Q else _readable(P)
        kept += [Q_read, P_read]
        bases = (Q_read.data_ptr(), P_read.data_ptr())
        strides = (Q_read.stride(-2), P_read.stride(-2))
        pieces = tuple(0 if x.dim() == 2 else x.stride(0) for x in (Q_read, P_read))
        aligned = [
            x % 16 == s % 8 == piece % 8 == k % 8 == 0
            for x, s, piece in zip(bases, strides, pieces, strict=True)
        ]
        counts = (Q_read.dim() - 1, P_read.dim() - 1)
        key = (Q_read.dtype, P_read.dtype, counts, B.dtype, _padded_rank(r))
        group = groups.get(key)
        if group is None:
            group = groups[key] = _Group(*key)
        group.rows.append((B.data_ptr(), *bases, *B.stride(), *strides, *pieces, m, p, k, r))
        group.places.append(i)
        group.is_aligned = [x and y for x, y in zip(group.is_aligned, aligned, strict=True)]
    for group in groups.values():
        found = _run_group(group, blocks[0].device)
        results.update(zip(group.places, found, strict=True))
    for (*_, is_same), layers in wide.items():
        some_B, some_Q, some_P = ([x[i] for i in layers] for x in (blocks, read, write))
        found = _project_wide(some_B, some_Q, some_P, is_same)
        results.update(zip(layers, found, strict=True))
    return [results[i] for i in range(len(blocks))]


@lru_cache
def _padded_rank(r: int) -> int:
    return max(16, triton.next_power_of_2(r))


def _readable(basis: torch.Tensor) -> torch.Tensor:
    """The kernels read rows of bfloat16 or float32, less than 2^31 elements apart."""
    if basis.dtype not in (torch.bfloat16, torch.float32):
        basis = basis.float()
    stride, column_stride = basis.stride()[-2:]
    has_rows = column_stride == 1 or basis.shape[-1] == 1
    return basis if has_rows and stride < 2**31 else basis.contiguous()
