# SPDX-License-Identifier: Apache-2.0
"""Tables and launches of the Triton projection kernels."""

import os
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .triton_kernel import project_read_kernel, project_sum_kernel, project_write_kernel

_PANEL = 64  # columns of a basis in one product
_CHUNK_ROWS = 1024
_WRITE_ROWS = 128
_READ_TILE = 64
_SUM_TILE = 1024

# Triton's interpreter multiplies the bit patterns of bfloat16 numbers; the same numbers as float32
# give it the products that the tensor cores give.
_OPERAND = tl.float32 if os.environ.get("TRITON_INTERPRET") == "1" else tl.bfloat16

_TRITON_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


class _Plan:
    """The tables of one call on the device; they depend on pointers and shapes alone."""

    def __init__(self, layers: tuple[tuple[int, ...], ...], R: int, device: torch.device) -> None:
        rows = torch.tensor(layers, dtype=torch.int64)
        m, p, k, r = (rows[:, i] for i in (7, 8, 9, 10))
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


def _run_group(
    blocks: list[torch.Tensor], read: list[torch.Tensor], write: list[torch.Tensor]
) -> list[torch.Tensor]:
    """All layers share their dtypes, and the power of two that their rank is padded to."""
    device, dtype = blocks[0].device, blocks[0].dtype
    layers = tuple(
        (
            *(B.data_ptr(), Q.data_ptr(), P.data_ptr()),
            *(B.stride(0), B.stride(1), Q.stride(0), P.stride(0)),
            *(B.shape[0], P.shape[0], Q.shape[1], B.shape[1]),
        )
        for B, Q, P in zip(blocks, read, write, strict=True)
    )
    R = _padded_rank(blocks[0].shape[1])
    plan = _plan(layers, R, device)
    partials = torch.empty(plan.sizes[0], dtype=torch.float32, device=device)
    coordinates = torch.empty(plan.sizes[1], dtype=torch.float32, device=device)
    out = torch.empty(plan.sizes[2], dtype=dtype, device=device)

    def is_aligned(bases: list[torch.Tensor]) -> bool:
        return all(x.data_ptr() % 16 == x.stride(0) % 8 == x.shape[1] % 8 == 0 for x in bases)

    def is_exact(bases: list[torch.Tensor]) -> bool:
        return dtype == bases[0].dtype == torch.bfloat16

    shared = {"R": R, "PANEL": _PANEL}
    project_read_kernel[(len(plan.reads),)](
        plan.table,
        plan.reads,
        partials,
        BASIS=_TRITON_DTYPES[read[0].dtype],
        FACTOR=_TRITON_DTYPES[dtype],
        CHUNK_ROWS=_CHUNK_ROWS,
        TILE=_READ_TILE,
        IS_EXACT=is_exact(read),
        OPERAND=_OPERAND,
        IS_ALIGNED=is_aligned(read),
        num_stages=4,
        **shared,
    )
    project_sum_kernel[(len(plan.sums),)](
        plan.table,
        plan.sums,
        partials,
        coordinates,
        CHUNKS=plan.chunks,
        TILE=_SUM_TILE,
        **shared,
    )
    project_write_kernel[(len(plan.writes),)](
        plan.table,
        plan.writes,
        coordinates,
        out,
        BASIS=_TRITON_DTYPES[write[0].dtype],
        PANELS=plan.panels,
        TILE=_WRITE_ROWS,
        IS_EXACT=is_exact(write),
        OPERAND=_OPERAND,
        IS_ALIGNED=is_aligned(write),
        num_stages=3,
        **shared,
    )
    return [
        out[start : start + P.shape[0] * B.shape[1]].view(P.shape[0], B.shape[1])
        for start, B, P in zip(plan.out_starts, blocks, write, strict=True)
    ]


def _padded_rank(r: int) -> int:
    return max(16, triton.next_power_of_2(r))


# Columns of blocks taken at once; wider blocks are cut, and read a basis once for each piece.
_WIDEST_RANK = 128


def project_triton(
    blocks: list[torch.Tensor], read: list[torch.Tensor], write: list[torch.Tensor]
) -> list[torch.Tensor]:
    """`P_i (Q_i^T B_i)` for every `i`, in the block's dtype; results share one allocation."""
    results: dict[int, torch.Tensor] = {}
    groups: dict[tuple, _Group] = {}
    for i, (B, Q, P) in enumerate(zip(blocks, read, write, strict=True)):
        r = B.shape[1]
        if 0 in (*B.shape, *P.shape):
            results[i] = B.new_zeros(P.shape[0], r)
            continue
        if r > _WIDEST_RANK:
            results[i] = B.new_empty(P.shape[0], r)
        Q, P = _readable(Q), _readable(P)
        factor = B.float() if B.dtype == torch.float64 else B
        for start in range(0, r, _WIDEST_RANK):
            part = factor[:, start : start + _WIDEST_RANK]
            key = (Q.dtype, P.dtype, part.dtype, _padded_rank(part.shape[1]))
            groups.setdefault(key, _Group()).add(i, start, part, Q, P)
    for group in groups.values():
        pieces = _run_group(group.blocks, group.read, group.write)
        for i, start, piece in zip(group.layers, group.starts, pieces, strict=True):
            if i in results:
                results[i][:, start : start + piece.shape[1]] = piece
            else:
                results[i] = piece.to(blocks[i].dtype)
    return [results[i] for i in range(len(blocks))]


class _Group:
    """Pieces of layers that one launch takes together."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.starts: list[int] = []
        self.blocks: list[torch.Tensor] = []
        self.read: list[torch.Tensor] = []
        self.write: list[torch.Tensor] = []

    def add(
        self, layer: int, start: int, block: torch.Tensor, read: torch.Tensor, write: torch.Tensor
    ) -> None:
        self.layers.append(layer)
        self.starts.append(start)
        self.blocks.append(block)
        self.read.append(read)
        self.write.append(write)


def _readable(basis: torch.Tensor) -> torch.Tensor:
    """The kernels read rows of bfloat16 or float32, less than 2^31 elements apart."""
    if basis.dtype not in (torch.bfloat16, torch.float32):
        basis = basis.float()
    has_rows = basis.stride(1) == 1 or basis.shape[1] == 1
    return basis if has_rows and basis.stride(0) < 2**31 else basis.contiguous()
