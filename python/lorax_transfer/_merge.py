# SPDX-License-Identifier: Apache-2.0
"""The weighted sum of several adapters of one base model, exact or recompressed."""

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch

from ._cut import Cut, Dtypes
from ._recompress import check_places, finish
from ._recompression import Part, Recompression, parameters
from .adapters import Adapter, LoraLayer, read_adapter
from .errors import MatchError, TransferError
from .preflight import PathLike, pick_device, probe_backend


def merge(
    adapters: Sequence[PathLike],
    output: PathLike | None = None,
    *,
    weights: Sequence[float] | None = None,
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
    """Add LoRA adapters of one base model: `sum_i w_i dW_i` in every layer.

    A sum of low-rank updates is low-rank: its factors are those of the parts side by side, with
    weights and scales multiplied in, and the rank is the sum of the ranks. With `rank` or `energy`
    that sum is cut optimally, through its factors. A module that only some adapters have gets the
    sum of those.

    Args:
        adapters: two or more directories of PEFT LoRAs for the same base model.
        output: directory to write; may be left out of a dry run.
        weights: what each adapter is multiplied with; not zero, may be negative; None for 1 each.
        rank: cut every layer to at most this rank; None leaves the sum of the ranks.
        energy: cut every layer to the smallest rank that keeps this share of its energy.
        drop: kinds of content to leave out that a merge cannot carry (keys of
            `lorax_transfer.adapters.DROPPABLE`).
        dtype: of the written factors: "auto" (the adapters' own, the wider one where they differ),
            "fp32", "bf16" or "fp16".
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        backend: "auto", "cuda", "triton" or "reference".
        dry_run: report only, write no adapter.
        overwrite: replace an existing adapter in `output`.
        report: .json file to write the report to.
        progress: called as `progress(stage, done, total)`.
        command: command line to record in the adapter.

    Returns:
        The report. Its `error` is that of the written factors: with nothing cut it is the rounding
        of their dtype.

    Raises:
        MatchError: the adapters do not fit one model.
        TransferError: something else is missing, broken or out of range; the subclasses in
            `lorax_transfer.errors` say what.

    Example:
        >>> merge(["style", "subject"], "both", weights=[0.7, 1.0])  # doctest: +SKIP
    """
    started = time.perf_counter()
    factors = _weights(adapters, weights)
    place = pick_device(device)
    cut = Cut(rank, energy, dtype, place, backend)
    check_places(output, overwrite, report, dry_run)
    probe_backend(place, backend)
    sources = [read_adapter(path, drop=drop) for path in adapters]
    exact = _sums(sources, factors)
    return finish(
        _frame(sources, [layer.module for layer, _ in exact]),
        exact,
        cut,
        kind="merge",
        inputs=tuple(
            Part(str(x.location), x.content_hash, weight, len(x.layers), x.base_model)
            for x, weight in zip(sources, factors, strict=True)
        ),
        settings={"drop": sorted(set(drop)), "weights": factors},
        output=None if dry_run else output,
        overwrite=overwrite,
        report=report,
        progress=progress,
        command=command,
        warnings=_warnings(sources),
        started=started,
        parameters_before=sum(parameters(x.layers.values()) for x in sources),
    )


def _frame(sources: Sequence[Adapter], modules: Sequence[str]) -> Adapter:
    """The first adapter, with a configuration that reaches every module of the sum."""
    first = sources[0]
    targets = tuple(dict.fromkeys(module for source in sources for module in source.targets))
    if set(modules) == set(first.layers):
        return replace(first, targets=targets)
    # Layer numbers and exclusions of the first would hide what only the others have.
    limits = ("exclude_modules", "layers_to_transform", "layers_pattern")
    config = {**first.config, **{key: None for key in limits if key in first.config}}
    return replace(first, targets=targets, config={**config, "target_modules": list(modules)})


def _weights(adapters: Sequence[PathLike], weights: Sequence[float] | None) -> list[float]:
    if isinstance(adapters, (str, bytes)) or len(adapters) < 2:
        raise TransferError("merge needs two or more adapters; to cut one, use resize.")
    if weights is None:
        return [1.0] * len(adapters)
    if len(weights) != len(adapters):
        raise TransferError(
            f"weights are {list(weights)} for {len(adapters)} adapters, expected one each."
        )
    for weight in weights:
        if not math.isfinite(weight) or weight == 0:
            raise TransferError(
                f"a weight is {weight}, expected a finite number other than 0; leave that adapter "
                "out."
            )
    return [float(weight) for weight in weights]


def _sums(sources: Sequence[Adapter], weights: Sequence[float]) -> list[tuple[LoraLayer, Dtypes]]:
    """The exact sum for every module, and the dtypes of B and A that its parts came in."""
    _check_orientation(sources)
    modules = dict.fromkeys(module for source in sources for module in source.layers)
    sums = []
    for module in modules:
        parts = [
            (source.layers[module], weight)
            for source, weight in zip(sources, weights, strict=True)
            if module in source.layers
        ]
        first = parts[0][0]
        for layer, _ in parts[1:]:
            if (layer.out_features, layer.lora_A.shape[1:]) != (
                first.out_features,
                first.lora_A.shape[1:],
            ):
                raise MatchError(
                    f"{module} is {first.out_features} x {tuple(first.lora_A.shape[1:])} in one "
                    f"adapter and {layer.out_features} x {tuple(layer.lora_A.shape[1:])} in "
                    "another, expected the same; merge adapters of one base model only."
                )
        sums.append(_sum(first, parts))
    return sums


def _sum(first: LoraLayer, parts: Sequence[tuple[LoraLayer, float]]) -> tuple[LoraLayer, Dtypes]:
    dtype_B, dtype_A = first.lora_B.dtype, first.lora_A.dtype
    for layer, _ in parts[1:]:
        dtype_B = torch.promote_types(dtype_B, layer.lora_B.dtype)
        dtype_A = torch.promote_types(dtype_A, layer.lora_A.dtype)
    gains = [weight * layer.scale for layer, weight in parts]
    # A scale that all share stays a scale, so that their factors are carried bit for bit.
    shared = gains[0] if all(gain == gains[0] for gain in gains) else 1.0
    exact_B = [
        layer.matrix_B if gain == shared else layer.matrix_B.double() * gain
        for (layer, _), gain in zip(parts, gains, strict=True)
    ]
    dtype = exact_B[0].dtype
    for B in exact_B[1:]:
        dtype = torch.promote_types(dtype, B.dtype)
    B = torch.cat([B.to(dtype) for B in exact_B], dim=1)
    A = torch.cat([layer.matrix_A.to(dtype_A) for layer, _ in parts])
    return first.with_factors(B, A, scale=shared), (dtype_B, dtype_A)


def _check_orientation(sources: Sequence[Adapter]) -> None:
    if len({source.fan_in_fan_out for source in sources}) > 1:
        odd = next(x for x in sources if x.fan_in_fan_out != sources[0].fan_in_fan_out)
        raise MatchError(
            f"fan_in_fan_out is {sources[0].fan_in_fan_out} in {sources[0].location} and "
            f"{odd.fan_in_fan_out} in {odd.location}, expected the same; merge adapters of one "
            "base model only."
        )


def _warnings(sources: Sequence[Adapter]) -> list[str]:
    names = dict.fromkeys(source.base_model for source in sources if source.base_model)
    found = []
    if len(names) > 1:
        found.append(
            f"the adapters name different base models ({', '.join(names)}); the sum is for the "
            "first one, and means something only if they are the same weights."
        )
    common = set.intersection(*(set(source.layers) for source in sources))
    if not common:
        found.append("no module is adapted by all of the adapters.")
    return found
