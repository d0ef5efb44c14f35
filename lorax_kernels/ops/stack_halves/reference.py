# SPDX-License-Identifier: Apache-2.0
"""16-bit matrices scaled and stacked as float16, in plain PyTorch."""

from collections.abc import Sequence

import torch

# Up to this power of two a scaled float16 or bfloat16 loses no digit that matters: what a float16
# loses at its small end lies 2^-24 under its largest entry.
_EXACT_POWER = 16
# Matrices are scaled in a copy of so many bytes at a time.
_SCRATCH_BYTES = 256 << 20


def magnitudes(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Largest magnitude of each, `(b,)` in their dtype; NaN where there is one, 0 of no entry."""
    if matrices[0].numel() == 0:
        return matrices[0].new_zeros(len(matrices))
    if matrices[0].is_cuda:
        # One launch for many.
        return torch.stack(torch._foreach_norm(list(matrices), float("inf")))
    extremes = [torch.aminmax(matrix) for matrix in matrices]
    return torch.stack([torch.maximum(-e.min, e.max) for e in extremes])


def stack_halves_reference(
    matrices: Sequence[torch.Tensor], exponents: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`2^e_i M_i` of each matrix `(m, n)`, as `(b, m, n)` float16; largest |M_i|, `(b,)`."""
    first = matrices[0]
    largest = magnitudes(matrices).float()
    stacked = torch.empty(len(matrices), *first.shape, dtype=torch.float16, device=first.device)
    if max(map(abs, exponents)) < _EXACT_POWER:
        step = max(1, _SCRATCH_BYTES // max(1, first.numel() * first.itemsize))
        for start in range(0, len(matrices), step):
            some = slice(start, start + step)
            scaled = torch._foreach_mul(list(matrices[some]), [2.0**e for e in exponents[some]])
            torch._foreach_copy_(list(stacked[some]), scaled)
            del scaled  # before the next ones are made
        return stacked, largest
    for row, matrix, exponent in zip(stacked, matrices, exponents, strict=True):
        # In two steps: a power that brings 1e-38 to 1 is itself out of float32's range.
        half = exponent // 2
        row.copy_(matrix.float() * 2.0**half * 2.0 ** (exponent - half))
    return stacked, largest
