# SPDX-License-Identifier: Apache-2.0
"""One factor of a polynomial filter, one pass over memory."""

import torch
import triton
import triton.language as tl

# Elements of one program: 16 a thread at four warps, as four loads of 16 bytes of each operand.
_TILE = 2048


@triton.jit
def shift_kernel(Z, X, a, s, out, size, columns, TILE: tl.constexpr):
    """out[b][:, j] = (Z[b][:, j] - a[b] X[b][:, j]) s[b][j].

    Z, X, out  (batch, size)    float32, contiguous, rows of `columns` one after the other
    a          (batch,)         float32
    s          (batch, columns) float32
    """
    batch = tl.program_id(1)
    start = tl.program_id(0).to(tl.int64) * TILE
    within = start + tl.arange(0, TILE)
    at = batch.to(tl.int64) * size + within
    inside = within < size
    root = tl.load(a + batch)
    factor = tl.load(s + batch.to(tl.int64) * columns + within % columns, mask=inside)
    z = tl.load(Z + at, mask=inside)
    x = tl.load(X + at, mask=inside)
    tl.store(out + at, (z - root * x) * factor, mask=inside)


def shift_triton(
    Z: torch.Tensor, X: torch.Tensor, a: torch.Tensor, s: torch.Tensor
) -> torch.Tensor:
    """`(Z - a X) s`; same arguments as the reference."""
    Z, X = Z.contiguous(), X.contiguous()
    out = torch.empty_like(Z)
    size = Z[0].numel() if len(Z) else 0
    if out.numel():
        shift_kernel[(triton.cdiv(size, _TILE), len(Z))](
            Z, X, a.contiguous(), s.contiguous(), out, size, Z.shape[2], TILE=_TILE
        )
    return out
