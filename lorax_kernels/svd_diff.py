# SPDX-License-Identifier: Apache-2.0
"""The truncated SVD of what a fine-tune changed."""

from collections.abc import Iterator, Sequence
from typing import overload

import torch

from .svd import truncated_svd
from .svd_types import SVD


@overload
def svd_diff(
    W1: torch.Tensor,
    W0: torch.Tensor,
    rank: int | None = ...,
    *,
    energy: float | None = ...,
    tol: float = ...,
    oversample: int | None = ...,
    max_passes: int | None = ...,
    generator: torch.Generator | None = ...,
    backend: str = ...,
    workspace: int = ...,
) -> SVD: ...
@overload
def svd_diff(
    W1: Sequence[torch.Tensor],
    W0: Sequence[torch.Tensor],
    rank: int | None = ...,
    *,
    energy: float | None = ...,
    tol: float = ...,
    oversample: int | None = ...,
    max_passes: int | None = ...,
    generator: torch.Generator | None = ...,
    backend: str = ...,
    workspace: int = ...,
) -> list[SVD]: ...
def svd_diff(
    W1: torch.Tensor | Sequence[torch.Tensor],
    W0: torch.Tensor | Sequence[torch.Tensor],
    rank: int | None = None,
    *,
    energy: float | None = None,
    tol: float = 1e-3,
    oversample: int | None = None,
    max_passes: int | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    workspace: int = 4 << 30,
) -> SVD | list[SVD]:
    """Leading singular triplets of `W1 - W0`, without a difference of the whole model.

    For extracting a LoRA from a fine-tune. The differences of a list exist a few at a time, within
    `workspace` bytes, in float32 (float64 where either weight has it). A single matrix's difference
    *is* formed, on purpose. Iterating on `W1 X - W0 X` instead would avoid even that, but the two
    products agree in all but the last digits: at a drift of 1 % it loses two of float32's seven
    digits in every pass, and it reads two matrices a pass where the difference is one. Subtracting
    first is exact to float32 rounding of the difference itself.

    Args:
        W1: the fine-tuned weight `(m, n)`, a stack `(b, m, n)`, or a list of matrices of any
            shapes; bfloat16, float16, float32 or float64. Unchanged.
        W0: the base weights, of the same shapes and on the same devices; dtypes may differ.
        rank: triplets to keep; may be left out where `energy` is given.
        energy: keep the smallest rank, up to `rank`, that holds this share of the difference.
        tol: relative projector error to reach; see `truncated_svd`, also for what follows.
        oversample: columns of the block beyond `rank`.
        max_passes: products with the difference at most.
        generator: source of the starting block; None is a fixed seed.
        backend: "auto", "cuda", "triton" or "reference".
        workspace: bytes of extra memory beyond weights and results, differences included; one
            matrix at a time is the least there is.

    Returns:
        An `SVD`, stacked for a stack; a list of them for a list.

    Raises:
        ValueError: weights that do not pair up, or an argument out of range.
        TypeError: not floating-point matrices.
        RuntimeError: a backend named explicitly cannot run here.

    Warns:
        ConvergenceWarning: the error stayed above `tol`.

    Example:
        >>> W0 = torch.ones(4, 3)
        >>> svd_diff(W0 + torch.diag(torch.ones(4))[:, :3], W0, rank=2).S
        tensor([1., 1.])
    """
    if isinstance(W1, torch.Tensor) and isinstance(W0, torch.Tensor):
        difference = _difference(0, W1, W0)
        return truncated_svd(
            difference,
            rank,
            energy=energy,
            tol=tol,
            oversample=oversample,
            max_passes=max_passes,
            generator=generator,
            backend=backend,
            workspace=max(workspace - difference.nbytes, 1),
        )
    if isinstance(W1, torch.Tensor) or isinstance(W0, torch.Tensor):
        raise TypeError("W1 and W0 must both be tensors or both be lists of them")
    if len(W1) != len(W0):
        raise ValueError(f"W1 and W0 must pair up, got {len(W1)} and {len(W0)} matrices")
    seed = _seed(generator)
    results: list[SVD] = []
    for chunk in _chunks(W1, workspace // 2):
        results += truncated_svd(
            [_difference(i, W1[i], W0[i]) for i in chunk],
            rank,
            energy=energy,
            tol=tol,
            oversample=oversample,
            max_passes=max_passes,
            # The same start for every chunk: where a list is cut must not show in the results.
            generator=None if seed is None else torch.Generator().manual_seed(seed),
            backend=backend,
            workspace=max(workspace // 2, 1),
        )
    return results


def _seed(generator: torch.Generator | None) -> int | None:
    if generator is None:
        return None
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def _difference(index: int, W1: torch.Tensor, W0: torch.Tensor) -> torch.Tensor:
    for weight in (W1, W0):
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            kind = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise TypeError(f"pair {index} must be floating-point tensors, got {kind}")
    if W1.shape != W0.shape or W1.device != W0.device:
        raise ValueError(
            f"pair {index} must have one shape and device, got {tuple(W1.shape)} on {W1.device} "
            f"and {tuple(W0.shape)} on {W0.device}"
        )
    is_double = torch.float64 in (W1.dtype, W0.dtype)
    working = torch.float64 if is_double else torch.float32
    return W1.detach().to(working) - W0.detach().to(working)


def _chunks(matrices: Sequence[torch.Tensor], budget: int) -> Iterator[range]:
    """Runs of matrices whose float32 differences fit into `budget` bytes, one at the least."""
    start, size = 0, 0
    for i, matrix in enumerate(matrices):
        own = 4 * matrix.numel()
        if i > start and size + own > budget:
            yield range(start, i)
            start, size = i, 0
        size += own
    if start < len(matrices):
        yield range(start, len(matrices))
