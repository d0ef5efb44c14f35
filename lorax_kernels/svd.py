# SPDX-License-Identifier: Apache-2.0
"""The truncated SVD: right to a stated tolerance, for any number of matrices of any shapes."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch

from . import _backends, _batching, _exact, _signs, _streams, _subspace
from ._planning import Plan, plan
from .svd_types import SVD


class ConvergenceWarning(UserWarning):
    """A truncated SVD stopped above the tolerance it was asked for."""


@overload
def truncated_svd(
    W: torch.Tensor,
    rank: int | None = ...,
    *,
    energy: float | None = ...,
    tol: float = ...,
    oversample: int | None = ...,
    max_passes: int | None = ...,
    generator: torch.Generator | None = ...,
    init: SVD | None = ...,
    backend: str = ...,
    workspace: int = ...,
) -> SVD: ...
@overload
def truncated_svd(
    W: Sequence[torch.Tensor],
    rank: int | None = ...,
    *,
    energy: float | None = ...,
    tol: float = ...,
    oversample: int | None = ...,
    max_passes: int | None = ...,
    generator: torch.Generator | None = ...,
    init: Sequence[SVD | None] | None = ...,
    backend: str = ...,
    workspace: int = ...,
) -> list[SVD]: ...
@torch.no_grad()
def truncated_svd(
    W: torch.Tensor | Sequence[torch.Tensor],
    rank: int | None = None,
    *,
    energy: float | None = None,
    tol: float = 1e-3,
    oversample: int | None = None,
    max_passes: int | None = None,
    generator: torch.Generator | None = None,
    init: SVD | Sequence[SVD | None] | None = None,
    backend: str = "auto",
    workspace: int = 4 << 30,
) -> SVD | list[SVD]:
    """Leading singular triplets `W ~ U diag(S) V^T`, to a stated projector error.

    For the top `rank` directions of weight matrices, where a full SVD takes seconds and a fixed
    number of power iterations is wrong by tens of per cent because the spectra are flat. Each
    matrix is iterated until its own estimated error is below `tol`; small matrices and high ranks
    are decomposed exactly. On a CPU results do not depend on what else is in the batch; on a GPU
    matrices of one shape share their filter, so that they do, within `tol`.

    Args:
        W: one matrix `(m, n)`, a stack `(b, m, n)`, or a list of matrices of any shapes, dtypes
            (bfloat16, float16, float32, float64) and devices. Unchanged.
        rank: triplets to keep, `1 <= rank <= min(m, n)`. May be left out where `energy` is given.
        energy: keep the smallest rank, up to `rank`, whose squared singular values sum to this
            share of `||W||_F^2`, in (0, 1]. In a stack, the rank of the neediest matrix.
        tol: relative projector error to reach, `||V V^T - P||_F / ||P||_F`.
        oversample: columns of the block beyond `rank`; None chooses half of the rank, at least 16.
        max_passes: products with `W` or `W^T` at most. None lets the exact path take over where
            as many as it would cost do not reach `tol`; with a number the result says what it
            reached.
        generator: source of the starting block. None is a fixed seed.
        init: a previous SVD of a similar matrix to start from (for a list of matrices a list, with
            None where there is none). Its columns beyond `rank` tell where the rest of the spectrum
            begins: with half as many again a fine-tuned copy takes two to twenty passes, without
            them six at least.
        backend: "auto", "cuda", "triton" or "reference".
        workspace: bytes of extra memory, beyond weights and results, that a batch may take; one
            matrix at a time is the least there is.

    Returns:
        An `SVD` (float32 factors on W's device), stacked for a stack; a list of them for a list.

    Raises:
        ValueError: shapes, rank, energy, tol or backend out of range; a NaN or Inf in a matrix.
        TypeError: not a floating-point matrix.
        RuntimeError: a backend named explicitly cannot run here.

    Warns:
        ConvergenceWarning: the error stayed above `tol`: `max_passes` was reached, or singular
            values at the cut are equal, so that no subspace is determined.

    Example:
        >>> svd = truncated_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2)
        >>> svd.S
        tensor([3., 2.])

    The method is described in `docs/kernels/truncated_svd.md`.
    """
    _check_options(rank, energy, tol, oversample, max_passes)
    stacked = W if isinstance(W, torch.Tensor) and W.dim() == 3 else None
    matrices = [W] if isinstance(W, torch.Tensor) and stacked is None else list(W)
    for i, matrix in enumerate(matrices):
        _batching.check(i, matrix, rank)
    starts = _starts(matrices, init)
    seed = _seed(generator)
    halves = _backends.requested(backend) != "reference"
    jobs: list[_Job] = []
    for group in _batching.groups(matrices, [start is not None for start in starts]):
        first = matrices[group[0]]
        k = min(first.shape) if rank is None else rank
        m, n = first.shape
        p = plan(m, n, k, oversample, first.device, first.dtype, max_passes)
        on_tensor_cores = first.is_cuda and halves
        room = workspace // (_streams.LANES if first.is_cuda else 1)
        for chunk in _batching.chunks(group, first, p, room, on_tensor_cores):
            jobs.append(_Job(chunk, k, p, on_tensor_cores))

    def run(job: _Job) -> list[SVD]:
        exact = job.plan.path == "exact"
        stack, scale = _batching.stack(matrices, job.chunk, exact, job.on_tensor_cores, backend)
        start = [starts[i] for i in job.chunk]
        return _decompose(stack, scale, job.k, job.plan, tol, max_passes, start, seed, backend)

    found: dict[int, SVD] = {}
    for device in dict.fromkeys(matrices[job.chunk[0]].device for job in jobs):
        mine = [job for job in jobs if matrices[job.chunk[0]].device == device]
        for job, svds in zip(mine, _streams.side_by_side(run, mine, device, _factors), strict=True):
            found.update(zip(job.chunk, svds, strict=True))
    results = [found[i] for i in range(len(matrices))]
    _warn(results, tol)
    if energy is not None:
        ranks = [_energy_rank(m, svd, energy) for m, svd in zip(matrices, results, strict=True)]
        ranks = [max(ranks)] * len(ranks) if stacked is not None and ranks else ranks
        results = [svd.truncate(r) for svd, r in zip(results, ranks, strict=True)]
    if stacked is not None:
        return _stack_results(results, stacked, rank)
    return results[0] if isinstance(W, torch.Tensor) else results


@dataclass(frozen=True)
class _Job:
    """Matrices to decompose together, and how."""

    chunk: list[int]
    k: int
    plan: Plan
    on_tensor_cores: bool


def _factors(svds: list[SVD]) -> Iterator[torch.Tensor]:
    for svd in svds:
        yield from (svd.U, svd.S, svd.V)


def _check_options(
    rank: int | None,
    energy: float | None,
    tol: float,
    oversample: int | None,
    max_passes: int | None,
) -> None:
    if rank is None and energy is None:
        raise ValueError("give a rank, an energy share, or both")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy is a share in (0, 1], got {energy}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    if oversample is not None and oversample < 1:
        raise ValueError(f"oversample must be at least 1, got {oversample}")
    if max_passes is not None and max_passes < 2:
        raise ValueError(f"max_passes must be at least 2, got {max_passes}")


def _starts(
    matrices: list[torch.Tensor], init: SVD | Sequence[SVD | None] | None
) -> list[torch.Tensor | None]:
    """For each matrix the basis of its short side to start from, or None."""
    if isinstance(init, SVD):
        init = init.unbind()
    if init is None:
        return [None] * len(matrices)
    if len(init) != len(matrices):
        raise ValueError(f"init must have one entry a matrix, {len(matrices)}; got {len(init)}")
    starts: list[torch.Tensor | None] = []
    for i, (matrix, svd) in enumerate(zip(matrices, init, strict=True)):
        if svd is None:
            starts.append(None)
            continue
        m, n = matrix.shape
        if (svd.U.shape[0], svd.V.shape[0]) != (m, n):
            raise ValueError(
                f"init {i} must come from a matrix of shape {(m, n)}, got one of "
                f"{(svd.U.shape[0], svd.V.shape[0])}"
            )
        starts.append((svd.U if n > m else svd.V).to(matrix.device))
    return starts


def _seed(generator: torch.Generator | None) -> int:
    if generator is None:
        return 0
    device = generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def _start_block(
    rows: int, width: int, bases: list[torch.Tensor | None], seed: int, device: torch.device
) -> torch.Tensor:
    """Random block `(1 or b, rows, width)`, its leading columns taken from bases where given.

    Seeded by its shape, so that no matrix's start depends on which others are in the call.
    """
    generator = torch.Generator(device).manual_seed((seed * 1000003 + rows * 8191 + width) % 2**62)
    block = torch.randn(1, rows, width, generator=generator, dtype=torch.float32, device=device)
    if all(basis is None for basis in bases):
        return block
    block = block.repeat(len(bases), 1, 1)
    for row, basis in zip(block, bases, strict=True):
        if basis is not None:
            columns = min(width, basis.shape[1])
            row[:, :columns] = basis[:, :columns]
    return block


def _decompose(
    stack: torch.Tensor,
    scale: torch.Tensor,
    k: int,
    p: Plan,
    tol: float,
    max_passes: int | None,
    starts: list[torch.Tensor | None],
    seed: int,
    backend: str,
) -> list[SVD]:
    """Results for each matrix of a stack, whose singular values were divided by `scale`, `(b,)`."""
    _, m, n = stack.shape

    def exactly(some: slice) -> list[SVD]:
        found = _exact.decompose(stack[some], k, tol, backend=backend)
        return _results(found, scale[some], "exact")

    if p.path == "exact":
        return exactly(slice(None))
    block = _start_block(min(m, n), p.width, starts, seed, stack.device)
    known = [p.width, *(basis.shape[1] for basis in starts if basis is not None)]
    triplets = _subspace.iterate(
        stack,
        block,
        k,
        tol,
        p.max_passes if max_passes is None else max_passes,
        use_gram=p.use_gram,
        gram_from=p.gram_from,
        known=min(known) if len(known) > 1 else 0,
        backend=backend,
    )
    results = _results(triplets, scale, "randomized")
    if max_passes is None:
        # One at a time: these are few, and each needs a full eigendecomposition.
        for i, svd in enumerate(results):
            if not svd.error <= tol:
                results[i : i + 1] = exactly(slice(i, i + 1))
    return results


def _results(triplets: _subspace.Triplets, scale: torch.Tensor, path: str) -> list[SVD]:
    """One by one, with the weights' scale and canonical signs."""
    U, V = triplets.U, triplets.V
    sign = _signs.canonical(U)
    S = (triplets.S * scale[:, None].to(triplets.S.device)).float()
    columns = (U * sign, S, V * sign, triplets.error.tolist(), triplets.passes.tolist())
    return [SVD(*row, path) for row in zip(*columns, strict=True)]


def _energy_rank(W: torch.Tensor, svd: SVD, energy: float) -> int:
    # Relative to sigma_1: squares of the weights themselves may overflow.
    top = svd.S[0].double()
    if top == 0:
        return 1
    total = torch.linalg.vector_norm(W / top.to(W.dtype), dtype=torch.float64) ** 2
    kept = torch.cumsum((svd.S.double() / top) ** 2, dim=0)
    enough = kept >= energy * total * (1 - 1e-6)
    return int(enough.int().argmax()) + 1 if bool(enough.any()) else svd.rank


def _warn(results: list[SVD], tol: float) -> None:
    short_of = [(i, svd) for i, svd in enumerate(results) if not svd.error <= tol]
    if not short_of:
        return
    i, worst = max(short_of, key=lambda entry: entry[1].error)
    why = (
        "singular values at the cut are too close for any subspace to be determined"
        if worst.path == "exact"
        else f"it stopped after {worst.passes} passes; raise max_passes, oversample or tol"
    )
    warnings.warn(
        f"{len(short_of)} of {len(results)} truncated SVDs are above the tolerance {tol:g}; the "
        f"worst, matrix {i}, has an estimated projector error of {worst.error:.1e}: {why}",
        ConvergenceWarning,
        stacklevel=3,
    )


def _stack_results(results: list[SVD], W: torch.Tensor, rank: int | None) -> SVD:
    if not results:
        k = min(W.shape[1:]) if rank is None else rank
        U, V = W.new_empty(0, W.shape[1], k), W.new_empty(0, W.shape[2], k)
        S = W.new_empty(0, k)
        return SVD(U.float(), S.float(), V.float(), torch.empty(0), torch.empty(0).long(), ())
    return SVD(
        torch.stack([svd.U for svd in results]),
        torch.stack([svd.S for svd in results]),
        torch.stack([svd.V for svd in results]),
        torch.tensor([svd.error for svd in results]),
        torch.tensor([svd.passes for svd in results]),
        tuple(str(svd.path) for svd in results),
    )
