# SPDX-License-Identifier: Apache-2.0
"""Layers for the tests of `project`, and how an error is judged."""

import torch

from lorax_kernels import split_bfloat16

# (m, p, k, r): one row, odd sizes, several panels of a basis, several tiles of a block, chunks
# that end inside a tile; p is another side where the two bases differ.
SHAPES = [(1, 1, 1, 1), (63, 70, 17, 5), (199, 130, 40, 16), (300, 100, 300, 20), (130, 64, 33, 70)]
SQUARE = [(1, 1, 1, 1), (199, 199, 40, 16), (300, 300, 321, 3), (300, 300, 100, 20)]
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
PIECES = "two bfloat16 pieces"
BASES = {**DTYPES, "2xbf16": PIECES}
# Float32 blocks with bases in pieces, on tensor cores: 1024 rows are 64 sums, each of which is
# truncated by up to 2^-24. The pieces themselves are rounded by up to 2^-17.
PIECES_ERROR = 2.0**-18

Layers = tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]


def basis(m: int, k: int, kind: torch.dtype | str, generator: torch.Generator) -> torch.Tensor:
    """Orthonormal columns; rows of an orthonormal matrix where there are more columns."""
    Q = torch.linalg.qr(torch.randn(max(m, k), k, generator=generator)).Q[:m]
    return split_bfloat16(Q) if kind == PIECES else Q.contiguous().to(kind)


def whole(basis: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return basis.to(dtype) if basis.dim() == 2 else basis.to(dtype).sum(0)


def make_layers(
    shapes: list[tuple[int, int, int, int]],
    factor: torch.dtype,
    read: torch.dtype | str,
    write: torch.dtype | str | None,
    generator: torch.Generator,
    device: str = "cpu",
) -> Layers:
    """Blocks, read bases, write bases (the read ones again with `write` None).

    Every other block lies transposed, as `lora_A.T` does.
    """
    blocks, reads, writes = [], [], []
    for i, (m, p, k, r) in enumerate(shapes):
        B = torch.randn(m, r, generator=generator).to(factor)
        blocks.append((B if i % 2 == 0 else B.T.contiguous().T).to(device))
        reads.append(basis(m, k, read, generator).to(device))
        writes.append(reads[-1] if write is None else basis(p, k, write, generator).to(device))
    return blocks, reads, writes


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def errors(
    results: list[torch.Tensor], layers: Layers, pieces_error: float = 0.0
) -> list[tuple[float, float]]:
    """Of each layer: error against float64, and how large it may be.

    That is twice the error of PyTorch's own products in float32, rounded to the block's dtype as
    ours are, or the rounding of one number. A float64 block is compared with another order of the
    same float64 sums: a thousand roundings, which cancel. Layers with a basis in pieces, and no
    other but in bfloat16, may be off by `pieces_error`.
    """
    pairs = []
    for X, B, Q, P in zip(results, *layers, strict=True):
        expected = whole(P, torch.float64) @ (whole(Q, torch.float64).mT @ B.double())
        plain = (whole(P, torch.float32) @ (whole(Q, torch.float32).mT @ B.float())).to(B.dtype)
        limit = max(2 * relative_error(plain, expected), 1.2e-7)
        if B.dtype == torch.float64:
            limit = 1e-14
        elif {Q.dtype, P.dtype} == {torch.bfloat16} and 3 in (Q.dim(), P.dim()):
            limit = max(limit, pieces_error)
        pairs.append((relative_error(X, expected), limit))
    return pairs
