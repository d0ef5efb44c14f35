# SPDX-License-Identifier: Apache-2.0
"""Fewer directions in every layer of an adapter: the best ones, found from its factors."""

import time
from collections.abc import Callable, Collection

from ._cut import Cut
from ._recompress import check_places, finish
from ._recompression import Part, Recompression, parameters
from .adapters import read_adapter
from .errors import TransferError
from .preflight import PathLike, pick_device, probe_backend


def resize(
    adapter: PathLike,
    output: PathLike | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    drop: Collection[str] = (),
    dtype: str = "auto",
    device: str = "auto",
    backend: str = "auto",
    dry_run: bool = False,
    overwrite: bool = False,
    report: PathLike | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    command: str | None = None,
) -> Recompression:
    """Cut a LoRA adapter to a lower rank, each layer optimally.

    The update of a layer is decomposed through its factors, exactly and without forming it; the
    leading triplets are the best approximation of their rank in every unitarily invariant norm.
    Layers that have the rank already are written unchanged, and every layer keeps its scale.

    Args:
        adapter: directory of a PEFT LoRA.
        output: directory to write; may be left out of a dry run.
        rank: at most this rank in every layer.
        energy: in every layer the smallest rank that keeps this share of its energy, in (0, 1];
            with `rank` at most that many.
        drop: kinds of content to leave out that a resize cannot carry, such as "dora" (keys of
            `lorax_transfer.adapters.DROPPABLE`).
        dtype: of the written factors: "auto" (the adapter's own), "fp32", "bf16" or "fp16".
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        backend: "auto", "cuda", "triton" or "reference".
        dry_run: report only, write no adapter.
        overwrite: replace an existing adapter in `output`.
        report: .json file to write the report to.
        progress: called as `progress(stage, done, total)`.
        command: command line to record in the adapter.

    Returns:
        The report, with rank, energy kept and errors of every layer.

    Raises:
        TransferError: something is missing, broken or out of range; the subclasses in
            `lorax_transfer.errors` say what.

    Example:
        >>> resize("adapter", "small", energy=0.99).totals.parameters  # doctest: +SKIP
        120432
    """
    started = time.perf_counter()
    if rank is None and energy is None:
        raise TransferError("neither rank nor energy was given, expected one of them or both.")
    place = pick_device(device)
    cut = Cut(rank, energy, dtype, place, backend)
    check_places(output, overwrite, report, dry_run)
    probe_backend(place, backend)
    source = read_adapter(adapter, drop=drop)
    layers = list(source.layers.values())
    return finish(
        source,
        [(layer, (layer.lora_B.dtype, layer.lora_A.dtype)) for layer in layers],
        cut,
        kind="resize",
        inputs=(
            Part(str(source.location), source.content_hash, 1.0, len(layers), source.base_model),
        ),
        settings={"drop": sorted(set(drop))},
        output=None if dry_run else output,
        overwrite=overwrite,
        report=report,
        progress=progress,
        command=command,
        warnings=[],
        started=started,
        parameters_before=parameters(layers),
    )
