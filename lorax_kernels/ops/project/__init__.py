# SPDX-License-Identifier: Apache-2.0
"""Projection of LoRA factors, a whole model in one call."""

import torch

from ... import _backends, _ops
from .reference import project_reference

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _cuda(
    blocks: list[torch.Tensor], read: list[torch.Tensor], write: list[torch.Tensor]
) -> list[torch.Tensor]:
    return torch.ops.lorax_kernels.project(blocks, read, write)


def _triton(
    blocks: list[torch.Tensor], read: list[torch.Tensor], write: list[torch.Tensor]
) -> list[torch.Tensor]:
    from .triton_launch import project_triton

    return project_triton(blocks, read, write)


def _refuses(
    blocks: list[torch.Tensor], read: list[torch.Tensor], write: list[torch.Tensor]
) -> str | None:
    unknown = {x.dtype for group in (blocks, read, write) for x in group}.difference(_DTYPES)
    return f"it has no conversion from {', '.join(map(str, unknown))}" if unknown else None


_ACCEPTS = (
    "blocks of 16, 32 or 64-bit floats of any layout; bases bfloat16 or float32 by rows, others "
    "converted first; any sizes"
)
_backends.register_reference("project", project_reference)
_backends.register("cuda", "project", _backends.Kernel(_cuda, _ACCEPTS, _refuses))
_backends.register("triton", "project", _backends.Kernel(_triton, _ACCEPTS, _refuses))


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
        Matrices `(p_i, r_i)` in the blocks' dtypes, summed in float32.

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
    # The compiled op checks the same in C++: here it would take longer than the projection.
    if run is not _cuda:
        _ops.check_project(blocks, read, write)
    return run(blocks, read, write)
