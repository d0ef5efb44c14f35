# SPDX-License-Identifier: Apache-2.0
"""Products with the difference of two weights, which is never held whole."""

from collections.abc import Iterator

import torch

# Bytes of float32 difference that exist at a time.
_CHUNK_BYTES = 2**26


@torch.no_grad()
def drift_gram(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`D^T D` of the difference `D = W_t - W_s`, for weights with many more rows than columns.

    Args:
        source: `W_s` `(m, n)`; any floating dtype.
        target: `W_t` `(m, n)`.

    Returns:
        `(n, n)` in float64; products of a few thousand rows are in float32, or in float64 where a
        weight is.
    """
    _check_pair(source, target)
    total = torch.zeros(2 * source.shape[1:], dtype=torch.float64, device=source.device)
    for drift in _differences(source, target):
        total += drift.mT @ drift
    return total


@torch.no_grad()
def drift_product(
    source: torch.Tensor, target: torch.Tensor, X: torch.Tensor, *, transpose: bool = False
) -> torch.Tensor:
    """`(W_t - W_s) X`, or `(W_t - W_s)^T X`, for a thin block `X`.

    The difference is formed, a few rows at a time: the two products alone would agree in all but
    their last digits.

    Args:
        source: `W_s` `(m, n)`; any floating dtype.
        target: `W_t` `(m, n)`.
        X: `(n, p)`, or `(m, p)` with `transpose`.
        transpose: multiply by the transpose.

    Returns:
        `(m, p)`, or `(n, p)` with `transpose`, in float64; products are in float32, or in float64
        where a weight is.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> drift_product(torch.ones(3, 2), 2 * torch.ones(3, 2), torch.ones(2, 1)).T
        tensor([[2., 2., 2.]], dtype=torch.float64)
    """
    _check_pair(source, target)
    side = source.shape[0 if transpose else 1]
    if X.dim() != 2 or X.shape[0] != side:
        raise ValueError(f"the block must have {side} rows, got shape {tuple(X.shape)}")
    sides = source.shape[::-1] if transpose else source.shape
    total = torch.zeros(sides[0], X.shape[1], dtype=torch.float64, device=X.device)
    start = 0
    for drift in _differences(source, target):
        part = slice(start, start + len(drift))
        if transpose:
            total += drift.mT @ X[part].to(drift.dtype)
        else:
            total[part] = (drift @ X.to(drift.dtype)).double()
        start += len(drift)
    return total


def _check_pair(source: torch.Tensor, target: torch.Tensor) -> None:
    if source.dim() != 2 or source.shape != target.shape:
        raise ValueError(
            f"weights must be matrices of one shape, got {tuple(source.shape)} and "
            f"{tuple(target.shape)}"
        )


def _differences(source: torch.Tensor, target: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows of `W_t - W_s`, a few at a time, in float32 or, where a weight is, in float64."""
    is_double = torch.float64 in (source.dtype, target.dtype)
    working = torch.float64 if is_double else torch.float32
    rows = max(1, _CHUNK_BYTES // (4 * source.shape[1]))
    for s, t in zip(source.split(rows), target.split(rows), strict=True):
        yield t.to(working) - s.to(working)
