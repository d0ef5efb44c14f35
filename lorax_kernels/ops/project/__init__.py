# SPDX-License-Identifier: Apache-2.0
"""Projection of LoRA factors, a whole model in one call."""

import operator

import torch

from ... import _backends, _ops
from .reference import project_reference

_dtype, _shape = operator.attrgetter("dtype"), operator.attrgetter("shape")
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


def _cuda_refuses(
    blocks: list[torch.Tensor], read: list[torch.Tensor], write: list[torch.Tensor]
) -> str | None:
    dtypes = [list(map(_dtype, group)) for group in (blocks, read, write)]
    kinds = set(zip(*dtypes, strict=False))
    is_half = {(torch.float16,) * 3}
    needs_double = any(kind[0] != torch.bfloat16 for kind in kinds - is_half)
    if needs_double and torch.cuda.get_device_capability(blocks[0].device) not in _FAST_DOUBLE:
        return "it sums these dtypes in float64, which this device multiplies slowly"
    return _unknown(set().union(*dtypes))


def _triton_refuses(
    blocks: list[torch.Tensor], read: list[torch.Tensor], write: list[torch.Tensor]
) -> str | None:
    if any(B.dtype == torch.float64 for B in blocks):
        return "it sums in float32, which is too little for a float64 block"
    return _unknown({x.dtype for group in (blocks, read, write) for x in group})


def _fits(blocks: list[torch.Tensor], read: list[torch.Tensor], write: list[torch.Tensor]) -> bool:
    """What `check_project` checks, in a fraction of its time, which a GPU would wait for."""
    if not len(blocks) == len(read) == len(write):
        return False
    devices = set().union(*(map(torch.Tensor.get_device, x) for x in (blocks, read, write)))
    # A model has many layers and few shapes.
    shapes = set(zip(*(map(_shape, x) for x in (blocks, read, write)), strict=True))
    return len(devices) <= 1 and all(
        len(b) == len(q) == len(p) == 2 and b[0] == q[0] and q[1] == p[1] for b, q, p in shapes
    )


_backends.register_reference("project", project_reference)
_backends.register(
    "cuda",
    "project",
    _backends.Kernel(
        _cuda,
        "any float dtypes and layouts; one 16-bit dtype is multiplied in it, bfloat16 blocks with "
        "other bases in float32, the rest in float64",
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
        read: bases `Q_i` `(m_i, k_i)` with orthonormal columns.
        write: bases `P_i` `(p_i, k_i)`; the read bases again where left out.
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        Matrices `(p_i, r_i)` in the blocks' dtypes, summed in float32 at least.

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
