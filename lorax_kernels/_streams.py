# SPDX-License-Identifier: Apache-2.0
"""Pieces of work side by side on a GPU, so that the small kernels of one do not leave it idle."""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

# Pieces under way at a time. Small eigenproblems and Cholesky panels are a third of the time of a
# piece and use a tenth of a GPU; with two, the products of the other fill the rest.
LANES = 2


@functools.cache
def _streams(index: int) -> tuple[torch.cuda.Stream, ...]:
    """Streams of one device, always the same: PyTorch keeps freed memory stream by stream."""
    return tuple(torch.cuda.Stream(index) for _ in range(LANES))


def side_by_side(
    run: Callable[[_Job], _Result],
    jobs: Sequence[_Job],
    device: torch.device,
    tensors: Callable[[_Result], Iterator[torch.Tensor]],
) -> list[_Result]:
    """Runs `run` on every job, `LANES` at a time on streams of their own where that can help.

    Args:
        run: launches the work of a job on the current stream.
        jobs: in the order of the results.
        device: of the tensors. A CPU, or a stream that is being captured, takes one job after
            another.
        tensors: the tensors of a result that outlive the call.

    Returns:
        The results, ready on the current stream.

    Raises:
        Exception: the first that a job raised; the others are waited for.
    """
    if device.type != "cuda" or len(jobs) < 2 or torch.cuda.is_current_stream_capturing():
        return [run(job) for job in jobs]
    caller = torch.cuda.current_stream(device)
    streams = _streams(caller.device_index)
    for stream in streams:
        stream.wait_stream(caller)
    free = list(streams)

    def in_lane(job: _Job) -> _Result:
        stream = free.pop()
        try:
            # Gradient mode belongs to a thread.
            with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(stream):
                return run(job)
        finally:
            free.append(stream)

    with ThreadPoolExecutor(LANES) as pool:
        # A failure is raised once nothing of this call is under way any more.
        futures = [pool.submit(in_lane, job) for job in jobs]
    for stream in streams:
        caller.wait_stream(stream)
    results = [future.result() for future in futures]
    for result in results:
        for tensor in tensors(result):
            # Allocated on a side stream and used on the caller's from now on.
            tensor.record_stream(caller)
    return results
