# SPDX-License-Identifier: Apache-2.0
"""Projection of LoRA factors, a whole model in one call."""

import operator

import torch

from ... import _backends, _ops
from .reference import project_reference

_dtype, _shape = operator.attrgetter("dtype"), operator.attrgetter("shape")
_kind = operator.attrgetter("dtype", "ndim")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Compute capabilities with float64 tensor cores: A100, H100 and H200, B200.
_FAST_DOUBLE = ((8, 0), (9, 0), (10, 0))


def _cuda(
    blocks: list[torch.Tensor], read: list[torch.Tensor], write: list[torch.Tensor]
) -> list[torch.Tensor]:
    return torch.ops.lorax_kernels.project(blocks, read, write)


def _triton(
    blocks: list[torch.Tensor], read: list[torch.Tensor], write: list[torch.Tensor]
) -> list[torch.Tensor]:
    from .triton_launch import project_triton

    return project_triton(blocks, read, write)


def _unknown(dtypes: set[torch.dtype]) -> str | None:
    unknown = dtypes.difference(_DTYPES)
    return f"it has no conversion from {', '.join(map(str, unknown))}" if unknown else None


def _needs_double(
    block: torch.dtype, read: tuple[torch.dtype, int], write: tuple[torch.dtype, int]
) -> bool:
    """Whether the compiled kernels sum in float64, for a block's dtype and the bases' kinds."""
    bases = {read[0], write[0]}
    if block == torch.bfloat16 or (block == torch.float16 and bases == {torch.float16}):
        return False
    in_pieces = bases == {torch.bfloat16} and 3 in (read[1], write[1])
    return block == torch.float64 or not in_pieces


def _cuda_refuses(
    blocks: list[torch.Tensor], read: list[torch.Tensor], write: list[torch.Tensor]
) -> str | None:
    kinds = set(zip(map(_dtype, blocks), map(_kind, read), map(_kind, write), strict=False))
    needs_double = any(_needs_double(*kind) for kind in kinds)
    if needs_double and torch.cuda.get_device_capability(blocks[0].device) not in _FAST_DOUBLE:
        return "it sums these dtypes in float64, which this device multiplies slowly"
    return _unknown({dtype for block, q, p in kinds for dtype in (block, q[0], p[0])})


def _triton_refuses(
    blocks: list[torch.Tensor], read: list[torch.Tensor], write: list[torch.Tensor]
) -> str | None:
    if any(B.dtype == torch.float64 for B in blocks):
        return "it sums in float32, which is too little for a float64 block"
    return _unknown({x.dtype for group in (blocks, read, write) for x in group})


def _is_basis(shape: torch.Size) -> bool:
    return len(shape) == 2 or (len(shape) == 3 and shape[0] == 2)


def _fits(blocks: list[torch.Tensor], read: list[torch.Tensor], write: list[torch.Tensor]) -> bool:
    """What `check_project` checks, in a fraction of its time, which a GPU would wait for.

    The compiled op looks at dtypes itself.
    """
    if not len(blocks) == len(read) == len(write):
        return False
    devices = set().union(*(map(torch.Tensor.get_device, x) for x in (blocks, read, write)))
    # A model has many layers and few shapes.
    shapes = set(zip(*(map(_shape, x) for x in (blocks, read, write)), strict=True))
    return len(devices) <= 1 and all(
        len(b) == 2 and _is_basis(q) and _is_basis(p) and b[0] == q[-2] and q[-1] == p[-1]
        for b, q, p in shapes
    )


_backends.register_reference("project", project_reference)
_backends.register(
    "cuda",
    "project",
    _backends.Kernel(
        _cuda,
        "any float dtypes and layouts; one 16-bit dtype is multiplied in it, bases in two bfloat16 "
        "pieces in bfloat16, bfloat16 blocks with other bases in float32, the rest in float64",
        _cuda_refuses,
    ),
)
_backends.register(
    "triton",
    "project",
    _backends.Kernel(
        _triton, "blocks of 16 or 32-bit floats of any layout, any bases", _triton_refuses
    ),
)


def project(
    blocks: list[torch.Tensor],
    read: list[torch.Tensor],
    write: list[torch.Tensor] | None = None,
    *,
    backend: str = "auto",
) -> list[torch.Tensor]:
    """Carries blocks of columns from one basis to another: `P_i (Q_i^T B_i)` for every `i`.

    With `write` left out it is the orthogonal projection `Q_i (Q_i^T B_i)`. A LoRA factor
    `lora_A` goes in as `lora_A.T`.

    Args:
        blocks: matrices `B_i` `(m_i, r_i)`, any floating dtype; shapes may differ.
        read: bases `Q_i` `(m_i, k_i)` with orthonormal columns, any floating dtype; or `(2, m_i,
            k_i)` bfloat16, two pieces whose sum is the basis, as `split_bfloat16` makes them.
        write: bases `P_i` `(p_i, k_i)` or `(2, p_i, k_i)`, of the same kind as those read or of
            another; the read bases again where left out.
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        Matrices `(p_i, r_i)` in the blocks' dtypes, summed in float32 at least. With float32
        blocks and pieces of bases the compiled kernels are right to 2^-18 of the result, which is
        what two pieces are right to themselves.

    Raises:
        ValueError, TypeError: arguments that do not fit together, or layers on different devices.
        RuntimeError: a backend named explicitly cannot run here; the message says why.

    Example:
        >>> basis = torch.eye(4)[:, :2]
        >>> project([torch.ones(4, 1)], [basis])[0].T
        tensor([[1., 1., 0., 0.]])
    """
    write = read if write is None else write
    run = _backends.select("project", backend, blocks, read, write)
    if run is not _cuda or not _fits(blocks, read, write):
        _ops.check_project(blocks, read, write)
        if run is _cuda:
            raise ValueError("layers must all be on one device; call project once for each device")
    return run(blocks, read, write)
