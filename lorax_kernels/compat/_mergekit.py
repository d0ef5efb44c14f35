# SPDX-License-Identifier: Apache-2.0
"""mergekit: the SVD of `mergekit-extract-lora`."""

from collections.abc import Callable
from typing import Any

import torch

from ..svd import truncated_svd
from ._switch import Options, Patch, Tool


def _execute(
    options: Options, original: Callable[..., Any], task: Any, task_vector: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of a weight difference, of which mergekit computes every singular triplet."""
    delta = task_vector.T if task.transpose else task_vector
    if delta.dim() != 2 or not delta.is_floating_point() or 0 in delta.shape or task.max_rank < 1:
        return original(task, task_vector)
    rank = min(task.max_rank, *delta.shape)
    svd = truncated_svd(delta.float(), rank, tol=options.tol, backend=options.backend)
    if task.sv_epsilon > 0:
        rank = min(rank, int(svd.S.gt(task.sv_epsilon).sum()))
    U, S, V = svd.U[:, :rank], svd.S[:rank], svd.V[:, :rank]
    left = S.sqrt() if task.distribute_scale else torch.ones_like(S)
    right = S.sqrt() if task.distribute_scale else S
    lora_A, lora_B = (V * right).T.contiguous(), U * left
    return lora_A.to(delta.dtype), lora_B.to(delta.dtype)


TOOL = Tool(
    "mergekit",
    ("0.1.5",),
    (
        Patch(
            "mergekit.scripts.extract_lora:TaskVectorDecompositionTask.execute",
            "mergekit-extract-lora: the leading singular triplets only, to tol",
            _execute,
        ),
    ),
)
